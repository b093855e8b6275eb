"""Whether taking the mean off helps gradients as it helps hidden states: python benchmarks/centred_gradients.py [--out choose].

On the indexes that `choose_method.py` left: AUPRC of each curvature's cosine, and of the cosine after the mean of the training
gradients was taken off, K(q, x) - K(q, .) - K(., x) + K(., .) over the length of what is left of x, in the kernel K of the
method. Ordered by the mean of the same tasks as there.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from choose_method import mean_of, not_solved
from development_tasks import BEHAVIOUR, CLASSES
from finetrace.attribution import Problem, make
from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.index.store import open_index
from finetrace.reading import read_examples

GRID = [
    f"{curvature}:loss_on={loss},layers={layers},at={at}"
    for curvature, loss, layers, at in product(
        ("ekfac", "datainf", "gradsim"), ("response", "first:20"), ("all", "last-half"), ("start", "end")
    )
]


def cosines(asked: NDArray[np.float64], among: NDArray[np.float64], *, centred: bool) -> NDArray[np.float64]:
    """(m, n) cosines up to a factor a query, from products with the training rows (m, n) and of these among themselves."""
    squares = np.diag(among)
    if centred:
        middle, whole = among.mean(0), among.mean()
        asked = asked - asked.mean(1, keepdims=True) - middle + whole
        squares = squares - 2 * middle + whole
    return np.asarray(asked / np.sqrt(squares))


def main() -> None:
    """Print the order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("choose"))
    args = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    for name in (*BEHAVIOUR, *CLASSES):
        folder = args.out / name
        train, queries = (read_examples(folder / f"{part}.jsonl") for part in ("train", "queries"))
        relevant = relevance([row.label for row in train], [query.label for query in queries])
        scores, index = load_file(folder / "scores.safetensors"), open_index(folder / "index")
        itself = Problem(index, train, kept_queries=index)
        for spec in GRID:
            method = make(spec)
            asked, among = scores[method.label].astype(np.float64), method.score(itself).values
            for centred in (False, True):
                found = METRICS["auprc"](cosines(asked, among, centred=centred), relevant)
                table.setdefault(f"{spec}{',centred' * centred}", {})[name] = float(np.nanmean(found))
    counted = not_solved(args.out, (*BEHAVIOUR, *CLASSES))
    for mean, spec in sorted(((mean_of(values, counted), spec) for spec, values in table.items()), reverse=True):
        print(f"{mean:.3f} {spec}")


if __name__ == "__main__":
    main()
