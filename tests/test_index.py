"""The index on disk: the same bytes however it came about, and nothing that looks whole and is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from finetrace.collection import Collector, Representation
from finetrace.encoding import PLAIN_TEMPLATE, Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import Index, build_index, open_index
from finetrace.index import manifest as manifests
from finetrace.models import Loaded, ModelSpec, load
from tiny import (
    CHATML,
    conversation,
    make_examples,
    make_gpt2,
    make_llama,
    make_tokenizer,
    relative_error,
    save_base,
    with_lora,
)

ROWS = 23
PER_SHARD = 4
SHARDS = -(-ROWS // PER_SHARD)


def build(loaded: Loaded, folder: Path, examples: list[Example] | None = None, **options: Any) -> Index:
    settings = {"rows_per_shard": PER_SHARD} | options
    encoder = settings.pop("encoder", None) or Encoder(loaded.tokenizer)
    return build_index(loaded, make_examples(ROWS) if examples is None else examples, folder, encoder, **settings)[0]


class Content(bytes):
    """A file's bytes, which a failing comparison shows in short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, {hashlib.sha256(self).hexdigest()[:12]}>"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the empty one that a writer locks, by relative name."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found: dict[str, bytes] = {str(path.relative_to(folder)): Content(path.read_bytes()) for path in paths}
    return {name: data for name, data in found.items() if not (name.endswith(".lock") and not data)}


def test_what_is_longer_than_the_limits_is_said_before_the_work(tiny_loaded: Any, tmp_path: Path) -> None:
    """A row that is far too long may cost the process its life; it has to have been named by then."""
    said: list[str] = []

    def stop(*_: object) -> None:
        said.append("the work begins")
        raise KeyboardInterrupt

    examples = [conversation("q", "ok", id="short"), conversation("q", "x" * 60, id="long")]
    with pytest.raises(KeyboardInterrupt):
        build(
            tiny_loaded,
            tmp_path / "i",
            examples,
            encoder=Encoder(tiny_loaded.tokenizer, max_length=50),
            say=said.append,
            begin=stop,
        )
    assert [line.split(" (")[0] for line in said] == ["1 example is longer than 50 tokens", "the work begins"]


def in_memory(model: Any, name: str = "in memory", tokenizer: Any = None) -> Loaded:
    return Loaded(model, tokenizer or make_tokenizer(), ModelSpec(name, None, "float64", "cpu"))


def edit_manifest(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(change(document) or document))


@pytest.fixture(scope="module")
def built(base_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished index; a test that changes it takes a copy."""
    loaded = load(ModelSpec(str(base_folder), str(adapter_folder), dtype="float64", device="cpu"))
    folder = tmp_path_factory.mktemp("index") / "index"
    build(loaded, folder)
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


# round trip


def test_round_trip(tiny_loaded: Loaded, built: Path) -> None:
    examples = make_examples(ROWS)
    index = open_index(built)
    assert len(index) == ROWS
    assert index.rows.examples == tuple(examples)
    assert index.rows.ids == tuple(example.id for example in examples)
    assert index.rows.labels == tuple(example.label for example in examples)
    encoded = Encoder(tiny_loaded.tokenizer).encode_all(examples)[0]
    for ours, theirs in zip(index.rows.encoded, encoded, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.weights.tolist() == theirs.weights.tolist()
        assert ours.prompt_length == theirs.prompt_length
    found = index.features(examples)[0]
    whole = index.gradients(slice(None))
    assert whole.dtype == torch.float64
    assert relative_error(whole, found.gradients) < 1e-6  # transformers' norms round to float32 inside
    assert relative_error(index.losses, found.losses) < 1e-6
    for name, rows in found.representations.items():
        assert relative_error(index.representation(Representation.parse(name)), rows) < 1e-6
    for block in index.blocks:
        part = index.gradients(block.columns)
        assert torch.equal(part, whole[:, block.columns])
        assert part.shape == (ROWS, block.size)


@pytest.mark.parametrize(
    "chosen",
    [
        slice(0, 1),
        slice(3, 5),
        slice(2, 19),
        slice(22, 23),
        slice(0, 23),
        slice(None, 7),
        slice(-4, None),
        slice(5, 99),
    ],
)
def test_rows_across_shards(built: Path, chosen: slice) -> None:
    index = open_index(built)
    columns = index.blocks[1].columns
    assert torch.equal(index.gradients(columns, chosen), index.gradients(columns)[chosen])


def test_what_examples_carry_survives(tiny_loaded: Loaded, tmp_path: Path) -> None:
    examples = [
        replace(
            conversation("a", "b", "naïve 漢字 🙂\n", " d ", id="one", system="s"),
            metadata={"n": 1.5, "deep": {"x": [None, True]}},
        ),
        Example.from_prompt("p", "r", id="two", label="", metadata={"ключ": "значение"}),
        Example.from_prompt("p", "r2", id='naïve/../id "quoted"', label=None),
    ]
    assert open_index(build(tiny_loaded, tmp_path / "i", examples).folder).rows.examples == tuple(examples)


def test_no_pickle_and_nothing_else(built: Path) -> None:
    assert {Path(name).suffix for name in files(built)} <= {".json", ".parquet", ".safetensors", ".md"}
    assert sorted(name for name in files(built) if name.startswith("shards")) == [
        f"shards/{start:09d}.safetensors" for start in range(0, ROWS, PER_SHARD)
    ]
    assert {path.name for path in built.rglob(".*")} <= {".lock"}  # no half-written file


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: with_lora(make_llama()), {}),
        (lambda: with_lora(make_gpt2(), ["c_attn"], fan_in_fan_out=True), {}),
        (lambda: make_llama(), {"modules": ["down_proj", "lm_head"]}),
        (lambda: with_lora(make_llama()), {"modules": [r"layers\.1\.mlp"]}),
    ],
)
def test_shards_and_batches_leave_the_numbers_alone(model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    loaded = in_memory(model())
    wanted = [Representation(-1, "mean-response"), Representation(1, "last-token")]
    one = build(loaded, tmp_path / "one", rows_per_shard=None, representations=wanted, **options)
    for i, (per_shard, budget) in enumerate([(1, 2048), (5, 1), (7, 300), (23, 100_000)]):
        other = build(
            loaded, tmp_path / str(i), rows_per_shard=per_shard, batch_tokens=budget, representations=wanted, **options
        )
        assert len(other.manifest.shards) == -(-ROWS // per_shard)
        assert relative_error(other.gradients(slice(None)), one.gradients(slice(None))) < 1e-10
        assert relative_error(other.losses, one.losses) < 1e-10
        for each in wanted:
            assert relative_error(other.representation(each), one.representation(each)) < 1e-10


def test_representations(tiny_loaded: Loaded, tmp_path: Path) -> None:
    index = build(tiny_loaded, tmp_path / "i", representations=[Representation(0), Representation(2, "last-token")])
    assert index.manifest.representations == ("last-prompt@-3", "last-token@-1")
    twice = [Representation(-1), Representation(2), Representation(0.75, "mean-response")]
    assert build(tiny_loaded, tmp_path / "t", representations=twice).manifest.representations == (
        "last-prompt@-1",
        "mean-response@-2",
    )
    assert index.representation(Representation(-3)).shape == (ROWS, 16)
    with pytest.raises(
        FinetraceError, match=r"does not hold the representation last-prompt@-2; it holds last-prompt@-3, "
    ):
        index.representation(Representation(1))
    with pytest.raises(FinetraceError, match="the model has layers 0"):
        index.representation(Representation(3))


# the same bytes, however it came about


def test_the_same_bytes_twice(tiny_loaded: Loaded, built: Path, tmp_path: Path) -> None:
    build(tiny_loaded, tmp_path / "again")
    assert files(tmp_path / "again") == files(built)


def stopped(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], shards: int) -> None:
    """`work`, interrupted after so many shards."""
    collect, calls = Collector.collect, []

    def stopping(self: Collector, *args: Any, **options: Any) -> Any:
        if len(calls) == shards:
            raise KeyboardInterrupt
        calls.append(1)
        return collect(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", stopping)
        with pytest.raises(KeyboardInterrupt):
            work()


@pytest.mark.parametrize("after", range(SHARDS))
def test_interrupted_and_resumed(
    tiny_loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder = tmp_path / "i"
    stopped(monkeypatch, lambda: build(tiny_loaded, folder), after)
    with pytest.raises(
        FinetraceError, match=rf"unfinished \({after * PER_SHARD} of {ROWS} rows\); run finetrace index again"
    ):
        open_index(folder)
    build(tiny_loaded, folder)
    assert files(folder) == files(built)


@pytest.mark.parametrize(
    "moment", ["manifest", "rows", "adapter", "adapter half", "shard half", "shard not noted", "not folded"]
)
def test_killed_at_any_moment(
    tiny_loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What a kill leaves on disk at the awkward moments; nothing that a handler could have tidied up."""
    folder = tmp_path / "i"
    from finetrace.index import notes, rows, shards, starting

    def die(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    def half(model: Any, target: Path) -> None:
        target.mkdir()
        (target / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "manifest":
            folder.mkdir()
            (folder / ".manifest.json.part").write_text("{")
        elif moment == "rows":
            patch.setattr(rows, "write", die)
        elif moment == "adapter":
            patch.setattr(starting, "save_adapter", die)
        elif moment == "adapter half":
            patch.setattr(starting, "save_adapter", half)
        elif moment == "shard half":
            patch.setattr(shards, "write", die)
        else:
            patch.setattr(notes.Notes, "add" if moment == "shard not noted" else "fold", die)
        if moment != "manifest":
            with pytest.raises(KeyboardInterrupt):
                build(tiny_loaded, folder)
    if moment == "shard half":
        (folder / "shards").mkdir()
        (folder / "shards" / ".000000000.safetensors.part").write_bytes(b"half")
    if moment == "not folded":  # the journal alone says that all shards are there
        assert open_index(folder).manifest == open_index(built).manifest
    else:
        with pytest.raises(FinetraceError):
            open_index(folder)
    build(tiny_loaded, folder)
    assert files(folder) == files(built)


BUILDER = """
import sys
sys.path.insert(0, {tests!r})
from test_index import build, load, ModelSpec, Path
build(load(ModelSpec({base!r}, {adapter!r}, dtype="float64", device="cpu")), Path({folder!r}), rows_per_shard={per_shard})
"""

SLOWLY = """
import time
from finetrace.index import shards
write = shards.write
shards.write = lambda *all: (time.sleep(0.4), write(*all))[1]
"""


@pytest.mark.slow
def test_killed_for_real(base_folder: Path, adapter_folder: Path, tiny_loaded: Loaded, tmp_path: Path) -> None:
    """kill -9 in the middle, another process (another hash seed) goes on, and the bytes are those of one go."""
    folder = tmp_path / "killed"
    script = BUILDER.format(
        tests=str(Path(__file__).parent),
        base=str(base_folder),
        adapter=str(adapter_folder),
        folder=str(folder),
        per_shard=1,
    )
    slowed = script.replace("build(", SLOWLY + "build(", 1)
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    process = subprocess.Popen([sys.executable, "-c", slowed], env=environment)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(list((folder / "shards").glob("0*"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list((folder / "shards").glob("0*"))) < ROWS
    with pytest.raises(FinetraceError, match="unfinished"):
        open_index(folder)
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "2"})
    build(tiny_loaded, tmp_path / "whole", rows_per_shard=1)
    assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize("lost", [[0], [2], [SHARDS - 1], [1, 2], list(range(SHARDS))])
@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
def test_only_what_is_lost_is_computed_anew(
    tiny_loaded: Loaded, built: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int], how: str
) -> None:
    for k in lost:
        damage(copied / "shards" / f"{k * PER_SHARD:09d}.safetensors", how)
    starts, collect = [], Collector.collect

    def counting(self: Collector, items: Any, ids: Any, *rest: Any, **options: Any) -> Any:
        starts.append(ids[0])
        return collect(self, items, ids, *rest, **options)

    monkeypatch.setattr(Collector, "collect", counting)
    build(tiny_loaded, copied)
    assert starts == [f"e{k * PER_SHARD}" for k in lost]
    assert files(copied) == files(built)


def test_a_gap_in_the_middle_is_never_a_whole_index(
    tiny_loaded: Loaded, built: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two middle shards are lost, the repair is interrupted after the first: the last row is there, row 9 is not."""
    for k in (1, 2):
        damage(copied / "shards" / f"{k * PER_SHARD:09d}.safetensors", "missing")
    calls, collect = [], Collector.collect

    def stopping(self: Collector, *args: Any, **options: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return collect(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_loaded, copied)
    with pytest.raises(FinetraceError, match=rf"unfinished \({ROWS - PER_SHARD} of {ROWS} rows\)"):
        open_index(copied)
    build(tiny_loaded, copied)
    assert files(copied) == files(built)


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))


# opened elsewhere

ASKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from finetrace.index import open_index
from tiny import make_examples
index = open_index({folder!r})
features, _ = index.features(make_examples(3, seed=9))
from safetensors.torch import save_file
tensors = {{"gradients": features.gradients, "losses": features.losses, "rows": index.gradients(slice(None))}}
save_file(tensors, {out!r}, {{"ids": " ".join(index.rows.ids)}})
"""


def test_a_fresh_process_asks_without_data_or_adapter(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model was named by a relative path, the adapter's folder is gone, and the index was moved."""
    adapter = tmp_path / "adapter"
    with_lora(make_llama()).save_pretrained(adapter)
    monkeypatch.chdir(base_folder.parent)
    loaded = load(ModelSpec(base_folder.name, str(adapter), dtype="float64", device="cpu"))
    built_index = build(loaded, tmp_path / "i")
    expected = built_index.features(make_examples(3, seed=9))[0]
    shutil.rmtree(adapter)
    moved = tmp_path / "elsewhere" / "index"
    moved.parent.mkdir()
    (tmp_path / "i").rename(moved)
    script = ASKER.format(tests=str(Path(__file__).parent), folder=str(moved), out=str(tmp_path / "out.safetensors"))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    with safe_open(str(tmp_path / "out.safetensors"), "pt") as file:
        gradients, losses, rows = (file.get_tensor(name) for name in ("gradients", "losses", "rows"))
        ids = file.metadata()["ids"].split()
    assert torch.allclose(gradients, expected.gradients, rtol=1e-9, atol=1e-12)
    assert torch.allclose(losses, expected.losses, rtol=1e-9)
    assert rows.shape[0] == ROWS
    assert ids == [f"e{i}" for i in range(ROWS)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_precision_is_the_same_model(copied: Path, dtype: Any) -> None:
    index = open_index(copied)
    features = index.model(dtype) and index.features(make_examples(2))[0]
    assert features.gradients.dtype == torch.float64  # as those of the index, with which they are multiplied
    cosine = torch.nn.functional.cosine_similarity(
        features.gradients.double(), index.gradients(slice(None), slice(0, 2))
    )
    assert cosine.min() > 0.9


def test_an_adapter_of_another_name(base_folder: Path, tmp_path: Path) -> None:
    loaded = load(ModelSpec(str(base_folder), dtype="float64", device="cpu"))
    model = with_lora(loaded.model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    loaded.model = model
    index = build(loaded, tmp_path / "i")
    assert index.manifest.model.adapter == "adapter/second"
    expected = index.features(make_examples(2))[0]
    found = open_index(tmp_path / "i").features(make_examples(2))[0]
    assert relative_error(found.gradients, expected.gradients) < 1e-9
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(FinetraceError, match=r"2 active adapters \(default, second\)"):
        build(loaded, tmp_path / "two")


def test_a_query_too_long_is_told(built: Path) -> None:
    long = Example.from_prompt("q", "x" * 600, id="long")
    assert [item.id for item in open_index(built).features([long, *make_examples(1)])[1].longer] == ["long"]


def test_queries_that_cannot_be_asked(built: Path) -> None:
    index = open_index(built)
    with pytest.raises(FinetraceError, match="no example"):
        index.features([])
    with pytest.raises(FinetraceError, match=r"example q: .*not an assistant's; give it a response"):
        index.features([Example.from_prompt("q", id="q")])


# refused


def test_nothing_to_index(tiny_loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match="nothing to index"):
        build(tiny_loaded, tmp_path / "i", [])
    examples = make_examples(4)
    with pytest.raises(FinetraceError, match="rows 2 and 5 have the same id 'e1'"):
        build(tiny_loaded, tmp_path / "i", [*examples, examples[1]])
    assert not (tmp_path / "i").exists()


def other_adapter(loaded: Loaded) -> Loaded:
    return replace(loaded, model=with_lora(loaded.model.unload(), seed=5))


def nudged(loaded: Loaded) -> Loaded:
    with torch.no_grad():
        loaded.model.get_base_model().model.layers[1].mlp.up_proj.weight[0, 0] += 1
    return loaded


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda loaded: (other_adapter(loaded), {}), "adapter"),
        (lambda loaded: (nudged(loaded), {}), "base model"),
        (
            lambda loaded: (replace(loaded, model=loaded.model.merge_and_unload()), {"modules": ["q_proj"]}),
            "base model|adapter",
        ),
        (lambda loaded: (loaded, {"examples": make_examples(ROWS, seed=1)}), "data set or encoding"),
        (lambda loaded: (loaded, {"examples": make_examples(ROWS)[::-1]}), "data set or encoding"),
        (lambda loaded: (loaded, {"examples": make_examples(ROWS - 1)}), "data set or encoding"),
        (lambda loaded: (loaded, {"encoder": Encoder(loaded.tokenizer, "all")}), "data set or encoding"),
        (
            lambda loaded: (loaded, {"encoder": Encoder(loaded.tokenizer, template=CHATML + "{# other #}")}),
            "tokenizer or chat template",
        ),
        (lambda loaded: (loaded, {"rows_per_shard": 5}), r"rows_per_shard \(4, not 5\)"),
        (lambda loaded: (loaded, {"batch_tokens": 100}), r"batch_tokens \(\d+, not 100\)"),
        (lambda loaded: (loaded, {"modules": ["q_proj"]}), r"blocks|modules"),
        (
            lambda loaded: (loaded, {"representations": [Representation()]}),
            r"set of hidden states \(.+, not last-prompt@-1\)",
        ),
    ],
)
def test_another_index_is_there(tiny_loaded: Loaded, built: Path, copied: Path, change: Any, what: str) -> None:
    loaded, options = change(tiny_loaded)
    with pytest.raises(FinetraceError, match=rf"an index of another ({what}).* is there; choose another --out"):
        build(loaded, copied, **options)
    assert files(copied) == files(built)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_adapter, "adapter"),
        (nudged, "base model"),
        (lambda loaded: replace(loaded, tokenizer=make_tokenizer(PLAIN_TEMPLATE)), "tokenizer or chat template"),
        (lambda loaded: replace(loaded, model=loaded.model.unload()), "adapter"),
    ],
)
def test_another_model_is_given(tiny_loaded: Loaded, built: Path, change: Any, what: str) -> None:
    index = open_index(built, change(tiny_loaded))
    with pytest.raises(FinetraceError, match=rf"built with another {what} \(fingerprint \w+, this one has \w+\)"):
        index.features(make_examples(1))


def test_something_else_is_there(tiny_loaded: Loaded, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(FinetraceError, match="mine: there is something else already; choose another --out"):
        build(tiny_loaded, folder)
    assert files(folder) == {"thesis.txt": b"years of work"}
    with pytest.raises(FinetraceError, match=r"thesis.txt: there is something else already"):
        build(tiny_loaded, folder / "thesis.txt")
    with pytest.raises(FinetraceError, match=r"thesis.txt.i: cannot be written"):
        build(tiny_loaded, folder / "thesis.txt" / "i")


def test_no_index(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            FinetraceError, match=r"no index there \(no manifest.json\); build one with finetrace index"
        ):
            open_index(folder)


def test_labels_may_change(tiny_loaded: Loaded, built: Path, copied: Path) -> None:
    """They decide no gradient: the examples are written anew and the shards stay."""
    examples = [replace(example, label="new", metadata={"k": 1}) for example in make_examples(ROWS)]
    assert build(tiny_loaded, copied, examples).rows.examples == tuple(examples)
    assert {n: c for n, c in files(copied).items() if "examples" not in n} == {
        n: c for n, c in files(built).items() if "examples" not in n
    }


@pytest.mark.parametrize("how", ["missing", "flipped", "cut"])
def test_a_damaged_shard_is_named(copied: Path, how: str) -> None:
    damage(copied / "shards" / "000000008.safetensors", how)
    index = open_index(copied)
    index.gradients(slice(None), slice(0, 8))
    sentence = r"shards.000000008.safetensors: this shard is (missing|broken).* rows 9 to 12 anew"
    for read in (
        lambda: index.gradients(slice(0, 3)),
        lambda: index.losses,
        lambda: index.representation(Representation()),
        lambda: index.gradients(slice(None), slice(11, 12)),
    ):
        with pytest.raises(FinetraceError, match=sentence):
            read()


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_damaged_examples_are_noticed_and_mended(tiny_loaded: Loaded, built: Path, copied: Path, where: float) -> None:
    path = copied / "examples.parquet"
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 16
    path.write_bytes(bytes(content))
    try:
        same = open_index(copied).rows.examples == open_index(built).rows.examples
    except FinetraceError as error:
        assert "examples.parquet: cannot be read" in str(error) or "not the examples" in str(error)  # noqa: PT017
        build(tiny_loaded, copied)
        assert files(copied) == files(built)
    else:
        assert same  # a bit that carries nothing


@pytest.mark.parametrize("column", ["id", "label", "response", "messages", "metadata", "input_ids.list.element"])
def test_a_bit_flipped_in_a_column_is_noticed(copied: Path, column: str) -> None:
    """Text and labels decide no gradient, so no fingerprint knows them: the page's own checksum does."""
    path = copied / "examples.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
    content = bytearray(path.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(FinetraceError, match=r"examples.parquet: cannot be read \(.*\); run finetrace index again"):
        _ = open_index(copied).rows


def test_examples_of_another_index_are_noticed(tiny_loaded: Loaded, copied: Path, tmp_path: Path) -> None:
    build(tiny_loaded, tmp_path / "other", make_examples(ROWS, seed=3))
    shutil.copy(tmp_path / "other" / "examples.parquet", copied)
    with pytest.raises(FinetraceError, match=r"examples.parquet: these are not the examples the index was built from"):
        _ = open_index(copied).rows
    (copied / "examples.parquet").unlink()
    with pytest.raises(FinetraceError, match=r"examples.parquet: cannot be read"):
        _ = open_index(copied).rows


def shard_file(name: Any) -> Any:
    def change(document: Any) -> None:
        document["shards"][1]["file"] = name

    return change


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a/b.safetensors", "./000000004.safetensors"])
def test_a_manifest_that_leaves_its_folder(copied: Path, name: str) -> None:
    edit_manifest(copied, shard_file(name))
    with pytest.raises(FinetraceError, match=r"manifest.json: shard file .* leaves the index folder"):
        open_index(copied)


def test_a_manifest_whose_adapter_leaves_its_folder(copied: Path, adapter_folder: Path) -> None:
    for name in ("../adapter", str(adapter_folder)):
        edit_manifest(copied, lambda document, name=name: document["model"].update(adapter=name))
        with pytest.raises(FinetraceError, match=r"the manifest's path .* leaves the index folder; it is not followed"):
            open_index(copied).features(make_examples(1))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b'{"format": 1, "shards": "x"}'],
)
def test_a_broken_manifest(tiny_loaded: Loaded, copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    for use in (lambda: open_index(copied), lambda: build(tiny_loaded, copied)):
        with pytest.raises(FinetraceError, match=r"manifest.json: not a readable manifest .*; build the index again"):
            use()


@pytest.mark.parametrize("number", [0, 2, 99, None, "1"])
def test_another_format(copied: Path, number: Any) -> None:
    edit_manifest(copied, lambda document: document.update(format=number))
    with pytest.raises(FinetraceError, match=rf"index format {number}, this finetrace reads format {manifests.FORMAT}"):
        open_index(copied)


def test_unknown_and_missing_fields(copied: Path) -> None:
    edit_manifest(copied, lambda document: document.update(surprise=1))
    with pytest.raises(FinetraceError, match="not a readable manifest"):
        open_index(copied)


def test_shards_that_do_not_cover_the_rows(copied: Path) -> None:
    edit_manifest(copied, lambda document: document["shards"].__delitem__(2))
    with pytest.raises(FinetraceError, match="unfinished"):
        open_index(copied)


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 600 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 4, 40, 100, 150])
def test_a_full_disk(tiny_loaded: Loaded, small_disk: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """The disk fills while the index is being written, at one file or another."""
    monkeypatch.setattr(
        "finetrace.index.starting.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10**12)
    )
    folder = small_disk / "i"
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(1024 * (600 - 4 - left) // 4096 * 4096))
    examples = make_examples(100)
    with pytest.raises(FinetraceError, match=r"cannot be written .*[Nn]o space.*; free some space"):
        build(tiny_loaded, folder, examples)
    assert not list(small_disk.rglob("*.part"))
    with pytest.raises(FinetraceError, match=r"unfinished|no index there"):
        open_index(folder)


def test_a_full_disk_is_freed_and_the_run_goes_on(
    tiny_loaded: Loaded, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "finetrace.index.starting.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10**12)
    )
    (small_disk / "ballast").write_bytes(bytes(520 * 1024))
    with pytest.raises(FinetraceError, match="cannot be written"):
        build(tiny_loaded, small_disk / "i")
    (small_disk / "ballast").unlink()
    build(tiny_loaded, small_disk / "i")
    build(tiny_loaded, tmp_path / "i")
    assert files(small_disk / "i") == files(tmp_path / "i")


def test_too_small_a_disk_is_refused_beforehand(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "finetrace.index.starting.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1000)
    )
    with pytest.raises(FinetraceError, match=r"the index needs 0.00 GB and the disk has 0.00 GB free"):
        build(tiny_loaded, tmp_path / "i")
    assert files(tmp_path / "i") == {}


def test_what_training_moved_and_the_index_does_not_see(tmp_path: Path) -> None:
    """Built from the model in memory or from the same one loaded, the manifest names the same weights."""
    base = save_base(tmp_path / "base", make_llama())
    model = with_lora(load(ModelSpec(str(base), dtype="float64", device="cpu")).model, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    one = build(in_memory(model, str(base)), tmp_path / "one")
    loaded = load(ModelSpec(str(base), str(tmp_path / "adapter"), dtype="float64", device="cpu"))
    assert list(one.manifest.skipped) == ["lm_head.modules_to_save.default.weight"]
    assert build(loaded, tmp_path / "two").manifest.skipped == one.manifest.skipped
    assert (
        relative_error(
            open_index(tmp_path / "one").features(make_examples(2))[0].gradients,
            one.gradients(slice(None), slice(0, 2)),
        )
        < 1e-6
    )


def test_a_model_that_is_loaded_is_not_taken_for_another(built: Path) -> None:
    index = open_index(built)
    loaded = index.model("float64", "cpu")
    assert index.model() is loaded
    assert index.model("auto") is loaded
    with pytest.raises(
        FinetraceError, match="its model is loaded already, in float64; open the index again for float32"
    ):
        index.model("float32")
