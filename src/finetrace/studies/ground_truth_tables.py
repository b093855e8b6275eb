"""Tables, figures and sentences of the study `ground-truth`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetrace.attribution import make
from finetrace.evaluation.removal import CLASS, RANDOM
from finetrace.studies.plots import legend, line, panels, whole
from finetrace.studies.records import Records, reach, where
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


def tasks(records: Records) -> list[str]:
    """In the order they come."""
    return list(dict.fromkeys(r["task"] for r in records))


def _cell(record: dict[str, Any] | None, name: str = "value", sign: str = "", places: int = 2) -> str:
    if record is None or record.get(name) is None:
        return "-"
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    form = f"{sign}.{places}f"
    ends = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{record[name]:{form}}{ends}"


def _one(records: Records, **values: Any) -> dict[str, Any] | None:
    found = where(records, **values)
    return found[0] if found else None


def _wide(records: Records, measure: str, places: int = 2) -> tuple[list[str], list[list[str]]]:
    """A line a method, a column a task."""
    specs = dict.fromkeys(r["spec"] for r in where(records, measure=measure))
    lines = [
        [spec, *(_cell(_one(records, measure=measure, task=task, spec=spec), places=places) for task in tasks(records))]
        for spec in specs
    ]
    return ["method", *tasks(records)], lines


def lds_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """LDS of every method on every task, and what was possible."""
    heads, lines = _wide(records, "lds")
    known = [_one(records, measure="lds", task=task) for task in tasks(records)]
    lines.append(["two seeds agree by", *(_cell(r, "ceiling") for r in known)])
    lines.append(["a perfect prediction would have", *(_cell(r, "reachable") for r in known)])
    return heads, lines


def patch_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """Fall of each query's loss after a step on its top ten rows, nats a token."""
    return _wide(records, "tail-patch", 3)


def drop_table(records: Records) -> tuple[list[str], list[list[str]]]:
    """A line a task, removal and number of rows."""
    lines = [
        [r["task"], r["method"], str(r["removed"]), _cell(r), _cell(r, "over_random", "+")]
        for r in where(records, measure="drop")
    ]
    return ["task", "removed", "rows", "rise of loss, nats", "minus random"], lines


def forest(records: Records) -> Any:
    """LDS with intervals, a panel a task; dotted where a perfect prediction would stand."""
    names = tasks(records)
    figure, axes = panels(len(names), height=2.9, sharey=True)
    there = {r["spec"] for r in where(records, measure="lds")}
    shown = [spec for spec in DRAWN if spec in there][::-1]
    for axis, task in zip(axes, names, strict=True):
        mine = where(records, measure="lds", task=task)
        for place, spec in enumerate(shown):
            r = _one(mine, spec=spec)
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


def curves(records: Records) -> Any:
    """Rise of the queries' loss over the rows removed, a panel a task."""
    names = tasks(records)
    figure, axes = panels(len(names), height=2.3)
    for axis, task in zip(axes, names, strict=True):
        mine = where(records, measure="drop", task=task)
        for place, name in enumerate(dict.fromkeys(r["method"] for r in mine)):
            points = sorted(where(mine, method=name), key=lambda r: r["removed"])
            line(axis, place, [r["removed"] for r in points], points, "value", name)
        whole(axis)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set_title(f"{task}: {mine[0]['n_train']} rows", fontsize=7)
        axis.set_xlabel("training rows removed", fontsize=7)
        axis.set_ylabel("rise of loss, nats", fontsize=7)
    legend(figure, axes, 2)
    return figure


def reading(records: Records) -> list[str]:
    """What is seen, task by task and over all."""
    lines: list[str] = []
    ahead: dict[tuple[str, tuple[str, ...]], list[str]] = {
        (family, names): [] for names in (RIVALS, STRONGER) for family in FAMILIES
    }
    for task in tasks(records):
        mine = [r for r in where(records, measure="lds", task=task) if r["value"] is not None and r["spec"] != CLASS]
        if not mine:
            continue
        best = max(mine, key=lambda r: r["value"])
        possible = f" of a possible {best['reachable']:.2f}" if best.get("reachable") is not None else ""
        lines.append(
            f"{task}: the best LDS of {len(mine)} methods, seen afterwards, is {_cell(best)}{possible} ({best['spec']})."
        )
        labels = [r for r in where(records, measure="lds", task=task, spec=CLASS) if r["value"] is not None]
        if labels:
            lines.append(
                f"{task}: labels alone, 1 for each row of the query's class, have an LDS of {_cell(labels[0])}."
            )
        for names in (RIVALS, STRONGER):
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
        for count in dict.fromkeys(r["removed"] for r in where(records, measure="drop", task=task)):
            here = where(records, measure="drop", task=task, removed=count)
            told = [
                r["method"] for r in here if (r.get("over_random_low") or 0) > 0 and r["spec"] not in (CLASS, RANDOM)
            ]
            idle = [
                r["method"]
                for r in here
                if r["spec"] not in (CLASS, RANDOM) and not (r.get("over_random_low") or 0) > 0
            ]
            lines.append(
                f"{task}, {count} rows removed: loss rises by more than without {count} random ones for "
                f"{', '.join(told) or 'no method'}" + (f"; not told apart: {', '.join(idle)}." if idle else ".")
            )
    for (family, names), there in ahead.items():
        lines.append(
            f"A {family} method is above {', '.join(names)} with intervals apart on {len(there)} of {len(tasks(records))} "
            "tasks" + (f": {', '.join(there)}." if there else ".")
        )
    return lines


def _gradient(spec: str) -> bool:
    """Whether a method compares gradients, with a curvature or without, and is no control."""
    method = make(spec)
    return "gradients" in method.needs and not method.control
