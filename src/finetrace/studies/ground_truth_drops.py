"""What removing the top rows of every method did: tables, curves and sentences of the study `ground-truth`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scipy.stats import spearmanr

from finetrace.evaluation.removal import CLASS, RANDOM
from finetrace.studies.plots import legend, line, panels, whole
from finetrace.studies.records import Records, cell, one, tasks_of, where
from finetrace.tracing import BEST, SIMILAR
from finetrace.units import many

# told apart in the figure; all others are thin lines there, and stand in the tables
DRAWN = (BEST, "exact", "datainf", SIMILAR, "repsim", "bm25:text=response", RANDOM, CLASS)
HEAD = "removed; rise of loss over random, nats (* sure of all methods)"
FEW = 6  # so many names are said; of more methods their number alone


def counts_of(records: Records, task: str) -> list[int]:
    """How many rows were removed, rising."""
    return sorted({r["removed"] for r in where(records, measure="drop", task=task)})


def drop_tables(records: Records) -> dict[str, tuple[list[str], list[list[str]]]]:
    """One for the smallest number of removed rows of each task, one for the next, and so on.

    A line a method with what its top rows did beyond as many random ones; below them stands what those did themselves.
    """
    names = tasks_of(records)
    counts = {task: counts_of(records, task) for task in names}
    tables = {}
    for place in range(max((len(each) for each in counts.values()), default=0)):
        here = {task: each[place] for task, each in counts.items() if place < len(each)}
        heads = [f"{task}: {count} of {_rows(records, task)}" for task, count in here.items()]
        found = {
            task: {r["spec"]: r for r in where(records, measure="drop", task=task, removed=n)}
            for task, n in here.items()
        }
        specs = [spec for spec in dict.fromkeys(spec for each in found.values() for spec in each) if spec != RANDOM]
        lines = [[spec, *(_mark(each.get(spec)) for each in found.values())] for spec in specs]
        lines.append([f"{RANDOM} themselves", *(cell(each.get(RANDOM)) for each in found.values())])
        tables[f"ground-truth-drop-{place + 1}"] = ([HEAD, *heads], lines)
    return tables


def _rows(records: Records, task: str) -> int:
    return int(where(records, task=task)[0]["n_train"])


def _mark(record: dict[str, Any] | None) -> str:
    """Beyond chance; a star where that holds with all methods taken into account."""
    return cell(record, "over_random", "+") + (" *" if record and record.get("above_chance") else "")


def curves(records: Records) -> Any:
    """Rise of the queries' loss over the rows removed, a panel a task."""
    names = tasks_of(records)
    figure, axes = panels(len(names), height=2.3)
    for axis, task in zip(axes, names, strict=True):
        mine = where(records, measure="drop", task=task)
        for spec in dict.fromkeys(r["spec"] for r in mine if r["spec"] not in DRAWN):
            points = sorted(where(mine, spec=spec), key=lambda r: r["removed"])
            axis.plot(
                [r["removed"] for r in points], [r["value"] for r in points], color="0.8", linewidth=0.6, zorder=1
            )
        axis.plot([], [], color="0.8", linewidth=0.6, label="every other method")
        for place, spec in enumerate(spec for spec in DRAWN if where(mine, spec=spec)):
            points = sorted(where(mine, spec=spec), key=lambda r: r["removed"])
            line(axis, place, [r["removed"] for r in points], points, "value", points[0]["method"])
        whole(axis)
        axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        axis.set_title(f"{task}: {_rows(records, task)} rows", fontsize=7)
        axis.set_xlabel("training rows removed", fontsize=7)
        axis.set_ylabel("rise of loss, nats", fontsize=7)
    legend(figure, axes, 2)
    return figure


def said(records: Records, task: str) -> Iterator[str]:
    """What removing rows of one task showed."""
    for count in counts_of(records, task):
        here = [r for r in where(records, measure="drop", task=task, removed=count) if r["spec"] not in (CLASS, RANDOM)]
        if not here:
            continue
        told = [r for r in here if (r.get("over_random_low") or 0) > 0]
        sure = [r for r in here if r.get("above_chance")]
        best = max(here, key=lambda r: r["value"])
        alike = sum(r["value"] == best["value"] for r in here) - 1  # the same rows, or rows that do the same
        others = f" and {many(alike, 'other')}" if alike else ""
        text = (
            f"{task}, {count} rows removed: loss rises by more than without {count} random ones for "
            f"{_named(told, len(here))}, with all of them taken into account for {_named(sure, len(here))}; "
            f"most by {best['spec']}{others} ({cell(best, 'over_random', '+')} more), seen afterwards"
        )
        labels = one(records, measure="drop", task=task, removed=count, spec=CLASS)
        yield text + (f"; rows of the class {cell(labels, 'over_random', '+')}." if labels else ".")
    largest = max(counts_of(records, task), default=0)
    rises = {r["spec"]: r["value"] for r in where(records, measure="drop", task=task, removed=largest)}
    scores = {r["spec"]: r["value"] for r in where(records, measure="lds", task=task) if r["value"] is not None}
    both = [spec for spec in scores if spec in rises and spec != CLASS]
    if len(both) > 2:
        alike = float(spearmanr([scores[spec] for spec in both], [rises[spec] for spec in both]).statistic)
        yield f"{task}: over {len(both)} methods, LDS and the rise without {largest} rows are rank-correlated by {alike:.2f}."


def _named(found: Records, of: int) -> str:
    if not found:
        return f"none of {of} methods"
    if len(found) == of:
        return f"all {of} methods"
    names = ", ".join(r["spec"] for r in found)
    return f"{len(found)} of {of} methods" + (f" ({names})" if len(found) <= FEW else "")
