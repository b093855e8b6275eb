"""An index that was moved, appended to behind one's back, or broken where nobody looked: named, and mended by what is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from finetrace.cli.validate import finetuning_of
from finetrace.collection import Collector, track
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.finetune_config import SAVED
from finetrace.index import Index, append, appending, build_index, kronecker_factors, notes, sizing, view
from finetrace.index import manifest as manifests
from finetrace.index.checking import repair, verify
from finetrace.models import Loaded, ModelSpec, load
from finetrace.planning import measure
from finetrace.planning.counts import Piece
from test_bad_rows import home as home
from test_bad_rows import loaded_from, rows
from tiny import make_examples, make_llama, save_base, with_lora

EXAMPLES = make_examples(14)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `adapter`."""
    folder = tmp_path_factory.mktemp("mended")
    save_base(folder / "base", make_llama())
    with_lora(make_llama()).save_pretrained(folder / "adapter")
    return folder


def model(place: Path) -> Loaded:
    return load(ModelSpec(str(place / "base"), str(place / "adapter"), dtype="float32", device="cpu"))


def build(loaded: Loaded, folder: Path, count: int = 14, **options: Any) -> Index:
    return build_index(loaded, EXAMPLES[:count], folder, Encoder(loaded.tokenizer), rows_per_shard=4, **options)[0]


def turn(path: Path, tensor: str = "gradients") -> None:
    """Another exponent for one number of a safetensors file."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])[tensor]["data_offsets"][0]
    content[8 + size + start + 3] ^= 0x08
    path.write_bytes(bytes(content))


def nudge(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on gradients come out a little longer, as on another machine."""
    really = Collector.collect

    def nudged(self: Any, *args: Any, **options: Any) -> Any:
        features = really(self, *args, **options)
        features.gradients.mul_(1 + 1e-4)
        return features

    monkeypatch.setattr(Collector, "collect", nudged)


@pytest.mark.parametrize("how", ["turned", "gone"])
def test_factors_are_not_fitted_on_a_broken_shard(how: str, place: Path, tmp_path: Path) -> None:
    build(model(place), tmp_path / "i")
    path = tmp_path / "i" / "shards" / "000000004.safetensors"
    turn(path) if how == "turned" else path.unlink()
    with pytest.raises(FinetraceError, match=r"000000004.safetensors: this shard is (broken|missing)"):
        kronecker_factors(Index(tmp_path / "i"), "data")
    assert not (tmp_path / "i" / "factors" / "data.json").exists()
    assert repair(tmp_path / "i") == []
    assert kronecker_factors(Index(tmp_path / "i"), "data")


def test_factors_go_where_a_broken_shard_comes_back_as_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = tmp_path / "i", []
    build(model(place), folder)
    kronecker_factors(Index(folder), "data")
    (folder / "shards" / "000000004.safetensors").unlink()
    build(model(place), folder, say=said.append)
    assert (folder / "factors" / "data.json").exists() and not said  # the same bytes
    (folder / "shards" / "000000004.safetensors").unlink()
    other = model(place)
    nudge(monkeypatch)
    build(other, folder, say=said.append)
    assert not (folder / "factors" / "data.json").exists()
    assert [text for text in said if "not bit by bit" in text]
    assert verify(folder) == []


def test_a_run_killed_between_two_broken_shards_leaves_word_of_the_second(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next run could not tell that it came back as another, and the factors would stay."""
    folder, said = tmp_path / "i", []
    build(model(place), folder)
    kronecker_factors(Index(folder), "data")
    for name in ("000000004", "000000008"):
        (folder / "shards" / f"{name}.safetensors").unlink()
    add = notes.Notes.add

    def killed(self: Any, arrival: Any) -> None:
        add(self, arrival)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(notes.Notes, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            build(model(place), folder)
    assert [each.file for each in manifests.read(folder).lost] == ["000000008.safetensors"]
    nudge(monkeypatch)
    build(model(place), folder, say=said.append)
    assert not (folder / "factors" / "data.json").exists()
    assert [text for text in said if "not bit by bit" in text]
    assert verify(folder) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_shard_whose_rows_are_all_left_out_may_be_narrow(dtype: str, home: Path, tmp_path: Path) -> None:
    loaded = loaded_from(home)
    options: dict[str, Any] = {"rows_per_shard": 4, "feature_dtype": dtype, "skip_bad": True}
    index = build_index(loaded, rows((8,), 9), tmp_path / "i", Encoder(loaded.tokenizer), **options)[0]
    assert len(index) == 8 and [each.row for each in index.manifest.left_out] == [8]
    grown, _ = append(index, rows((11,), 12)[9:], skip_bad=True)
    assert len(grown) == 10 and verify(tmp_path / "i") == []


def test_a_bad_row_does_not_stop_what_is_measured_beforehand(home: Path) -> None:
    loaded = loaded_from(home)
    encoded = Encoder(loaded.tokenizer).encode_all(rows((1,), 3))[0]
    collector = Collector(loaded.model, track(loaded.model))
    lengths = [len(each.ids) for each in encoded]
    piece = Piece((0, 1, 2), max(lengths), sum(lengths), 3)
    shape: Any = SimpleNamespace(collection=lambda *of: 1.0)
    assert measure.run(collector, encoded, piece, shape).seconds > 0


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("how", ["turned", "cut", "gone"])
def test_a_broken_adapter_is_written_again(name: str, how: str, place: Path, tmp_path: Path) -> None:
    loaded = model(place)
    build(loaded, tmp_path / "i")
    path = tmp_path / "i" / "adapter" / name
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "turned" and name.endswith(".safetensors"):
        with safe_open(str(path), framework="pt") as file:
            first = min(file.keys())
        turn(path, first)
    else:
        path.write_bytes(whole[: len(whole) // 2])
    assert [each.kind for each in verify(tmp_path / "i")] == ["adapter"]
    build(loaded, tmp_path / "i")
    assert path.read_bytes() == whole and verify(tmp_path / "i") == []


def test_examples_are_mended_with_the_adapter_that_the_index_keeps(place: Path, tmp_path: Path) -> None:
    """Its finetune.yaml is there already: the place that it is to be copied to."""
    adapter = shutil.copytree(place / "adapter", tmp_path / "adapter")
    (adapter / SAVED).write_text("epochs: 3\n")
    base, own = str(place / "base"), tmp_path / "i" / "adapter"
    build(load(ModelSpec(base, str(adapter), dtype="float32", device="cpu")), tmp_path / "i")
    (tmp_path / "i" / "examples.parquet").write_bytes(b"nothing")
    build(load(ModelSpec(base, str(own), dtype="float32", device="cpu")), tmp_path / "i")
    assert verify(tmp_path / "i") == []
    assert (own / SAVED).read_text() == "epochs: 3\n"


def test_an_adapter_elsewhere_is_not_followed(place: Path, tmp_path: Path) -> None:
    build(model(place), tmp_path / "i")
    shutil.move(tmp_path / "i" / "adapter", tmp_path / "outside")
    path = tmp_path / "i" / "manifest.json"
    document = json.loads(path.read_text())
    document["model"]["adapter"] = "../outside"
    path.write_text(json.dumps(document))
    [damage] = verify(tmp_path / "i")
    assert damage.kind == "adapter" and "leaves the index folder" in damage.what
    (tmp_path / "outside" / SAVED).write_text("epochs: 3\n")
    with pytest.raises(FinetraceError, match="leaves the index folder; it is not followed"):
        finetuning_of(Index(tmp_path / "i"), None, None, retrained=False)


def test_an_index_that_somebody_appended_to_is_opened_again(place: Path, tmp_path: Path) -> None:
    loaded = model(place)
    first = build(loaded, tmp_path / "i", 6)
    append(Index(tmp_path / "i", loaded), EXAMPLES[6:])
    for ask in (lambda: kronecker_factors(first, "data"), lambda: view(first, "all")):
        with pytest.raises(FinetraceError, match="another process has changed this index"):
            ask()
    assert not (tmp_path / "i" / "views").exists() or not list((tmp_path / "i" / "views").iterdir())
    assert len(view(Index(tmp_path / "i", loaded), "all")) == 14
    with pytest.raises(FinetraceError, match="another process has changed this index"):
        view(first, "all")


def test_a_view_of_the_old_rows_is_damage(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, folder = model(place), tmp_path / "i"
    first = build(loaded, folder, 6)
    view(first, "all")
    settled, calls = appending.settle, []

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        settled(*args)

    monkeypatch.setattr(appending, "settle", dying)
    with pytest.raises(KeyboardInterrupt):
        append(first, EXAMPLES[6:])
    monkeypatch.undo()
    [damage] = verify(folder)
    assert damage.kind == "manifest" and "of 6 rows, and the index has 14" in damage.what
    with pytest.raises(FinetraceError, match="this view is of other rows"):
        view(Index(folder, loaded), "all")
    assert repair(folder) == []
    assert len(view(Index(folder, loaded), "all")) == 14


def test_a_base_that_was_moved_is_the_same(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    whole = build(model(place), folder)
    before = [path.read_bytes() for path in sorted((folder / "shards").iterdir())]
    (folder / "shards" / "000000008.safetensors").unlink()
    shutil.copytree(place, tmp_path / "elsewhere")
    moved = model(tmp_path / "elsewhere")
    assert build(moved, folder).manifest.model.name == str(tmp_path / "elsewhere" / "base")
    assert [path.read_bytes() for path in sorted((folder / "shards").iterdir())] == before
    assert Index(folder).model().spec.model == str(tmp_path / "elsewhere" / "base")
    small = build(model(place), tmp_path / "small", 6)
    assert small.manifest.model.name == whole.manifest.model.name
    assert len(append(Index(tmp_path / "small", moved), EXAMPLES[6:])[0]) == 14


def test_a_view_that_lies_elsewhere_is_let_go(place: Path, tmp_path: Path) -> None:
    loaded, folder = model(place), tmp_path / "i"
    view(build(loaded, folder, 6), "all")
    shutil.move(folder / "views" / "all", tmp_path / "moved")
    os.symlink(tmp_path / "moved", folder / "views" / "all")
    assert len(append(Index(folder, loaded), EXAMPLES[6:])[0]) == 14
    assert not (folder / "views" / "all").is_symlink() and (tmp_path / "moved" / "manifest.json").exists()


def test_an_unfinished_view_is_no_damage_and_a_broken_one_goes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing, "SHARD_BYTES", 1)
    loaded, folder = model(place), tmp_path / "i"
    build_index(loaded, make_examples(40), folder, Encoder(loaded.tokenizer))
    (folder / "views" / "response-at-start").mkdir(parents=True)  # killed before its manifest
    assert verify(folder) == []
    made = folder / "views" / "all"
    view(Index(folder, loaded), "all")
    about = manifests.read(made)
    assert len(about.shards) > 1
    manifests.write(made, about.model_copy(update={"shards": about.shards[:-1]}))
    assert verify(folder) == []
    turn(made / "shards" / about.shards[0].file)
    assert [each.kind for each in verify(folder)] == ["shard"]
    assert repair(folder) == []
    assert not made.exists()


def test_a_shard_that_cannot_be_read_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(model(place), tmp_path / "i")
    opened = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "000000004.safetensors":
            raise OSError(5, "Input/output error")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    assert [each.path.name for each in verify(tmp_path / "i")] == ["000000004.safetensors"]


def test_a_journal_that_a_kill_left_goes_into_the_manifest(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards were noted: nothing is collected again, and what is left is what an undisturbed run leaves."""
    whole, loaded = build(model(place), tmp_path / "whole"), model(place)
    view(whole, "all")

    def die(self: notes.Notes) -> None:
        raise KeyboardInterrupt

    def killed(work: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(notes.Notes, "fold", die)
            with pytest.raises(KeyboardInterrupt):
                work()

    killed(lambda: build(loaded, tmp_path / "i"))
    assert (tmp_path / "i" / manifests.JOURNAL).exists()
    index = Index(tmp_path / "i", loaded)
    assert index.manifest == whole.manifest
    killed(lambda: view(index, "all"))
    monkeypatch.setattr(Collector, "collect", lambda *_, **__: pytest.fail("collected again"))
    assert len(view(index, "all")) == 14
    assert repair(tmp_path / "i") == []
    for name in (manifests.NAME, "views/all/manifest.json"):
        assert (tmp_path / "i" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "i").rglob(manifests.JOURNAL))
