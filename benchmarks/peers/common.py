"""What the script of every tool shares: its arguments, the rows as token ids, the clock, and the files that it writes.

It runs in each tool's own environment, so it needs the standard library and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORKS = {
    "gradients": "Gradients of every row for itself, and their inner products with those of the queries",
    "ekfac": "EK-FAC influence, the curvature from labels that the model draws",
    "ekfac-data": "EK-FAC influence, the curvature from the labels of the data",
}
DAMPING = 0.1  # of a block's mean eigenvalue, for every tool
CANNOT = 3  # exit status of a script whose tool has no such work


@dataclass(frozen=True)
class Row:
    """One example: an id, the tokens, and the label of each token, -100 where the loss does not look."""

    id: str
    prompt: str
    response: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Job:
    """What one run of one tool is to do; `tuned` is the second of its two configurations."""

    model: Path
    adapter: Path
    rows: list[Row]
    queries: list[Row]
    work: str
    tuned: bool
    dtype: str
    threads: int
    out: Path

    @classmethod
    def parse(cls, about: str | None) -> Job:
        """From the command line, which is the same for every tool."""
        parser = argparse.ArgumentParser(description=about)
        for name in ("--model", "--adapter", "--rows", "--queries", "--out"):
            parser.add_argument(name, type=Path, required=True)
        parser.add_argument("--work", choices=list(WORKS), required=True)
        parser.add_argument("--tuned", action="store_true")
        parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
        parser.add_argument("--threads", type=int, required=True)
        args = vars(parser.parse_args())
        args["out"].mkdir(parents=True, exist_ok=True)
        return cls(**{**args, "rows": read(args["rows"]), "queries": read(args["queries"])})

    def save(self, meter: Meter, scores: NDArray[Any], how: list[str], packages: tuple[str, ...]) -> None:
        """Write `scores.npy`, (queries, rows), and `result.json`."""
        if scores.shape != (len(self.queries), len(self.rows)):
            raise ValueError(f"scores of shape {scores.shape} for {len(self.queries)} queries, {len(self.rows)} rows")
        np.save(self.out / "scores.npy", np.asarray(scores, dtype=np.float64))
        found = {
            "seconds": meter.seconds,
            "cpu_seconds": meter.cpu,
            "peak_mb": meter.peak / 2**20,
            "how": how,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", *packages)},
        }
        (self.out / "result.json").write_text(json.dumps(found, indent=1))

    def cannot(self, reason: str) -> None:
        """Say why the tool has no such work, and stop."""
        (self.out / "result.json").write_text(json.dumps({"cannot": reason}))
        raise SystemExit(CANNOT)


def read(path: Path) -> list[Row]:
    """Rows of a JSON Lines file."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


class Meter:
    """Seconds of each stage, and the most memory that the process held during any of them.

    Attributes:
        seconds: By stage, wall-clock.
        cpu: Of all stages, processor time of all threads, which a busy machine disturbs less.
        peak: Bytes of resident memory, model included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu = 0.0
        self.peak = 0
        self._aside = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done while open."""
        _forget_peak()
        self._aside, started, before = 0.0, time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - started - self._aside
        self.cpu += time.process_time() - before
        self.peak = max(self.peak, _peak())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Part of a stage that does not count: a model being loaded, which other tools have done before the clock starts."""
        self.peak = max(self.peak, _peak())
        started, before = time.perf_counter(), time.process_time()
        yield
        self._aside += time.perf_counter() - started
        self.cpu -= time.process_time() - before
        _forget_peak()


def _forget_peak() -> None:
    """Let the peak start again from what is held now, where Linux allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
