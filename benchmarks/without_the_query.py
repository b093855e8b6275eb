"""How much of a benchmark's result the query decides: python benchmarks/without_the_query.py BENCH [--task mixed-large].

BENCH is a folder of `finetrace bench`. Beside the metrics of each method on a query stand those of the mean of its scores for
all *other* queries, each in standard deviations over the rows: where every query asks for the same class and the others do as
well, a method finds the class and nothing says that it finds a query's own rows. A rule that looks at neither model nor query,
whether the first sentence of a row's answer ends in an exclamation mark, is the last line. Means over queries and seeds.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tracing import BEST, UNASKED

METHODS = (
    BEST,
    "ekfac:layers=last-fifth,at=start",
    "ekfac:normalise=cosine,layers=last-fifth,at=start",
    "ekfac:at=start",
    "gradcos:at=start",
    "gradcos",
    "repsim",
    "repsim:pooling=mean-response",
    "bm25:text=response",
    UNASKED,
    "gradnorm:at=start",
)
RULE = "first sentence ends in !"
SHOWN = ("accuracy", "coverage", "auroc", "auprc")


def others(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m, n) for each query the mean over all other queries of their scores in standard deviations over the rows."""
    spread = scores.std(axis=1, keepdims=True)
    z = (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return np.asarray((z.sum(axis=0, keepdims=True) - z) / (len(z) - 1))


def exclaims(rows: list[Example]) -> NDArray[np.float64]:
    """(n,) 1 where the first sentence of the answer ends in an exclamation mark, else 0."""
    first = [re.split(r"(?<=[.!?])\s", row.response.strip())[0] for row in rows]
    return np.array([float(sentence.endswith("!")) for sentence in first])


def compare(folder: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By method, each metric's value of each query by its own scores, and under `others` by those for the other queries."""
    train, queries = (read_examples(folder / f"{name}.jsonl") for name in ("train", "queries"))
    relevant = relevance([row.label for row in train], [query.label for query in queries])
    scores = {
        name: np.asarray(matrix, dtype=np.float64) for name, matrix in load_file(folder / "scores.safetensors").items()
    }
    kept = {name: scores[name] for name in METHODS if name in scores}
    kept[RULE] = np.tile(exclaims(train), (len(queries), 1))
    found: dict[str, dict[str, Any]] = {}
    for name, matrix in kept.items():
        own = {key: METRICS[key](matrix, relevant) for key in SHOWN}
        found[name] = own | {f"{key} by others": METRICS[key](others(matrix), relevant) for key in SHOWN}
    return found


def main() -> None:
    """A table a task and protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--task", action="append", help="these alone; may repeat")
    args = parser.parse_args()
    for place in sorted(args.bench.glob("*/*")):
        folders = [
            f
            for f in sorted(place.glob("seed-*"))
            if (f / "queries.jsonl").exists() and (f / "scores.safetensors").exists()
        ]
        folders = [f for f in folders if len(read_examples(f / "queries.jsonl")) > 1]
        if not folders or (args.task and place.parent.name not in args.task):
            continue
        seeds = [compare(folder) for folder in folders]
        print(f"{place.parent.name}, {place.name}: {len(folders)} seeds; own scores | scores for the other queries")
        rows = read_examples(folders[0] / "train.jsonl")
        for label, count in Counter(row.label for row in rows).items():
            mine = exclaims([row for row in rows if row.label == label])
            print(f"  {label}: the first sentence of {mine.sum():.0f} of {count} answers ends in !")
        print(f"  {'':<52}" + " | ".join("  ".join(f"{key:>8}" for key in SHOWN) for _ in range(2)))
        for name in seeds[0]:
            halves = []
            for ending in ("", " by others"):
                values = [
                    np.nanmean([np.nanmean(seed[name][key + ending]) for seed in seeds if name in seed])
                    for key in SHOWN
                ]
                halves.append("  ".join(f"{value:8.3f}" for value in values))
            print(f"  {name:<52}" + " | ".join(halves))


if __name__ == "__main__":
    main()
