"""Rows added to an index: equal to one built at once, whole or not there at all, whenever the process is killed."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import killed
from commands import run
from finetrace.collection import Representation
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import Index, append, build_index, factors, kronecker_factors, open_index, view
from finetrace.index.cache import Cache
from finetrace.index.checking import repair, verify
from finetrace.models import Loaded, ModelSpec, load
from finetrace.reading import write_examples
from finetrace.reporting.validated import keep_verdict, kept_verdict
from test_bad_rows import poisoned
from test_index import edit_manifest, files
from tiny import make_examples, make_llama, make_tokenizer, relative_error, save_base, with_lora

PER_SHARD = 4
KINDS = (Representation(), Representation(-2, "mean-response"))


def built(loaded: Loaded, folder: Path, examples: list[Example], **options: Any) -> Index:
    settings = {"rows_per_shard": PER_SHARD, "representations": KINDS} | options
    return build_index(loaded, examples, folder, Encoder(loaded.tokenizer), **settings)[0]


def assert_equal(found: Index, expected: Index, tolerance: float) -> None:
    """All that an index gives, and what its manifest says but how the shards are cut."""
    assert found.rows.examples == expected.rows.examples
    for ours, theirs in zip(found.rows.encoded, expected.rows.encoded, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
    pairs = [(found.gradients(slice(None)), expected.gradients(slice(None))), (found.losses, expected.losses)]
    pairs += [(found.representation(each), expected.representation(each)) for each in KINDS]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) if tolerance == 0 else relative_error(ours, theirs) < tolerance
    for name in ("examples", "tokens", "data_fingerprint", "blocks", "model", "encoding", "left_out"):
        assert getattr(found.manifest, name) == getattr(expected.manifest, name)


@pytest.mark.parametrize(("old", "middle", "tolerance"), [(8, 12, 0), (6, 13, 1e-6)])
def test_the_values_of_an_index_built_at_once(
    tiny_loaded: Loaded, tmp_path: Path, old: int, middle: int, tolerance: float
) -> None:
    """Bit by bit where the old rows fill their shards; 6 rows leave one half full, which is not touched."""
    examples = make_examples(17)
    expected = built(tiny_loaded, tmp_path / "e", examples)
    first = built(tiny_loaded, tmp_path / "i", examples[:old])
    before = files(tmp_path / "i")
    grown, _ = append(first, examples[old:middle])
    grown, _ = append(grown, examples[middle:])
    assert_equal(grown, expected, tolerance)
    assert [shard.start for shard in grown.manifest.shards] == [
        *range(0, old, 4),
        *range(old, middle, 4),
        *range(middle, 17, 4),
    ]
    after = files(tmp_path / "i")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert set(after) - set(before) == {
        *(f"shards/{start:09d}.safetensors" for start in [*range(old, middle, 4), *range(middle, 17, 4)]),
        f"examples-{old:09d}.parquet",
        f"examples-{middle:09d}.parquet",
    }
    assert verify(tmp_path / "i") == []
    for labels in ("model", "data"):
        ours, theirs = kronecker_factors(grown, labels), kronecker_factors(expected, labels)
        for block in grown.blocks:
            assert torch.allclose(ours[block.name].ekfac, theirs[block.name].ekfac, rtol=1e-5, atol=1e-12)


def test_factors_and_views_of_the_old_rows_go_with_a_word(tiny_loaded: Loaded, tmp_path: Path) -> None:
    examples = make_examples(11)
    first = built(tiny_loaded, tmp_path / "i", examples[:6], kronecker="data")
    view(first, "all")
    said: list[str] = []
    grown, _ = append(first, examples[6:], say=said.append)
    assert any("data.safetensors: removed; fitted on all rows" in each for each in said)
    assert any("all: removed; collected for all rows" in each for each in said)
    assert not factors.there(grown.folder, "data")
    assert len(view(grown, "all")) == 11
    expected = built(tiny_loaded, tmp_path / "e", examples)
    ours, theirs = kronecker_factors(grown, "data"), kronecker_factors(expected, "data")
    for block in grown.blocks:
        assert torch.allclose(ours[block.name].kfac, theirs[block.name].kfac, rtol=1e-6, atol=1e-14)


def test_a_view_goes_though_another_process_keeps_something_beside_it(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(8)
    index = built(tiny_loaded, tmp_path / "i", examples[:6])
    asked = view(index, "all")
    cache, remove, times = Cache(asked.folder, asked.manifest), os.rmdir, iter(range(100))

    def slowly(*given: Any, **named: Any) -> None:
        """A trace comes to write what it has computed before each folder goes."""
        cache.fetch(f"late-{next(times)}", (), lambda: torch.ones(3))
        remove(*given, **named)

    cache.fetch("early", (), lambda: torch.ones(3))
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", slowly)
        grown, _ = append(index, examples[6:])
    assert len(grown) == 8
    assert not asked.folder.exists()
    assert not (grown.folder / "append").exists()
    assert verify(grown.folder) == []
    assert len(view(grown, "all")) == 8
    assert {path.name for path in grown.folder.glob(".*")} <= {".lock"}


def test_a_view_that_cannot_be_removed_is_said_in_words_and_gone_the_next_time(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(8)
    index = built(tiny_loaded, tmp_path / "i", examples[:6])
    view(index, "all")

    def refused(*given: Any, **named: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch, pytest.raises(FinetraceError, match="this view cannot be removed"):
        patch.setattr(Path, "rename", refused)
        append(index, examples[6:])
    said: list[str] = []
    grown, _ = append(open_index(index.folder, tiny_loaded), examples[6:], say=said.append)
    assert "these 2 rows were appended before; nothing is to be done." in said
    assert len(grown) == 8
    assert len(view(grown, "all")) == 8


def test_rows_that_are_all_left_out_stand_in_nobodys_way(tmp_path: Path) -> None:
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    save_base(tmp_path / "base", poisoned(token, float("nan")))
    with_lora(make_llama()).save_pretrained(tmp_path / "adapter")
    loaded = load(ModelSpec(str(tmp_path / "base"), str(tmp_path / "adapter"), dtype="float64", device="cpu"))
    index = built(loaded, tmp_path / "i", make_examples(6))
    before = files(index.folder)
    for _ in range(2):
        with pytest.raises(FinetraceError, match="the values of all 2 new rows are not finite, so none is added"):
            append(index, [Example.from_prompt("a", f"b{i} ~", id=f"bad{i}") for i in range(2)], skip_bad=True)
        assert files(index.folder) == before
    grown, _ = append(index, make_examples(8)[6:])
    assert len(grown) == 8
    assert verify(grown.folder) == []


def test_what_retraining_said_of_the_old_rows_is_not_said_of_all(tiny_loaded: Loaded, tmp_path: Path) -> None:
    index = built(tiny_loaded, tmp_path / "i", make_examples(6))
    keep_verdict(index.folder, ["One.", "Two."], "finetrace validate")
    assert kept_verdict(index.folder) == "Validated by retraining. One. Two."
    append(index, make_examples(8)[6:])
    assert kept_verdict(index.folder) == "Validated by retraining, before the rows of the index changed. One. Two."


def test_a_broken_file_of_an_appended_index_is_mended(tiny_loaded: Loaded, tmp_path: Path) -> None:
    examples = make_examples(13)
    append(built(tiny_loaded, tmp_path / "i", examples[:6]), examples[6:])
    before = files(tmp_path / "i")
    for start in (4, 6, 10):
        (tmp_path / "i" / "shards" / f"{start:09d}.safetensors").unlink()
    assert [each.path.name[:9] for each in verify(tmp_path / "i")] == ["000000004", "000000006", "000000010"]
    assert repair(tmp_path / "i") == []
    assert files(tmp_path / "i") == before
    (tmp_path / "i" / "examples-000000006.parquet").write_bytes(b"nothing")
    (tmp_path / "i" / "shards" / "000000010.safetensors").unlink()
    assert [each.path.name for each in verify(tmp_path / "i") if each.kind == "examples"] == [
        "examples-000000006.parquet"
    ]
    built(tiny_loaded, tmp_path / "i", examples)  # with all rows in one, as the sentence says
    assert files(tmp_path / "i") == before
    relabelled = [replace(each, label="new") for each in examples]
    assert set(built(tiny_loaded, tmp_path / "i", relabelled).rows.labels) == {"new"}


def test_what_is_refused(tiny_loaded: Loaded, tmp_path: Path) -> None:
    examples = make_examples(10)
    first = built(tiny_loaded, tmp_path / "i", examples[:6])
    before = files(tmp_path / "i")
    with pytest.raises(FinetraceError, match=r"holds 2 of these 6 ids already, the first 'e4'; .*--skip-known"):
        append(first, examples[4:])
    with pytest.raises(FinetraceError, match="have the same id 'e7'"):
        append(first, [examples[7], examples[7]])
    assert files(tmp_path / "i") == before
    said: list[str] = []
    grown, _ = append(first, examples[4:], skip_known=True, say=said.append)
    assert said == ["2 of 6 rows are left out, since the index holds their ids; the first is 'e4'."]
    assert grown.rows.ids == tuple(f"e{i}" for i in range(10))
    whole = files(tmp_path / "i")
    for given in ({"examples": examples[6:]}, {"examples": examples[4:], "skip_known": True}):
        again, _ = append(open_index(tmp_path / "i", tiny_loaded), say=said.append, **given)
        assert said[-1].endswith("nothing is to be done.")
        assert len(again) == 10
    with pytest.raises(FinetraceError, match="changed this index meanwhile"):
        append(first, make_examples(12)[10:])
    assert files(tmp_path / "i") == whole
    edit_manifest(tmp_path / "i", lambda about: about["appended"][0].update(examples="../x.parquet"))
    with pytest.raises(FinetraceError, match=r"examples file '../x.parquet' leaves the index folder"):
        open_index(tmp_path / "i")


def test_another_append_is_under_way(tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(12)
    first = built(tiny_loaded, tmp_path / "i", examples[:6])

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetrace.index.appending._take_over", die)
        with pytest.raises(KeyboardInterrupt):
            append(first, examples[6:9])
    assert len(open_index(tmp_path / "i")) == 6
    with pytest.raises(FinetraceError, match="an append of other rows was begun and is not finished"):
        append(first, examples[9:])
    assert len(append(first, examples[6:9])[0]) == 9


def test_rows_that_are_not_finite_are_left_out_or_stop_it(tmp_path: Path, capsys: Any) -> None:
    """By the command, which takes the model and all settings from the index."""
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    save_base(tmp_path / "base", poisoned(token, float("nan")))
    with_lora(make_llama()).save_pretrained(tmp_path / "adapter")
    examples = make_examples(9)
    examples[1], examples[7] = (Example.from_prompt("~", "~", id=f"e{i}") for i in (1, 7))
    for name, part in (("old", examples[:5]), ("new", examples[5:]), ("all", examples)):
        write_examples(tmp_path / f"{name}.jsonl", part)
    here = ["--model", tmp_path / "base", "--adapter", tmp_path / "adapter", "--dtype", "float64", "--skip-bad"]
    assert run(capsys, "index", tmp_path / "old.jsonl", "--out", tmp_path / "i", *here)[0] == 0
    assert run(capsys, "index", tmp_path / "all.jsonl", "--out", tmp_path / "e", *here)[0] == 0
    shutil.rmtree(tmp_path / "adapter")  # the index has its own
    command = ["index", "append", tmp_path / "new.jsonl", "--index", tmp_path / "i"]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "example e7 (row 3): its loss is not finite" in err
    code, out, err = run(capsys, *command, "--skip-bad")
    assert code == 0, err
    assert "3 examples added, 7 in all" in out
    found, expected = open_index(tmp_path / "i"), open_index(tmp_path / "e")
    assert found.manifest.left_out == expected.manifest.left_out
    assert found.rows.ids == ("e0", "e2", "e3", "e4", "e5", "e6", "e8")
    assert relative_error(found.gradients(slice(None)), expected.gradients(slice(None))) < 1e-6
    code, _, err = run(capsys, *command, "--skip-bad")
    assert code == 0
    assert "nothing is to be done" in err


# killed


def appending(folder: str, base: str, adapter: str, rows: int) -> None:
    """What `finetrace index append` does."""
    loaded = load(ModelSpec(base, adapter, dtype="float64", device="cpu"))
    append(Index(Path(folder), loaded), make_examples(rows)[6:])


@pytest.fixture
def old(tiny_loaded: Loaded, tmp_path: Path) -> Path:
    """An index of six rows, with factors and a view."""
    index = built(tiny_loaded, tmp_path / "old", make_examples(6), kronecker="data")
    view(index, "all")
    return index.folder


def assert_old_or_new(folder: Path, before: Path, rows: int) -> None:
    """Whatever a kill left behind answers as the old index or as the new one."""
    index = open_index(folder)
    assert len(index.rows) == len(index) == len(index.gradients(slice(0, 1)))
    if len(index) == 6:
        assert torch.equal(index.gradients(slice(None)), open_index(before).gradients(slice(None)))
        assert verify(folder) == []
    else:
        assert index.rows.ids == tuple(f"e{i}" for i in range(rows))


def test_killed_at_random_moments(base_folder: Path, adapter_folder: Path, tmp_path: Path, old: Path) -> None:
    given: dict[str, Any] = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 19}
    shutil.copytree(old, tmp_path / "whole")
    finished, steps, _ = killed.run(appending, tmp_path / "whole", **given)
    assert finished
    expected = files(tmp_path / "whole")
    draw = random.Random(3)
    for step in [*draw.sample(range(steps - 2), 6), steps - 2, steps - 1]:
        folder = tmp_path / f"at-{step}"
        shutil.copytree(old, folder)
        assert not killed.run(appending, folder, die_at=step, **given)[0]
        assert_old_or_new(folder, old, 19)
        assert killed.run(appending, folder, **given)[0]
        assert files(folder) == expected, f"killed before step {step}"


@pytest.mark.slow
def test_killed_before_every_step(base_folder: Path, adapter_folder: Path, tmp_path: Path, old: Path) -> None:
    given: dict[str, Any] = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 11}
    shutil.copytree(old, tmp_path / "whole")
    _, steps, _ = killed.run(appending, tmp_path / "whole", **given)
    expected = files(tmp_path / "whole")
    for step in range(steps):
        folder = tmp_path / "i"
        shutil.copytree(old, folder)
        assert not killed.run(appending, folder, die_at=step, **given)[0]
        assert_old_or_new(folder, old, 11)
        assert killed.run(appending, folder, **given)[0]
        assert files(folder) == expected, f"killed before step {step}"
        shutil.rmtree(folder)
