"""What the studies' figures share: lines with intervals that read well in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def panels(count: int, *, across: int = 2, height: float = 2.3, sharey: bool = False) -> tuple[Any, list[Any]]:
    """A figure as wide as a page of two columns, and its axes, those that are left over hidden."""
    from matplotlib.figure import Figure

    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(7.0 if across > 1 else 4.0, height * down + 0.4), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.grid(color="0.92")
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def line(
    axis: Any,
    place: int,
    x: Sequence[float],
    records: Sequence[dict[str, Any]],
    metric: str,
    label: str,
    scale: float = 1.0,
) -> None:
    """A metric of `summary` over `x`, its interval as a band; `place` picks the dash, the mark and the shade."""
    shade = str(0.65 * (place % 6) / 5)
    values = [scale * r[metric] for r in records]
    low = [scale * r.get(f"{metric}_low", r[metric]) for r in records]
    high = [scale * r.get(f"{metric}_high", r[metric]) for r in records]
    style = {"linestyle": STYLES[place % len(STYLES)], "marker": MARKS[place % len(MARKS)], "markersize": 3}
    axis.plot(x, values, color=shade, linewidth=1.1, label=label, **style)
    axis.fill_between(x, low, high, color=shade, alpha=0.15, linewidth=0)


def legend(figure: Any, axis: Any, columns: int = 4) -> None:
    """One for all panels, below them; a narrow figure has room for two columns."""
    handles, labels = axis.get_legend_handles_labels()
    columns = columns if figure.get_figwidth() > 5 else min(columns, 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)
