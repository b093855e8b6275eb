"""A journal: lines that are added to a file that is replaced as a whole only now and then, so that a line costs a line.

Its head is the checksum of the file that the lines go with: those of another count for nothing, so whoever replaces that file
need not remove the journal in the same step. Each line has its own: what a kill or a full disk cut off is not there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError


def read(path: Path, base: bytes) -> list[str]:
    """The whole lines of the journal of a file with these bytes; none of another file's.

    Raises:
        FinetraceError: It is there and cannot be read.
    """
    try:
        whole = path.read_bytes().split(b"\n")[:-1]  # what no newline ends is the beginning of a line
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE:
            return []
        raise FinetraceError(
            f"{path}: cannot be read ({error}); mend that, or remove it: what it notes is collected again."
        ) from error
    if not whole or whole[0] != _sum(base):
        return []
    return list(_unbroken(whole[1:]))


def _unbroken(lines: list[bytes]) -> Iterator[str]:
    for line in lines:
        mark, _, text = line.partition(b" ")
        if mark == _sum(text):
            yield text.decode()


def _sum(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()


class Journal:
    """Adds lines for a file with these bytes; what the journal holds of another file, or of a broken line, goes first.

    Attributes:
        lines: How many there are.
    """

    def __init__(self, path: Path, base: bytes) -> None:
        self.path, self.base = path, base
        self._begin()

    def _begin(self) -> None:
        """The next line is written with all that are there, in a file of its own."""
        there = read(self.path, self.base)
        self.lines = len(there)
        self._kept: bytes | None = b"".join(line + b"\n" for line in (_sum(self.base), *map(_marked, there)))

    def add(self, text: str) -> None:
        """On the disk when this returns.

        Raises:
            FinetraceError: It cannot be written.
        """
        line = _marked(text) + b"\n"
        try:
            if self._kept is not None:
                write_atomically(self.path, self._kept + line)
            else:
                with self.path.open("r+b") as file:  # one that is gone is not begun without its head
                    file.seek(0, os.SEEK_END)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            self._begin()
            raise FinetraceError(
                f"{self.path}: cannot be written ({error}); free some space or choose another folder."
            ) from error
        self._kept = None
        self.lines += 1


def _marked(text: str) -> bytes:
    return _sum(text.encode()) + b" " + text.encode()
