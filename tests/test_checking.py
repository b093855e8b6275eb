"""`finetrace index verify` and `repair`, and one writer at a time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import run, tuned_index
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import build_index, checking, open_index, shards, view
from finetrace.index import manifest as manifests
from finetrace.index.checking import repair, verify
from finetrace.index.views import kronecker_factors
from finetrace.lock import writing
from finetrace.models import ModelSpec, load
from finetrace.reading import read_examples, write_examples
from test_index import files
from tiny import make_examples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned tiny model's index, with a view and factors."""
    folder = tmp_path_factory.mktemp("checking")
    write_examples(folder / "train.jsonl", make_examples(40))
    tuned_index(folder, folder / "train.jsonl", epochs=1)
    index = open_index(folder / "idx")
    assert len(index.manifest.shards) == 1
    kronecker_factors(index, "data")
    view(index, "response", at="start")
    return folder


@pytest.fixture
def idx(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "idx", tmp_path / "idx")
    return tmp_path / "idx"


def test_a_whole_index_is_whole(idx: Path, capsys: Any) -> None:
    assert verify(idx) == []
    code, out, _ = run(capsys, "index", "verify", idx)
    assert (code, "every file is whole" in out) == (0, True)
    before = files(idx)
    assert run(capsys, "index", "repair", idx)[0] == 0
    assert files(idx) == before


@pytest.mark.parametrize("place", ["shards", "views/response-at-start/shards"])
@pytest.mark.parametrize("how", ["cut", "turned", "gone"])
def test_a_broken_shard_is_named_and_collected_again_with_the_same_bytes(
    place: str, how: str, idx: Path, capsys: Any
) -> None:
    path = idx / place / "000000000.safetensors"
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if how == "cut" else whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    code, out, _ = run(capsys, "index", "verify", idx)
    assert code == 1
    assert str(path) in out
    assert "rows 1 to 40" in out
    others = {name: data for name, data in files(idx).items() if name != str(path.relative_to(idx))}
    code, out, err = run(capsys, "index", "repair", idx)
    assert code == 0, out + err
    assert path.read_bytes() == whole
    assert {name: data for name, data in files(idx).items() if name != str(path.relative_to(idx))} == others
    assert verify(idx) == []


def test_broken_factors_go_and_come_again(idx: Path) -> None:
    path = idx / "factors" / "data.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x00\x01")
    assert [each.kind for each in verify(idx)] == ["factors"]
    assert repair(idx) == []
    assert not path.exists()
    kronecker_factors(open_index(idx), "data")
    assert path.read_bytes() == whole


def test_a_folder_in_the_place_of_factors_is_named(idx: Path, capsys: Any) -> None:
    about = idx / "factors" / "data.json"
    about.unlink()
    about.mkdir()
    code, _, err = run(capsys, "index", "repair", idx)
    assert code == 2
    assert f"{about}: Is a directory; check the path" in err


def test_weights_that_a_link_in_the_place_of_factors_leads_to_stay(idx: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "model.safetensors"
    weights.parent.mkdir()
    save_file({"model.norm.weight": torch.ones(3)}, str(weights))
    before = weights.read_bytes()
    shutil.rmtree(idx / "factors")
    (idx / "factors").symlink_to(weights.parent)
    with pytest.raises(FinetraceError, match="these are no factors of finetrace's, and stay as they are"):
        kronecker_factors(open_index(idx), "model")
    assert [each.kind for each in repair(idx)] == ["factors"]
    assert files(weights.parent) == {"model.safetensors": before}


@pytest.mark.parametrize(
    ("was", "now"), [("v_proj.lora_B", "w_proj.lora_B"), ('"right": "right.1"', '"right": "right.0"')]
)
def test_what_is_noted_of_factors_is_compared_too(was: str, now: str, idx: Path, capsys: Any) -> None:
    path = idx / "factors" / "data.json"
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now, 1))
    with pytest.raises(
        FinetraceError, match=r"data\.json: the blocks it names .* remove .* and they are computed again"
    ):
        kronecker_factors(open_index(idx), "data")
    assert [each.kind for each in verify(idx)] == ["factors"]
    code, out, _ = run(capsys, "index", "verify", idx)
    assert (code, str(path) in out) == (1, True)
    assert repair(idx) == []
    kronecker_factors(open_index(idx), "data")
    assert path.read_text() == text


def test_a_view_that_lost_its_manifest_is_broken_and_goes(idx: Path) -> None:
    home = idx / "views" / "response-at-start"
    (home / "manifest.json").unlink()
    with pytest.raises(
        FinetraceError, match=r"manifest\.json: missing.* remove .*response-at-start and it is collected again"
    ):
        view(open_index(idx), "response", at="start")
    assert [(each.path, each.kind) for each in verify(idx)] == [(home / "manifest.json", "manifest")]
    assert repair(idx) == []
    assert not home.exists()


def test_a_broken_view_goes_and_broken_examples_are_left_with_what_to_do(idx: Path, capsys: Any) -> None:
    (idx / "views" / "response-at-start" / "manifest.json").write_text("{}")
    assert [each.kind for each in verify(idx)] == ["manifest"]
    assert repair(idx) == []
    assert not (idx / "views" / "response-at-start").exists()
    (idx / "examples.parquet").write_bytes(b"nothing")
    (idx / "shards" / "000000000.safetensors").unlink()
    code, out, _ = run(capsys, "index", "repair", idx)
    assert code == 1
    assert "examples.parquet" in out
    assert "with the data and the adapter" in out
    (idx / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    assert {each.kind for each in verify(idx)} == {"examples", "shard", "adapter"}


def test_an_adapter_that_another_one_replaced_is_named(idx: Path, capsys: Any) -> None:
    path = idx / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 0.5
    save_file(tensors, path, {"format": "pt"})
    code, out, _ = run(capsys, "index", "verify", idx)
    assert code == 1
    assert f"{path}: not the adapter that the index was built with." in out
    tensors[f"{name.removesuffix('.lora_A.weight')}.lora_magnitude_vector"] = tensors[name].clone()
    save_file(tensors, path, {"format": "pt"})
    assert verify(idx) == []  # of a kind whose names the model has otherwise; the model's loading compares it


def test_what_is_missing_is_damage_and_several_kinds_in_one_view_are_mended_together(idx: Path) -> None:
    (idx / "adapter" / "adapter_config.json").rename(idx / "kept.json")
    assert [each.kind for each in verify(idx)] == ["adapter"]
    (idx / "kept.json").rename(idx / "adapter" / "adapter_config.json")
    (idx / "factors" / "data.safetensors").unlink()
    assert [each.kind for each in verify(idx)] == ["factors"]
    home = idx / "views" / "response-at-start"
    shutil.copytree(idx / "factors", home / "factors")
    (home / "examples.parquet").write_bytes(b"nothing")
    assert [each.kind for each in verify(idx)] == ["factors", "examples", "factors"]
    assert repair(idx) == []
    assert not home.exists()


def test_a_view_that_is_being_collected_is_left_alone(idx: Path) -> None:
    home = idx / "views" / "response-at-start"
    about = manifests.read(home)
    manifests.write(home, about.model_copy(update={"shards": ()}))
    assert verify(idx) == []  # unfinished: it goes on when a method asks for it
    (home / "examples.parquet").write_bytes(b"half")
    with writing(home), pytest.raises(FinetraceError, match="another process is writing"):
        repair(idx)
    assert home.exists()


def several(made: Path, folder: Path) -> Path:
    """The same index in five shards."""
    loaded = load(ModelSpec(str(made / "base"), str(made / "adapter"), "float32", "cpu"))
    rows = read_examples(made / "train.jsonl")
    build_index(loaded, rows, folder / "five", Encoder(loaded.tokenizer), rows_per_shard=8)
    return folder / "five"


def test_a_repair_that_was_killed_is_started_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five = several(made, tmp_path)
    before = files(five)
    for start in (0, 16, 32):
        (five / "shards" / f"{start:09d}.safetensors").unlink()
    really, seen = shards.write, []

    def dying(folder: Path, features: Any, start: int, stop: int, about: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(start)
        return really(folder, features, start, stop, about)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            repair(five)
    assert [each.path.name for each in verify(five)] == ["000000016.safetensors", "000000032.safetensors"]
    assert repair(five) == []
    assert files(five) == before


def test_other_bytes_than_before_are_said_and_old_factors_go(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    five = several(made, tmp_path)
    kronecker_factors(open_index(five), "data")
    (five / "shards" / "000000008.safetensors").unlink()
    really = checking.Collector.collect

    def otherwise(self: Any, *given: Any, **more: Any) -> Any:
        found = really(self, *given, **more)
        found.gradients *= 1.001
        return found

    monkeypatch.setattr(checking.Collector, "collect", otherwise)
    said: list[str] = []
    assert repair(five, said.append) == []
    assert any("not bit by bit" in each for each in said)
    assert not list((five / "factors").glob("data.*"))


def test_the_second_writer_is_refused_and_a_killed_one_leaves_no_lock(made: Path, idx: Path, capsys: Any) -> None:
    holding = "import sys, time; from pathlib import Path; from finetrace.lock import writing\n"
    holding += "with writing(Path(sys.argv[1])): print('held', flush=True); time.sleep(3600)"
    holder = subprocess.Popen([sys.executable, "-c", holding, str(idx)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        (idx / "shards" / "000000000.safetensors").unlink()
        again = ["index", made / "train.jsonl", "--out", idx, "--adapter", made / "adapter", "--model", made / "base"]
        for command in (again, ["index", "repair", idx]):
            code, _, err = run(capsys, *command)
            assert code == 2
            assert "another process is writing this index" in err
    finally:
        holder.kill()
        holder.wait()
    assert run(capsys, *again)[0] == 0
    assert verify(idx) == []
    with writing(idx), pytest.raises(FinetraceError, match="another process"), writing(idx):
        pass


def test_no_index_is_said_in_one_sentence(tmp_path: Path, capsys: Any) -> None:
    for command in ("verify", "repair"):
        code, _, err = run(capsys, "index", command, tmp_path)
        assert code == 2
        assert "no index there" in err
