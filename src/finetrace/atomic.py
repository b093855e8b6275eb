"""Files that are whole or not there: written under another name and renamed when they are on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from finetrace.errors import FinetraceError


def write_atomically(path: Path, content: bytes) -> None:
    """The file is whole or not there."""
    with replacing(path) as part:
        part.write_bytes(content)


def part_of(name: str, writer: str = "") -> str:
    """The temporary name of a file; `writer` tells apart those who may be at the same one."""
    return f".{name}.{writer}.part" if writer else f".{name}.part"


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A temporary name to write; on leaving it is flushed to disk and renamed to `path`, on an error removed."""
    part = path.with_name(part_of(path.name, writer))
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise FinetraceError(
            f"{path}: cannot be written ({error}); free some space or choose another folder."
        ) from error
    finally:
        part.unlink(missing_ok=True)
