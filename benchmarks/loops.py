"""DataInf and LiSSA against the study's released loops: python benchmarks/loops.py [--rounds 3] [--rows 900] [--queries 100].

The loops are literal ones of the released formulas: a dictionary of float32 matrices for every row, one query, one matrix, one
iteration and one row after another, each product of two matrices entry by entry and summed; its damping (a tenth of the mean
squared entry of a matrix), and for LiSSA the damping subtracted and the update divided by 1000. They are run for one query over
all matrices of the embedded model's adapter and counted as often as there are queries; every score of that query is compared.
Beside them stand the same formulas of this library on all queries, once with nothing computed before and once with the inner
products of the training rows in the index's cache; and the two products of matrices that DataInf cannot do without, in float32
with all operands in memory: queries with rows, and that with the Gram matrix of the rows. Everything is random numbers; ratios
are of times within one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from finetrace.attribution import Problem, make
from finetrace.collection import Block
from finetrace.index import Index
from scoring import random_features, write_index
from streaming import queries, width

Matrices = dict[str, Tensor]  # by the name of a LoRA matrix
DAMPING = "damping=0.1,damping_rule=entry"
ITERATIONS = 10
SCALE = 1000
TITLES = {"cold": "cold", "cached": "cached", "products": "DataInf's two products alone"}


def as_matrices(row: Tensor, blocks: tuple[Block, ...]) -> Matrices:
    """One row as the released code keeps it."""
    return {block.name: row[block.columns].reshape(block.shape).clone() for block in blocks}


def dampings(train: list[Matrices]) -> dict[str, float]:
    """A tenth of the mean squared entry, of each matrix."""
    return {name: 0.1 * sum(float(torch.mean(row[name] ** 2)) for row in train) / len(train) for name in train[0]}


def loop_datainf(train: list[Matrices], query: Matrices, damping: dict[str, float]) -> Tensor:
    """(n,) scores of one query: (1 / n) sum_j (lambda I + g_j g_j^T)^{-1} v for each matrix, then dotted with every row."""
    solved = {}
    for name, v in query.items():
        total = torch.zeros_like(v)
        for row in train:
            g = row[name]
            share = torch.sum(v * g) / (damping[name] + torch.sum(g**2))
            total = total + (v - share * g) / (len(train) * damping[name])
        solved[name] = total
    return dotted(train, solved)


def loop_lissa(train: list[Matrices], query: Matrices, damping: dict[str, float]) -> Tensor:
    """(n,) scores of one query: r <- v + r - (H r - lambda r) / 1000 for each matrix, then dotted with every row."""
    solved = {}
    for name, v in query.items():
        current = v
        for _ in range(ITERATIONS):
            change = torch.zeros_like(v)
            for row in train:
                g = row[name]
                change = change + (torch.sum(g * current) * g - damping[name] * current) / len(train) / SCALE
            current = v + current - change
        solved[name] = current
    return dotted(train, solved)


def dotted(train: list[Matrices], solved: Matrices) -> Tensor:
    """(n,) sums over the matrices of sum(x * g)."""
    return torch.tensor([sum(float(torch.sum(x * row[name])) for name, x in solved.items()) for row in train])


LOOPS = {
    f"datainf:{DAMPING}": loop_datainf,
    f"lissa:iterations={ITERATIONS},recurrence=released,{DAMPING}": loop_lissa,
}


def floor(index: Index, asked: Tensor) -> float:
    """Seconds of (m, d) @ (d, n) and (m, n) @ (n, n) for every matrix, with the operands at hand."""
    total = 0.0
    for block in index.blocks:
        train, query = index.gradients(block.columns).contiguous(), asked[:, block.columns].contiguous()
        gram = train @ train.T
        started = time.perf_counter()
        (query @ train.T) @ gram
        total += time.perf_counter() - started
    return total


def main() -> None:
    """Print both times and the ratio, with the largest difference of a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    print(
        f"{args.queries} queries x {args.rows} rows x {width():,} entries, {torch.get_num_threads()} thread(s)",
        flush=True,
    )
    features = random_features(args.queries, width(), 10**6)
    for spec, loop in LOOPS.items():
        times: dict[str, list[float]] = {"loop": [], "cold": [], "cached": [], "products": []}
        apart = 0.0
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as work:
                write_index(Path(work) / "i", args.rows)
                index = Index(Path(work) / "i")
                train = [as_matrices(row, index.blocks) for row in index.gradients(slice(0, width()))]
                asked = as_matrices(features.gradients[0], index.blocks)
                damping = dampings(train)
                started = time.perf_counter()
                wanted = loop(train, asked, damping)
                times["loop"].append((time.perf_counter() - started) * args.queries)
                for name in ("cold", "cached"):
                    problem = Problem(index, queries(args.queries), features, memory=16 << 30, cache=4 << 30)
                    scores = make(spec).score(problem)
                    times[name].append(scores.seconds)
                times["products"].append(floor(index, features.gradients))
                found = torch.from_numpy(scores.values[0])
                apart = max(apart, float((found - wanted).norm() / wanted.norm()))
        base = statistics.median(times["loop"])
        print(
            f"{spec}: loop {base:,.0f} s (one query's, times {args.queries}), scores apart by {apart:.0e}", flush=True
        )
        for name in ("cold", "cached", "products") if loop is loop_datainf else ("cold", "cached"):
            ratios = sorted(a / b for a, b in zip(times["loop"], times[name], strict=True))
            print(
                f"  {TITLES[name]}: {statistics.median(times[name]):.2f} s, {statistics.median(ratios):,.0f} times faster "
                f"({ratios[0]:,.0f} to {ratios[-1]:,.0f}, {len(ratios)} rounds)",
                flush=True,
            )


if __name__ == "__main__":
    main()
