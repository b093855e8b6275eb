"""What the studies' figures share: lines with intervals that read well in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetrace.studies.records import reach, settings, where

STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLUMN = 5.5  # inches, the column of a one-column paper; no text in a figure is below 6 points there


def panels(count: int, *, across: int = 2, height: float = 2.3, sharey: bool = False) -> tuple[Any, list[Any]]:
    """A figure as wide as a paper's column, and its axes, those that are left over hidden."""
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(COLUMN if across > 1 else 0.7 * COLUMN, height * down + 0.4), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    for axis in axes:
        axis.tick_params(labelsize=6.5)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def facets(
    records: Sequence[dict[str, Any]],
    draw: Callable[[Any, list[dict[str, Any]]], None],
    xlabel: str,
    ylabel: str,
    *,
    columns: int = 3,
    height: float = 2.3,
) -> Any:
    """A panel a task and protocol, drawn by `draw` from its records, with one legend below all."""
    cells = settings(records)
    figure, axes = panels(len(cells), height=height)
    for axis, (task, protocol) in zip(axes, cells, strict=True):
        cell = where(records, task=task, protocol=protocol)
        draw(axis, cell)
        axis.set_title(f"{task}, {protocol}{_counts(cell)}", fontsize=6.5)
        axis.set_xlabel(xlabel, fontsize=7)
        axis.set_ylabel(ylabel, fontsize=7)
    legend(figure, axes, columns)
    return figure


def _counts(records: Sequence[dict[str, Any]]) -> str:
    """How many rows and queries, where that is known."""
    if "n_train" not in records[0]:
        return ""
    queries = sorted({r["n_queries"] for r in records})
    many = str(queries[0]) if len(queries) == 1 else f"{queries[0]} to {queries[-1]}"
    return f": {records[0]['n_train']} rows, {many} queries"


def whole(axis: Any) -> None:
    """Ticks at whole numbers alone."""
    axis.xaxis.get_major_locator().set_params(integer=True)


def logarithmic(axis: Any) -> None:
    """Values on a logarithmic scale, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


def line(
    axis: Any,
    place: int,
    x: Sequence[float],
    records: Sequence[dict[str, Any]],
    metric: str,
    label: str,
    scale: float = 1.0,
    *,
    apart: bool = True,
    side_by_side: int = len(MARKS),
) -> None:
    """A metric of `summary` over `x` with its intervals as bars; `place` picks the dash, the mark, the shade and a small shift.

    Marks are hollow from the ninth on. The shift, to the side and in points, keeps marks and bars of methods `apart` that
    are equally good; `side_by_side` of them stand around the true place.
    """
    from matplotlib.transforms import ScaledTranslation

    shade = str(0.65 * (place % 8) / 7)
    values = [float("nan") if r[metric] is None else scale * r[metric] for r in records]
    beside = 1.2 * (place % side_by_side - (side_by_side - 1) / 2) if apart else 0.0
    shift = ScaledTranslation(beside / 72, 0, axis.figure.dpi_scale_trans)
    drawn = axis.errorbar(
        x,
        values,
        yerr=reach(records, metric, scale),
        color=shade,
        linewidth=1.0,
        elinewidth=0.5,
        label=label,
        linestyle=STYLES[place % len(STYLES)],
        marker=MARKS[place % len(MARKS)],
        markersize=3,
        **({"markerfacecolor": "white"} if place >= len(MARKS) else {}),
    )
    for artist in (drawn.lines[0], *drawn.lines[2]):  # only now: the axes' limits are taken without it
        artist.set_transform(axis.transData + shift)


def legend(figure: Any, axes: Sequence[Any], columns: int = 4) -> None:
    """One for all panels, below them, each label once; a narrow figure has room for two columns."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    columns = columns if figure.get_figwidth() >= COLUMN else min(columns, 2)
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=columns, fontsize=7)
