"""Tables, figures and sentences of the study `ground-truth`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetrace.attribution import make
from finetrace.evaluation.removal import CLASS
from finetrace.studies.ground_truth_drops import said
from finetrace.studies.plots import panels
from finetrace.studies.records import Records, cell, one, reach, tasks_of, where
from finetrace.tracing import SIMILAR

# shown on paper; the others stand in the records and in the table
DRAWN = (
    "exact",
    "exact:normalise=cosine",
    "exact:scope=joint",
    "exact:normalise=cosine,at=start",
    "ekfac",
    "ekfac:normalise=cosine,layers=last-half,at=start",
    "ekfac:at=start",
    "datainf",
    "gradcos",
    "gradsim",
    "gradsim:at=start",
    "gradcos:at=start",
    "repsim",
    "repsim:pooling=mean-response",
    SIMILAR,
    "bm25",
    "tfidf",
    "random",
)
PLAIN = ("gradsim", "gradcos", "gradsim:at=start", "gradcos:at=start")  # first order: no curvature
FAMILIES: dict[str, Callable[[str], bool]] = {
    "first-order": lambda spec: spec in PLAIN,
    "gradient": lambda spec: _gradient(spec),
}
RIVALS: tuple[str, ...] = ("repsim", "bm25", "random")
# and what sees the response: words and hidden states of the same text that the gradients are of
STRONGER: tuple[str, ...] = (
    *RIVALS,
    "repsim:pooling=mean-response",
    SIMILAR,
    "repsim:pooling=last-token",
    "bm25:text=response",
    "tfidf:text=response",
)


def _wide(records: Records, measure: str, places: int = 2) -> tuple[list[str], list[list[str]]]:
    """A line a method, a column a task."""
    specs = dict.fromkeys(r["spec"] for r in where(records, measure=measure))
    lines = [
        [
            spec,
            *(cell(one(records, measure=measure, task=task, spec=spec), places=places) for task in tasks_of(records)),
        ]
        for spec in specs
    ]
    return ["method", *tasks_of(records)], lines


def lds_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """LDS of every method on every task, and what was possible."""
    heads, lines = _wide(records, "lds")
    known = [one(records, measure="lds", task=task) for task in tasks_of(records)]
    lines.append(["two seeds agree by", *(cell(r, "ceiling") for r in known)])
    lines.append(["a perfect prediction would have", *(cell(r, "reachable") for r in known)])
    return heads, lines


def patch_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """Fall of each query's loss after a step on its top ten rows, nats a token."""
    return _wide(records, "tail-patch", 3)


def forest(records: Records) -> Any:
    """LDS with intervals, a panel a task; dotted where a perfect prediction would stand."""
    names = tasks_of(records)
    figure, axes = panels(len(names), height=2.9, sharey=True)
    there = {r["spec"] for r in where(records, measure="lds")}
    shown = [spec for spec in DRAWN if spec in there][::-1]
    for axis, task in zip(axes, names, strict=True):
        mine = where(records, measure="lds", task=task)
        for place, spec in enumerate(shown):
            r = one(mine, spec=spec)
            if r is None or r["value"] is None:
                continue
            axis.errorbar(
                r["value"], place, xerr=reach([r], "value"), marker="o", markersize=3, color="black", elinewidth=0.8
            )
        possible = mine[0].get("reachable")
        if possible is not None:
            axis.axvline(possible, color="0.4", linestyle=":", linewidth=1.0)
        axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set_yticks(range(len(shown)), shown, fontsize=5.5)
        axis.set_xlim(-0.7, 1.05)
        axis.set_xticks([-0.5, 0, 0.5, 1])
        axis.set_title(f"{task}\n{mine[0]['n_train']} rows, {mine[0]['n_queries']} queries", fontsize=7)
        axis.set_xlabel("LDS", fontsize=7)
    return figure


def reading(records: Records) -> list[str]:
    """What is seen, task by task and over all."""
    lines: list[str] = []
    there = {r["spec"] for r in where(records, measure="lds")}
    # a run of fewer methods is held against those that it has
    against = dict.fromkeys(tuple(name for name in names if name in there) for names in (RIVALS, STRONGER))
    against.pop((), None)
    ahead: dict[tuple[str, tuple[str, ...]], list[str]] = {(each, names): [] for names in against for each in FAMILIES}
    for task in tasks_of(records):
        mine = [r for r in where(records, measure="lds", task=task) if r["value"] is not None and r["spec"] != CLASS]
        if not mine:
            continue
        best = max(mine, key=lambda r: r["value"])
        possible = f" of a possible {best['reachable']:.2f}" if best.get("reachable") is not None else ""
        lines.append(
            f"{task}: the best LDS of {len(mine)} methods, seen afterwards, is {cell(best)}{possible} ({best['spec']})."
        )
        labels = [r for r in where(records, measure="lds", task=task, spec=CLASS) if r["value"] is not None]
        if labels:
            lines.append(
                f"{task}: labels alone, 1 for each row of the query's class, have an LDS of {cell(labels[0])}."
            )
        for names in against:
            rivals = [r for r in mine if r["spec"] in names]
            above = [
                r["spec"]
                for r in mine
                if _gradient(r["spec"]) and rivals and all(r["value_low"] > other["value_high"] for other in rivals)
            ]
            if above:
                lines.append(f"{task}: above {', '.join(names)} with intervals apart: {', '.join(above)}.")
            for family, belongs in FAMILIES.items():
                if any(belongs(spec) for spec in above):
                    ahead[family, names].append(task)
        lines += said(records, task)
    for (family, names), found in ahead.items():
        lines.append(
            f"A {family} method is above {', '.join(names)} with intervals apart on {len(found)} of {len(tasks_of(records))} "
            "tasks" + (f": {', '.join(found)}." if found else ".")
        )
    return lines


def _gradient(spec: str) -> bool:
    """Whether a method compares gradients, with a curvature or without, and is no control."""
    method = make(spec)
    return "gradients" in method.needs and not method.control
