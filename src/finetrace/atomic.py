"""Files that are whole or not there: written under another name and renamed when they are on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from finetrace.errors import FinetraceError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, content: bytes, writer: str = "") -> None:
    """The file is whole or not there; `writer` as in `part_of`."""
    with replacing(path, writer) as part:
        part.write_bytes(content)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, writer: str = ""
) -> None:
    """A safetensors file that is whole or not there, for whoever may read its folder; `writer` as in `part_of`.

    The library first writes a temporary file of its own beside the one it is asked for, which nobody but its owner may read;
    that lies in a folder of its own, so that nothing of it outlives a killed writer's next attempt.
    """
    from safetensors.torch import save_file

    place = path.with_name(part_of(f"{path.name}.folder", writer))
    with replacing(path, writer) as part:
        try:
            remove_part(place)
            path.parent.mkdir(exist_ok=True)  # and no folder above it, which somebody may have removed
            place.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(place / path.name), metadata)
            share(place / path.name)
            (place / path.name).replace(part)
        finally:
            remove_part(place)


def share(file: Path) -> None:
    """Let those read a file who may read its folder; where the file system has no such rights, it stays as it is."""
    with contextlib.suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def flush(file: Path) -> None:
    """Return when what a file holds is on the disk: a name that is given to it later then never stands for less."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def part_of(name: str, writer: str = "") -> str:
    """The temporary name of a file; `writer` tells apart those who may be at the same one."""
    return f".{name}.{writer}.part" if writer else f".{name}.part"


@contextlib.contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A temporary name to write; on leaving it is flushed to disk and renamed to `path`, on an error removed.

    Nothing is there under that name before: a link that somebody put there would lead the writing elsewhere.
    """
    part = path.with_name(part_of(path.name, writer))
    remove_part(part)
    try:
        yield part
        flush(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise FinetraceError(
            f"{path}: cannot be written ({error}); free some space or choose another folder."
        ) from error
    finally:
        remove_part(part)


def remove_part(place: Path) -> None:
    """Remove what a killed writer left under such a name, file or folder, if it can be; of a link the link alone."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
