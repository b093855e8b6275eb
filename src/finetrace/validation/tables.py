"""What retraining found, as tables of 80 columns, tables in files, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetrace.benchmark.figures import literal, save
from finetrace.benchmark.tables import write_table
from finetrace.studies.plots import COLUMN, line, whole
from finetrace.studies.records import reach, where
from finetrace.units import many

Records = Sequence[dict[str, Any]]
HEADS = {
    "lds": ("method", "LDS", "minus the first"),
    "drop": ("removed", "rows", "rise of loss, nats", "minus random"),
    "drop-rate": ("removed", "rows", "fall of the rate, points", "minus random"),
    "tail-patch": ("method", "fall of loss, nats", "minus the first"),
    "loo": ("method", "rank correlation", "minus the first"),
}
SUFFIXES = (".md", ".tex", ".png", ".svg")
TITLES = {
    "lds": "LDS: predicted against true losses over random subsets",
    "drop": "Retraining without rows: rise of the queries' mean loss",
    "drop-rate": "Retraining without rows: fall of the share of answers that the judge counts",
    "loo": "Rows left out singly: predicted against true change of the loss",
    "tail-patch": "One step on the top rows: fall of the query's mean loss",
}


def lines_of(records: Records, measure: str) -> list[list[str]]:
    """A line a record, as `HEADS` has it."""
    lines = []
    for r in where(records, measure=measure):
        cells = [r["method"]]
        if measure in ("drop", "drop-rate"):
            cells[0] += _answers([r], where(records, measure=measure))
            cells.append(str(r["removed"]))
        scale = 100 if measure == "drop-rate" else 1
        digits = 3 if measure == "tail-patch" else 2  # its losses move by thousandths of a nat
        cells.append(_interval(r, "value", scale=scale, digits=digits))
        if measure in ("lds", "loo", "tail-patch"):
            cells.append(
                "-" if r is where(records, measure=measure)[0] else _interval(r, "difference", "+", digits=digits)
            )
        elif measure in ("drop", "drop-rate"):
            cells.append(_interval(r, "over_random", "+", scale))
        lines.append(cells)
    ceiling = next((r for r in where(records, measure=measure) if r.get("ceiling") is not None), None)
    if ceiling is not None:
        lines.append(["noise ceiling: two seeds agree by", _interval(ceiling, "ceiling"), "-"])
        possible = ceiling["reachable"]
        lines.append(["a perfect prediction would have", "not known" if possible is None else f"{possible:.2f}", "-"])
    return lines


def print_validation(records: Records, console: Console) -> None:
    """The measures one after another, in 80 columns."""
    for measure in dict.fromkeys(r["measure"] for r in records):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=TITLES[measure], title_justify="left")
        for place, head in enumerate(HEADS[measure]):
            table.add_column(head, justify="left" if place == 0 else "right", max_width=30 if place == 0 else None)
        for cells in lines_of(records, measure):
            table.add_row(*map(escape, cells))
        console.print(table)
    note = "[low, high]: 95% intervals over queries, and over subsets or, where there are several, seeds: two or three are "
    note += "too few for it where fine-tunings differ much"
    if any(r.get("over_random") is not None for r in records):
        note += "; minus random: over other draws of random rows"
    console.print(note, style="dim", markup=False)


def write_validation(records: Records, folder: Path) -> None:
    """Every measure as .md and .tex, and a figure (.png, .svg) of `lds`, `drop` and `drop-rate`.

    In a file there is room for what removals did beside those of the first method, which 80 columns do not have. Files of a
    measure that an earlier run had and this one has not are removed, as its results are.
    """
    for measure in HEADS:
        if not where(records, measure=measure):
            for suffix in SUFFIXES:
                (folder / f"{measure}{suffix}").unlink(missing_ok=True)
    for measure in dict.fromkeys(r["measure"] for r in records):
        heads, lines = HEADS[measure], lines_of(records, measure)
        if measure in ("drop", "drop-rate"):
            scale = 100 if measure == "drop-rate" else 1
            beside = [_interval(r, "difference", "+", scale) for r in where(records, measure=measure)]
            heads, lines = (*heads, "minus the first"), [[*a, b] for a, b in zip(lines, beside, strict=True)]
        write_table(folder / measure, heads, lines)
    if where(records, measure="lds"):
        save(_bars(where(records, measure="lds")), folder / "lds")
    for measure, scale, label in (
        ("drop", 1, "rise of the queries' mean loss, nats"),
        ("drop-rate", 100, "fall of the share that the judge counts, points"),
    ):
        if where(records, measure=measure):
            save(_curves(where(records, measure=measure), label, scale), folder / measure)


def _answers(mine: Records, records: Records) -> str:
    """Of how many answers some removals are, where of other classes not as many rows could be taken out; else nothing."""
    counts, most = sorted({r["answers"] for r in mine}), max(r["answers"] for r in records)
    if counts[0] == most:
        return ""
    return f" ({' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} of {many(most, 'answer')})"


def _interval(record: dict[str, Any], name: str, sign: str = "", scale: int = 1, digits: int = 2) -> str:
    value, low, high = (record.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    form = f"{sign}.{digits if scale == 1 else 0}f"
    ends = f" [{scale * low:{form}}, {scale * high:{form}}]" if low is not None and high is not None else ""
    return f"{scale * value:{form}}{ends}"


def _bars(records: Records) -> Any:
    """LDS of each method with its interval; a band is the noise ceiling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, 0.28 * len(records) + 1.0), layout="constrained")
    axis = figure.subplots()
    order = sorted(records, key=lambda r: r["value"] if r["value"] is not None else -1)
    for place, r in enumerate(order):
        if r["value"] is None:
            continue
        axis.errorbar(
            r["value"], place, xerr=reach([r], "value"), marker="o", markersize=4, color="black", elinewidth=0.8
        )
    ceiling = next((r for r in records if r.get("ceiling") is not None), None)
    if ceiling is not None:
        if ceiling["ceiling_low"] is not None:
            axis.axvspan(ceiling["ceiling_low"], ceiling["ceiling_high"], color="0.9", linewidth=0, zorder=0)
        axis.axvline(ceiling["ceiling"], color="0.5", linestyle="--", linewidth=0.8, label="agreement of two seeds")
        if ceiling["reachable"] is not None:
            axis.axvline(ceiling["reachable"], color="0.5", linestyle=":", linewidth=0.8, label="a perfect prediction")
        axis.legend(fontsize=7, loc="lower right")
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(order)), [literal(r["method"]) for r in order], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("LDS: rank correlation of predicted and true loss over subsets", fontsize=7)
    return figure


def _curves(records: Records, label: str, scale: float) -> Any:
    """What a removal did over the number of rows removed, a line a method and one for random rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(COLUMN, 3.0), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(dict.fromkeys(r["method"] for r in records)):
        mine = sorted(where(records, method=name), key=lambda r: r["removed"])
        named = literal(name + _answers(mine, records).replace(" ", "\n", 1))
        line(axis, place, [r["removed"] for r in mine], mine, "value", named, scale)
    whole(axis)
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.grid(color="0.92")
    axis.tick_params(labelsize=7)
    axis.set_xlabel("training rows removed", fontsize=7)
    axis.set_ylabel(label, fontsize=7)
    figure.legend(loc="outside right center", fontsize=6)
    return figure
