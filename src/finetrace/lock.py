"""One writer a folder: the second is refused, and a killed one leaves no lock behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from finetrace.errors import FinetraceError

NAME = ".lock"


@contextmanager
def writing(folder: Path, what: str = "index") -> Iterator[None]:
    """While open, no other process writes to the index, or `what` it is, in `folder`, which has to be there.

    The operating system holds the lock and lets it go when the process ends, however it ends.

    Raises:
        FinetraceError: Another process is writing there, or the folder cannot be written.
    """
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FinetraceError(
            f"{folder}: another process is writing this {what}; wait until it is done, or stop it, and start again."
        ) from None
    except OSError as error:
        raise FinetraceError(
            f"{folder}: cannot be written ({error}); free some space or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
