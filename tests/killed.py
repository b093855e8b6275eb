"""Work that a test kills: a process of its own that has torch imported already, and SIGKILL at a moment of choice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch

from finetrace.encoding import Encoder
from finetrace.index import build_index, notes
from finetrace.models import ModelSpec, load
from tiny import make_examples

PRELOADED = [  # what the modules of the tests import, once in place of once a process
    "finetrace.benchmark.report",
    "finetrace.cli",
    "finetrace.index",
    "finetrace.models",
    "finetrace.studies.registry",
    "peft",
    "pytest",
    "transformers.models.llama.modeling_llama",
]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")  # audit events; `open` for writing is one too


def build(base: str, adapter: str, folder: str, rows: int, **options: Any) -> None:
    """What `finetrace index` does, on the examples of the tests; the journal goes into the manifest after two shards already."""
    notes.FEWEST = 2
    loaded = load(ModelSpec(base, adapter, dtype="float64", device="cpu"))
    build_index(loaded, make_examples(rows), Path(folder), Encoder(loaded.tokenizer), **options)


def build_dying_in_the_library(at: int, **given: Any) -> None:
    """`build`, killed in the `at`-th writing of tensors, after safetensors began a temporary file of its own beside it."""
    begun, save = 0, safetensors.torch.save_file

    def dying(tensors: Any, filename: str, metadata: Any = None) -> None:
        nonlocal begun
        if begun == at:
            Path(filename).with_name(".tmpAb12Cd").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        begun += 1
        save(tensors, filename, metadata)

    safetensors.torch.save_file = dying
    build(**given)


def _changes(event: str, args: tuple[Any, ...], watched: str) -> bool:
    """Whether Python is about to change something in the folder; `rmtree` names a file by its folder's descriptor."""
    if event in ("os.remove", "os.rmdir") and args[1] != -1:
        return True
    writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return (event in CHANGES or writes) and any(watched in str(each) for each in args[:2])


def _empties(event: str, args: tuple[Any, ...]) -> bool:
    """Whether that change empties a file before it is written anew."""
    return event == "open" and isinstance(args[2], int) and bool(args[2] & os.O_TRUNC) and isinstance(args[0], str)


def _work(
    ready: Connection, die_at: int | None, watched: str, work: Callable[..., None], given: dict[str, Any]
) -> None:
    seen = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _changes(event, args, watched):
            return
        for emptied in (False, True) if _empties(event, args) else (False,):
            if seen == die_at:
                if emptied:
                    seen += 1  # this opening is nobody's step
                    with open(args[0], "wb"):
                        pass
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)
    ready.send(os.getpid())
    work(**given)
    ready.send(seen)


def run(
    work: Callable[..., None], folder: Path, after: float | None = None, die_at: int | None = None, **given: Any
) -> Any:
    """Run `work(folder=folder, **given)` in a process of its own.

    Args:
        work: A function of a module.
        folder: What it writes to.
        after: Kill it so many seconds after it began, its imports behind it.
        die_at: Let it die just before that change of a file in `folder`, counted from 0; a file that is written anew counts
            twice, as it was and emptied.

    Returns:
        Whether it came to its end, how many changes it made, and its seconds.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, die_at, str(folder), work, {"folder": str(folder), **given})
    process = context.Process(target=_work, args=arguments)
    process.start()
    sender.close()
    receiver.recv()
    began = time.monotonic()
    process.join(after)
    if process.is_alive() and after is not None:
        process.kill()
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
    finished = process.exitcode == 0
    return finished, receiver.recv() if finished else None, seconds
