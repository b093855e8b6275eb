"""A disk or a quota that is full, through the command: one sentence, nothing half written, and then the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from commands import run
from finetrace.reading import write_examples
from test_index import files, small_disk  # noqa: F401  # a fixture
from tiny import make_examples

resource = pytest.importorskip("resource", reason="limits on a file's size are those of Unix")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While open, the operating system lets no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def command(home: Path, base: Path, adapter: Path, out: Path) -> list[object]:
    data = home / "train.jsonl"
    if not data.exists():
        write_examples(data, make_examples(100))
    return [
        "index",
        data,
        "--out",
        out,
        "--model",
        base,
        "--adapter",
        adapter,
        "--dtype",
        "float64",
        "--kronecker",
        "model",
    ]


def refusal(err: str) -> str:
    """The one sentence of the error, after what is said of the work beforehand."""
    *before, last = err.splitlines()
    assert last.startswith("finetrace: ")
    assert not [line for line in before if line.startswith("finetrace: ")]
    return last


@pytest.mark.parametrize("size", [500, 3_000, 7_000, 20_000, 100_000])
def test_a_file_that_may_not_grow(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: Any, size: int
) -> None:
    """Of 500 bytes not even the manifest fits; of 100000 all but the shard and the factors' sums do."""
    asked = command(tmp_path, base_folder, adapter_folder, tmp_path / "i")
    with largest_file(size):
        code, out, err = run(capsys, *asked)
    assert (code, out) == (2, "")
    assert "cannot be written" in refusal(err)
    assert "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert run(capsys, *asked)[0] == 0
    assert run(capsys, *command(tmp_path, base_folder, adapter_folder, tmp_path / "e"))[0] == 0
    assert files(tmp_path / "i") == files(tmp_path / "e")


@pytest.mark.parametrize("left", [350, 420])
def test_a_disk_that_is_full(
    base_folder: Path,
    adapter_folder: Path,
    tmp_path: Path,
    small_disk: Path,  # noqa: F811
    capsys: Any,
    left: int,
) -> None:
    """Room for the gradients, which is asked for beforehand, and not for all that comes with them (kB are left)."""
    (small_disk / "ballast").write_bytes(bytes((600 - left) * 1024))
    asked = command(tmp_path, base_folder, adapter_folder, small_disk / "i")
    code, out, err = run(capsys, *asked)
    assert (code, out) == (2, "")
    assert "free some space" in refusal(err)
    assert not list(small_disk.rglob("*.part"))
    (small_disk / "ballast").unlink()
    code, _, err = run(capsys, *asked)
    assert code == 0, err
    assert run(capsys, *command(tmp_path, base_folder, adapter_folder, tmp_path / "e"))[0] == 0
    assert files(small_disk / "i") == files(tmp_path / "e")


@pytest.mark.parametrize(("size", "file"), [(2_000, "a checkpoint"), (9_000, "random.json")])
def test_a_fine_tuning_whose_files_may_not_grow(
    base_folder: Path, tmp_path: Path, capsys: Any, size: int, file: str
) -> None:
    """Of 2000 bytes no adapter fits; what comes after it is named. Then it goes on, to the same bytes."""
    data = tmp_path / "train.jsonl"
    write_examples(data, make_examples(6))
    options = ["--model", base_folder, "--dtype", "float32", "--device", "cpu", "--epochs", 2]
    with largest_file(size):
        code, out, err = run(capsys, "finetune", data, "--out", tmp_path / "a", *options)
    assert (code, out) == (2, "")
    assert "cannot be written" in refusal(err)
    assert file in refusal(err)
    assert "Traceback" not in err
    assert run(capsys, "finetune", data, "--out", tmp_path / "a", *options)[0] == 0
    assert run(capsys, "finetune", data, "--out", tmp_path / "b", *options)[0] == 0
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]
