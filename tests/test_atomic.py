"""Files that are whole or not there, and what a library leaves beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetrace.atomic import part_of, replacing, write_atomically, write_tensors
from finetrace.errors import FinetraceError
from finetrace.models import Loaded, save_adapter


@pytest.fixture
def readable() -> Iterator[None]:
    """New files may be read by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(FinetraceError, match=r"a: cannot be written \(full\)"), replacing(tmp_path / "a") as part:
        part.write_bytes(b"half")
        raise OSError("full")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a", b"old")]


def test_what_a_killed_writer_left_goes_with_the_next_attempt(tmp_path: Path) -> None:
    (tmp_path / part_of("a")).write_bytes(b"half")
    place = tmp_path / part_of("a.folder")
    place.mkdir()
    (place / ".tmpAb12Cd").write_bytes(b"half")
    write_tensors(tmp_path / "a", {"x": torch.ones(2)})
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_link_under_the_temporary_name_leads_nowhere(tmp_path: Path, tiny_loaded: Loaded) -> None:
    """Somebody else's index may hold one that leads to a file of ours."""
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    mine.write_bytes(b"mine")
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    links = {"a": mine, "b": mine, "b.folder": folder, "adapter/adapter": folder}
    for name, goal in links.items():
        place = tmp_path / name
        place.with_name(part_of(place.name)).symlink_to(goal)
    write_atomically(tmp_path / "a", b"new")
    write_tensors(tmp_path / "b", {"x": torch.ones(2)})
    save_adapter(tiny_loaded.model, tmp_path / "adapter")
    assert mine.read_bytes() == b"mine" and not mine.is_symlink()
    assert [each.name for each in folder.iterdir()] == ["inside"]
    assert (tmp_path / "a").read_bytes() == b"new" and not (tmp_path / "a").is_symlink()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
@pytest.mark.usefixtures("readable")
def test_tensors_are_read_by_whoever_may_read_the_folder(tmp_path: Path, tiny_loaded: Loaded) -> None:
    """An index lies on shared storage."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([True])}
    write_tensors(tmp_path / "t.safetensors", tensors, {"what": "numbers"})
    save_adapter(tiny_loaded.model, tmp_path / "adapter")
    read = load_file(str(tmp_path / "t.safetensors"))
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    found = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert len(found) > 2
    assert {oct(each.stat().st_mode & 0o777) for each in found} == {"0o644"}
