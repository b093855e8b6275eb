"""Work side by side in processes, and what becomes of it when one fails or dies."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Hashable
from functools import partial
from pathlib import Path

import pytest

from finetrace.errors import FinetraceError
from finetrace.execution import Engine, run_each
from finetrace.execution.dispatch import TRIES, Event, Pool, dispatch


def square(number: int) -> int:
    return number * number


def begin(folder: Path, number: int) -> int:
    """Leaves a mark; the first fails at once, and the others take a second from then on."""
    (folder / str(number)).touch()
    if number == 0:
        raise FinetraceError("the first fails")
    while not (folder / "0").exists():
        time.sleep(0.01)
    time.sleep(1)
    return number


def die(number: int) -> int:
    if number == 1:
        os._exit(9)
    return number


def warn(number: int) -> int:
    warnings.warn("a library will change", FutureWarning, stacklevel=1)
    warnings.warn("a row is odd", UserWarning, stacklevel=1)
    return number


def test_workers_do_not_repeat_what_libraries_say_of_their_future(capfd: pytest.CaptureFixture[str]) -> None:
    assert dict(run_each(warn, [1, 2], 2)) == {0: 1, 1: 2}
    said = capfd.readouterr().err
    assert "a library will change" not in said
    assert "a row is odd" in said


@pytest.mark.parametrize("workers", [1, 2, pytest.param(5, marks=pytest.mark.slow)])
def test_every_item_is_done_once_with_its_place(workers: int) -> None:
    assert dict(run_each(square, [3, 1, 2, 7], workers)) == {0: 9, 1: 1, 2: 4, 3: 49}
    assert not list(run_each(square, [], workers))


def test_after_a_failure_nothing_more_is_begun(tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match="the first fails"):
        list(run_each(partial(begin, tmp_path), list(range(8)), 2))
    there = set(os.listdir(tmp_path))
    assert there <= {"0", "1"}
    time.sleep(1)
    assert set(os.listdir(tmp_path)) == there  # nor in the background


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(FinetraceError, match="a worker process died"):
        list(run_each(die, [0, 1, 2], 2))
    with pytest.raises(FinetraceError, match="--workers 0"):
        list(run_each(square, [1], 0))


class Frail(Pool):
    """One worker does an item and dies when it has none, as on machines that come and go; the first `unborn` never get that far."""

    def __init__(self, unborn: int) -> None:
        self.unborn, self.started, self.events = unborn, 0, deque[Event]()

    def start(self) -> None:
        self.started += 1
        if self.started <= self.unborn:
            self.events.append(Event(self.started, "died", "killed"))
        else:
            self.events.append(Event(self.started, "ready"))

    def give(self, worker: Hashable, item: int) -> None:
        self.events.append(Event(worker, "done", item * item))
        self.events.append(Event(f"idle {self.started}", "died", "killed"))

    def wait(self) -> list[Event]:
        return [self.events.popleft()]

    def close(self) -> None:
        pass


def test_workers_that_come_and_go_do_not_end_a_run_that_goes_on() -> None:
    assert dict(dispatch(Frail(TRIES - 1), list(range(6)), 1)) == {k: k * k for k in range(6)}


def test_workers_that_never_begin_end_it() -> None:
    with pytest.raises(FinetraceError, match="died 3 times while it had nothing to do and nothing was done meanwhile"):
        dict(dispatch(Frail(TRIES), [1, 2], 1))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to cores")
def test_workers_share_the_cores_that_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job of a cluster or a container has a few of a machine's many."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 4, 5, 6, 7, 8})
    assert [Engine("processes", count)._threads(count) for count in (1, 2, 4, 12)] == [6, 3, 1, 1]
    assert [Engine("processes", count).cores_each(count) for count in (2, 12)] == [3, 0.5]
