"""Workers that are processes of this machine, each with a pipe of its own: one that is killed takes nothing with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from finetrace.execution.dispatch import Event, Pool
from finetrace.execution.worker import attempt, revived, settle

READY = "ready"
GRACE = 5.0  # seconds that a worker has to end by itself


class ProcessPool(Pool):
    """Processes that load `work` once and do items until they are told to stop, or until this process is gone."""

    def __init__(self, work: Callable[[Any], Any], threads: int) -> None:
        self.work = work
        self.threads = threads
        self._started = 0
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, tuple[SpawnProcess, int]] = {}

    def start(self) -> None:
        """Start one more; it takes the lowest number that is free."""
        taken = {number for _, number in self._workers.values()}
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self.work, self.threads, number), name=f"finetrace-{number}", daemon=True
        )
        process.start()
        theirs.close()  # or its end would never be seen here
        self._workers[ours] = process, number

    def give(self, worker: Hashable, item: Any) -> None:
        """Send the item; that the worker has died is seen by `wait`."""
        assert isinstance(worker, Connection)
        with contextlib.suppress(OSError):
            worker.send((item,))

    def wait(self) -> list[Event]:
        """Wait for messages, and for pipes whose other end is gone."""
        events = []
        for connection in wait(list(self._workers)):
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                process, _ = self._workers.pop(connection)
                process.join(GRACE)
                connection.close()
                events.append(Event(connection, "died", _how(process.exitcode)))
                continue
            events.append(Event(connection, kind, revived(value) if kind == "failed" else value))
        return events

    def close(self) -> None:
        """Those that are idle end by themselves, the others are stopped."""
        for connection in self._workers:
            connection.close()  # an idle worker reads no further and cleans up
        until = time.monotonic() + GRACE
        for process, _ in self._workers.values():
            process.join(max(0.0, until - time.monotonic()))
        for process, _ in self._workers.values():
            process.terminate()
        for process, _ in self._workers.values():
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()


def _serve(connection: Connection, work: Callable[[Any], Any], threads: int, number: int) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator hears the keyboard, and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settle(threads, number)
    try:
        connection.send((READY, None))
        while True:
            (item,) = connection.recv()
            connection.send(attempt(work, item))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """A coordinator that was killed leaves no worker that goes on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
