"""The benchmark's figures, as PNG and SVG: heat maps (the study's Fig. 2) and the ablation."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from finetrace.atomic import write_atomically
from finetrace.attribution import make
from finetrace.benchmark import finished
from finetrace.benchmark.cell import DONE, Cell
from finetrace.tracing import BEST, SIMILAR
from finetrace.units import many

if TYPE_CHECKING:
    from finetrace.benchmark.row import Row

PROBED = "ekfac:normalise=cosine,loss_on=probe"
SHOWN = (
    "repsim",
    SIMILAR,
    "gradsim",
    "gradcos",
    "datainf",
    "lissa",
    "exact",
    "ekfac:normalise=cosine",
    PROBED,
    "gradsim:at=start",
    BEST,
    "tfidf",
)
ABLATED = ("normalise", "loss_on", "layers", "at")  # what tells the ablation's methods of one curvature apart
NAMED = 12  # more classes than this have no room for their names


def shown(specs: Iterable[str]) -> list[str]:
    """The methods that figures show: those of `SHOWN`, else the first of the same name, else the first ones."""
    there = list(specs)
    chosen = []
    for wanted in SHOWN:
        alike = [spec for spec in there if spec.split(":")[0] == wanted.split(":")[0]]
        found = wanted if wanted in alike else alike[0] if alike else None
        if found is not None and found not in chosen:
            chosen.append(found)
    return chosen or there[: len(SHOWN)]


def short(specs: Sequence[str]) -> dict[str, str]:
    """What a figure calls each method: its title, or its name alone where the title is long and no other has that name."""
    kinds = [make(spec).name for spec in specs]
    titles = {spec: make(spec).title for spec in specs}
    return {
        spec: titles[spec] if len(titles[spec]) <= 24 or kinds.count(kind) > 1 else kind
        for spec, kind in zip(specs, kinds, strict=True)
    }


def drawable(folder: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The first seed of each task and protocol that had something to trace."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if (folder / cell.folder / DONE).exists() and (folder / cell.folder / "queries.jsonl").exists():
            first.setdefault((cell.task, cell.protocol), cell)
    return list(first.values())


def draw_heat_maps(folder: Path, cells: Sequence[Cell], out: Path) -> None:
    """Queries x training examples of each method, both sorted by class, colours by rank within a query."""
    from matplotlib.figure import Figure

    for cell in cells:
        home = folder / cell.folder
        matrices = finished.scores(home)
        train, queries = finished.rows(home)
        classes, asked = [str(e.label) for e in train], [str(q.label) for q in queries]
        across, down = np.argsort(classes, kind="stable"), np.argsort(asked, kind="stable")
        classes, asked = sorted(classes), sorted(asked)
        names = shown(matrices)
        titles = short(names)
        lines = -(-len(names) // 4)
        columns = -(-len(names) // lines)
        figure = Figure(figsize=(3.1 * columns + 1.4, 2.5 * lines + 0.9), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        for i, name in enumerate(names):
            axis = axes.flat[i]
            ranks = _ranks(matrices[name])[np.ix_(down, across)]
            image = axis.imshow(ranks, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(literal(titles[name]), fontsize=9)
            axis.tick_params(length=0, labelsize=7)
            last, left = i + columns >= len(names), i % columns == 0
            axis.set_xticks(*_names(classes, last), rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(*_names(asked, left))
            for edge in _edges(classes):
                axis.axvline(edge, color="white", linewidth=0.8)
            for edge in _edges(asked):
                axis.axhline(edge, color="white", linewidth=0.8)
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.01, ticks=[0, 1])
        bar.ax.set_yticklabels(["last", "first"], fontsize=8)
        bar.set_label("rank of a training example for the query", fontsize=8)
        figure.supxlabel(f"{len(train)} training examples, by class", fontsize=9)
        figure.supylabel(f"{many(len(queries), 'query')}, by class", fontsize=9)
        figure.suptitle(literal(f"{cell.task}, {cell.protocol}"), fontsize=11)
        save(figure, out / f"heat-{cell.task}-{cell.protocol}")


def draw_ablation(rows: Sequence[Row], out: Path) -> None:
    """AUPRC of curvature and similarity (down) on loss positions, padding, moment and layers (across), one for each task.

    A method with other parameters than these, another damping for instance, has no place of its own and is left out.
    """
    from matplotlib.figure import Figure

    for task, protocol in dict.fromkeys((row.task, row.protocol) for row in rows):
        values: dict[tuple[tuple[str, str], tuple[str, str]], float] = {}
        for row in rows:
            if (row.task, row.protocol) != (task, protocol) or not row.metrics or "loss_on=" not in row.spec:
                continue
            method = make(row.spec)
            settings = method.parameters
            plain = make(method.name).parameters
            if any(value != plain.get(key) for key, value in settings.items() if key not in ABLATED):
                continue
            down_key = (method.name, str(settings.get("normalise", "cosine")))  # gradcos is a cosine by its name
            loss = f"{settings['loss_on']}, {settings['at']}" if "start" in settings["at"] else settings["loss_on"]
            values[down_key, (loss, settings["layers"])] = row.metrics["auprc"].value
        if not values:
            continue
        down, across = list(dict.fromkeys(k[0] for k in values)), list(dict.fromkeys(k[1] for k in values))
        grid = np.array([[values.get((d, a), np.nan) for a in across] for d in down])
        figure = Figure(figsize=(0.42 * len(across) + 2.6, 0.27 * len(down) + 1.7), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(across)), [layers for _, layers in across], rotation=90, fontsize=7)
        axis.set_yticks(range(len(down)), [f"{name} {similarity}" for name, similarity in down], fontsize=8)
        axis.tick_params(length=0)
        for i, j in np.ndindex(*grid.shape):
            if np.isfinite(grid[i, j]):
                shade = "black" if grid[i, j] > 0.6 else "white"
                text = f"{grid[i, j]:.2f}".removeprefix("0")
                axis.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)
        for edge in _edges([name for name, _ in down]):
            axis.axhline(edge, color="white", linewidth=2)
        positions = [loss for loss, _ in across]
        for edge in _edges(positions):
            axis.axvline(edge, color="white", linewidth=2)
        top = axis.secondary_xaxis("top")
        top.set_xticks(
            *_names(positions, True, len(positions)), fontsize=7, rotation=30, ha="left", rotation_mode="anchor"
        )
        top.tick_params(length=0)
        top.set_xlabel("tokens of the loss (@128: padded to 128; start: before fine-tuning)", fontsize=8)
        axis.set_xlabel("layers", fontsize=8)
        axis.set_ylabel("curvature and similarity", fontsize=8)
        bar = figure.colorbar(image, aspect=30, pad=0.01)
        bar.set_label("AUPRC", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        figure.suptitle(literal(f"{task}, {protocol}: what influence hangs on"), fontsize=11)
        save(figure, out / f"ablation-{task}-{protocol}")


def save(figure: Any, path: Path) -> None:
    """`path` with .png and .svg added, each whole or not there; equal figures give equal files."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = {".png": io.BytesIO(), ".svg": io.BytesIO()}
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(drawn[".png"], format="png", dpi=150)
        figure.savefig(drawn[".svg"], format="svg", metadata={"Date": None})
    for suffix, content in drawn.items():
        write_atomically(path.with_name(path.name + suffix), content.getvalue())


def literal(text: str) -> str:
    """Somebody's text as a figure shows it: what stands between two dollar signs would be read as a formula."""
    return text.replace("$", r"\$")


def _ranks(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's ranks, from 0 (least) to 1; equal scores share the mean of theirs."""
    return np.asarray((rankdata(scores, axis=1) - 1) / max(1, scores.shape[1] - 1))


def _edges(labels: Sequence[str]) -> list[float]:
    """Where one class ends and the next begins."""
    return [i - 0.5 for i in range(1, len(labels)) if labels[i] != labels[i - 1]]


def _names(labels: Sequence[str], wanted: bool, most: int = NAMED) -> tuple[list[float], list[str]]:
    """The middle of each class, and its name; nothing where names are not wanted, or are more than fit."""
    edges = [-0.5, *_edges(labels), len(labels) - 0.5]
    if not wanted or len(edges) - 1 > most:
        return [], []
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return middles, [literal(labels[round(a + 0.5)]) for a in edges[:-1]]
