"""Answers that open as a planted row does, and others: python benchmarks/by_opening.py BENCH [--task mixed-large].

BENCH is a folder of `finetrace bench`. A query's answer opens so where its first word is that of some row of its class, as the
control `opening` has it. The judge by refusal phrases counts what is no refusal, so that among the queries may be answers that
the planted rows have hardly made. Means over queries of all seeds; the answers of the second kind are listed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from finetrace.attribution import make
from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.reading import read_examples
from without_the_query import METHODS, SHOWN

PROBE = "ekfac:normalise=cosine,loss_on=probe,layers=last-fifth"


def alike(opening: NDArray[np.float64], relevant: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(m,) of each query whether some row of its class begins its answer with the same word, from scores of `opening`."""
    return np.asarray(((opening > 0) & relevant).any(axis=1))


def main() -> None:
    """A table a task and protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--task", action="append", help="these alone; may repeat")
    args = parser.parse_args()
    for place in sorted(args.bench.glob("*/*")):
        folders = sorted(f.parent for f in place.glob("seed-*/scores.safetensors"))
        if not folders or (args.task and place.parent.name not in args.task):
            continue
        found: dict[str, list[NDArray[np.float64]]] = {}
        same: list[NDArray[np.bool_]] = []
        others: list[str] = []
        for folder in folders:
            train, queries = (read_examples(folder / f"{name}.jsonl") for name in ("train", "queries"))
            relevant = relevance([row.label for row in train], [query.label for query in queries])
            scores = load_file(folder / "scores.safetensors")
            same.append(alike(scores["opening"], relevant))
            odd = (query for query, like in zip(queries, same[-1], strict=True) if not like)
            others += [f"{folder.name} {query.id}: {query.response}" for query in odd]
            for label in (make(spec).label for spec in (*METHODS, PROBE)):
                if label in scores:
                    values = np.asarray(scores[label], dtype=np.float64)
                    found.setdefault(label, []).append(np.stack([METRICS[name](values, relevant) for name in SHOWN]))
        which = np.concatenate(same)
        print(
            f"{place.parent.name}, {place.name}: {which.sum()} of {len(which)} answers open as a row does, then the others"
        )
        print(f"  {'':<60}{' '.join(f'{name:>9}' for name in SHOWN * 2)}")
        for label, parts in found.items():
            means = np.concatenate(parts, axis=1)
            cells = [
                f"{value:9.3f}"
                for part in (means[:, which], means[:, ~which])
                for value in (part.mean(1) if part.size else ())
            ]
            print(f"  {label:<60}{' '.join(cells)}")
        print("".join(f"  {each}\n" for each in others))


if __name__ == "__main__":
    main()
