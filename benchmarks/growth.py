"""How cost grows with the number of rows: python benchmarks/growth.py collection|queries [--rounds 3].

collection: an index of 1x, 4x and 16x rows of one task, written to disk, on the embedded model. queries: 16 queries over 1x, 4x
and 16x rows of random numbers, streamed within 2 GB. The sizes come in turn; the medians of the rounds are fitted by a line,
a + b n, and by a power, a n^p. Collection is in CPU seconds of the process, queries are in seconds of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from collection import with_adapter
from finetrace.attribution import Problem, make
from finetrace.encoding import Encoder
from finetrace.index import Index, build_index
from finetrace.tasks import build
from scoring import random_features, write_factors, write_index
from streaming import queries, width

TIMES = (1, 4, 16)
SPECS = ("gradsim", "gradcos", "datainf", "lissa", "ekfac", "exact")


def fitted(rows: list[int], seconds: list[float]) -> str:
    """A line and a power through some sizes, by least squares; the line's errors are relative."""
    n, t = np.array(rows, float), np.array(seconds)
    design = np.stack([np.ones_like(n), n], 1) / t[:, None]
    (fixed, each), *_ = np.linalg.lstsq(design, np.ones_like(t), rcond=None)
    off = np.abs((fixed + each * n) / t - 1).max()
    power, _ = np.polyfit(np.log(n), np.log(t), 1)
    return f"{fixed:.2f} s + {each * 1000:.2f} ms a row, off by {off:.1%} at most; exponent {power:.2f}"


def line(name: str, rows: list[int], seconds: list[float]) -> None:
    """Seconds of each size, and what they say."""
    shown = ", ".join(f"{each:.2f} s ({each / seconds[0]:.1f}x)" for each in seconds)
    print(f"{name}: {shown}; {fitted(rows, seconds)}", flush=True)


def medians(sizes: list[int], rounds: int, measure: Callable[[int], float]) -> list[float]:
    """Of each size, measured in turn."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            found[size].append(measure(size))
    return [statistics.median(found[size]) for size in sizes]


def collection(rounds: int, base: int, dtype: str, task: str) -> None:
    """Every row takes as much as the next, up to what a build takes by itself."""
    loaded = with_adapter(dtype)
    encoder = Encoder(loaded.tokenizer)
    rows = list(build(task).train)
    sizes = [base * times for times in TIMES]
    if sizes[-1] > len(rows):
        raise SystemExit(f"{task} has {len(rows)} rows, fewer than {sizes[-1]}: give a smaller --rows.")

    def measure(size: int) -> float:
        chosen = rows[:: len(rows) // size][:size]
        started = time.process_time()
        with tempfile.TemporaryDirectory() as work:
            build_index(loaded, chosen, Path(work) / "index", encoder)
        return time.process_time() - started

    measure(2)  # warm up
    line(f"collection, {dtype}, {sizes} rows of {task}", sizes, medians(sizes, rounds, measure))


def streamed(rounds: int, base: int) -> None:
    """Products of rows and queries grow with the rows; what `exact` solves changes with their number."""
    sizes = [base * times for times in TIMES]
    with tempfile.TemporaryDirectory() as work:
        indexes = {}
        for size in sizes:
            write_index(Path(work) / str(size), size)
            indexes[size] = Index(Path(work) / str(size))
            write_factors(indexes[size])
        features = random_features(16, width(), 10**6)
        for spec in SPECS:

            def measure(size: int, spec: str = spec) -> float:
                # the step is given so that few rows, which would fit, stream as many do
                problem = Problem(indexes[size], queries(16), features, memory=2 << 30, step=64)
                return make(spec).score(problem).seconds

            line(f"{spec}, 16 queries, {sizes} rows", sizes, medians(sizes, rounds, measure))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("collection", "queries"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="of the smallest; 16 for collection and 250 for queries if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--task", default="grammars")
    args = parser.parse_args()
    print(f"{args.part}: {torch.get_num_threads()} thread(s) of torch, median of {args.rounds} rounds")
    if args.part == "collection":
        collection(args.rounds, args.rows or 16, args.dtype, args.task)
    else:
        streamed(args.rounds, args.rows or 250)


if __name__ == "__main__":
    main()
