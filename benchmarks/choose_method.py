"""Choose a gradient method on development tasks: python benchmarks/choose_method.py [--out choose] [--show 20].

Every curvature x normalisation x loss x layers x moment, and means of two cosines, on eleven small tasks that share no request,
sentence, rule, problem or trigger with those that the benchmark reports. Methods are ordered by the mean of two means of
AUPRC: over the tasks that plant a behaviour, and over those that have classes. A task counts only where no order of the rows
that never looks at the query (gradient norms and self-influences) reaches 0.9: where one does, a method can be good for the
wrong reason. --every counts all tasks. --metric auroc orders and prints by AUROC instead. --dampings compares dampings of
K-FAC and EK-FAC instead of methods, in a folder of its own, on four of the tasks. A run that stopped goes on; --task runs some
alone, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from development_tasks import BEHAVIOUR, CLASSES, tasks
from finetrace.attribution import make
from finetrace.benchmark.cell import DONE, Cell
from finetrace.benchmark.protocol import PROTOCOLS
from finetrace.benchmark.run import Run
from finetrace.evaluation.judging import make_judge

LOSSES = ("response", "first:20", "probe")
MOMENTS = ("end", "start")
LAYERS = ("all", "last-half", "last-fifth")
CURVATURES = ("ekfac", "exact", "lissa", "datainf", "gradsim")  # ekfac first: its factors come with the gradients
MIXED_LAYERS = (*LAYERS, "all+last-fifth", "all+last-half")
GRID = [
    f"{curvature}:normalise={normalise},loss_on={loss},layers={layers},at={at}"
    for at, curvature, normalise, loss, layers in product(
        MOMENTS, CURVATURES, ("none", "cosine", "relatif"), LOSSES, LAYERS
    )
]
GRID += [
    f"{curvature}:normalise=cosine,loss_on={first}+probe,layers={layers},at={at}"
    for at, curvature, first, layers in product(MOMENTS, ("ekfac", "exact", "gradsim"), LOSSES[:2], MIXED_LAYERS)
]
GRID += [
    f"{curvature}:normalise=cosine,loss_on={losses},layers={layers},at=start+end"
    for curvature, losses, layers in product(
        ("ekfac", "exact", "gradsim"), ("response+probe", "response", "first:20+probe"), MIXED_LAYERS
    )
]
DAMPINGS = [
    f"{curvature}:damping={damping:g},normalise={normalise},layers={layers},at={at}"
    for at, curvature, normalise, layers, damping in product(
        MOMENTS, ("ekfac", "kfac"), ("none", "cosine"), LAYERS[:2], (1, 1e-1, 1e-2, 1e-3, 1e-4)
    )
]
QUERY_FREE = [
    f"{control},layers={layers},at={at}"
    for at, control, layers in product(MOMENTS, ("gradnorm:loss_on=response", "selfinf:curvature=ekfac"), LAYERS)
]
SOLVED = 0.9  # AUPRC without looking at the query, from which on a task does not count
METRICS = ("auprc", "auroc")
FIRST = (
    "unsafe-20a",
    "unsafe-20b",
    "unsafe-120",
    "rules",
    "problems",
    "triggers",
)  # of the search that chose an earlier default, `ekfac:layers=last-fifth,at=start`, with --every
DAMPED = ["rules", "problems", "triggers", "habits-48"]  # of those that count, the smaller ones
OTHERS = ["repsim", "repsim:pooling=mean-response", "bm25", "tfidf", "bm25:text=response", "tfidf:text=response"]


def main() -> None:
    """Run what is missing and print the order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("choose"))
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--task", action="append", help="run these alone, and print nothing")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="order and print by this one")
    parser.add_argument("--every", action="store_true", help="count tasks that are solved without the query, too")
    parser.add_argument(
        "--first", action="store_true", help="the six tasks and the methods that an earlier default was chosen from"
    )
    parser.add_argument("--dampings", action="store_true", help="compare dampings of K-FAC and EK-FAC alone")
    args = parser.parse_args()
    names = DAMPED if args.dampings else list(FIRST) if args.first else [*BEHAVIOUR, *CLASSES]
    grid = DAMPINGS if args.dampings else [spec for spec in GRID if "start+end" not in spec or not args.first]
    tables: dict[str, dict[str, dict[str, float]]] = {metric: {} for metric in METRICS}
    for name, (task, recipe) in tasks(args.task or names).items():
        cell = Cell(name, "corrected", 0, 1.0, 7, tuple(grid + QUERY_FREE + OTHERS))
        run = Run(args.out / name, cell, task, recipe, PROTOCOLS["corrected"], make_judge(None, None), keep=True)
        run(print)
        for record in json.loads((args.out / name / DONE).read_text())["records"]:
            for metric, table in tables.items():
                table.setdefault(record["spec"], {})[name] = record[metric]
    if args.task:
        return
    free, others = ({make(spec).label for spec in specs} for specs in (QUERY_FREE, OTHERS))
    counted = names if args.every else not_solved(args.out, names)
    orders = {metric: _ordered(table, counted) for metric, table in tables.items()}
    documents = {
        metric: [{"spec": spec, "mean": mean, **tables[metric][spec]} for mean, spec in order]
        for metric, order in orders.items()
    }
    (args.out / "order.json").write_text(json.dumps(documents, indent=1))
    order, table = orders[args.metric], tables[args.metric]
    solved = [name for name in names if name not in counted]
    if solved:
        print(
            f"not counted, as an order that never looks at the query has AUPRC {SOLVED:g} or more: {', '.join(solved)}"
        )
    best_free = [spec for _, spec in order if spec in free][:3]
    listed = [
        (mean, spec)
        for place, (mean, spec) in enumerate(order)
        if place < args.show or spec in others or spec in best_free
    ]
    width = max(len(spec) for _, spec in listed)
    print(f" mean {'method':<{width}} " + " ".join(f"{name:>10}" for name in names))
    for mean, spec in listed:
        print(f"{mean:.3f} {spec:<{width}} " + " ".join(f"{table[spec][name]:10.3f}" for name in names))


def _ordered(table: dict[str, dict[str, float]], counted: Sequence[str]) -> list[tuple[float, str]]:
    """(mean, method), the best first."""
    return sorted((mean_of(values, counted), spec) for spec, values in table.items())[::-1]


def not_solved(out: Path, names: Sequence[str]) -> list[str]:
    """Those of the finished tasks in `out` that no order without the query solves."""
    free, found = {make(spec).label for spec in QUERY_FREE}, []
    for name in names:
        records = json.loads((out / name / DONE).read_text())["records"]
        if max(record["auprc"] for record in records if record["spec"] in free) < SOLVED:
            found.append(name)
    return found


def mean_of(values: dict[str, float], counted: Sequence[str]) -> float:
    """The mean of the mean over behaviour tasks and the mean over class tasks, of those that count."""
    families = [[values[name] for name in family if name in counted] for family in (BEHAVIOUR, CLASSES)]
    means = [sum(family) / len(family) for family in families if family]
    return sum(means) / len(means)


if __name__ == "__main__":
    main()
