"""The benchmark's figures, as PNG and SVG: heat maps (the study's Fig. 2), an example (Fig. 1), and the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from finetrace.benchmark.run import DONE, Cell
from finetrace.reading import read_examples

if TYPE_CHECKING:
    from finetrace.benchmark.report import Row

SHOWN = ("repsim", "gradsim", "gradcos", "datainf", "lissa", "exact", "ekfac:normalise=cosine", "tfidf")
LIMIT = 8


def draw_heat_maps(folder: Path, cells: Sequence[Cell], out: Path) -> None:
    """Queries x training examples of each method, both sorted by class, colours by rank within a query."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for cell in cells:
        home = folder / cell.folder
        if not (home / DONE).exists() or not (home / "queries.jsonl").exists():
            continue
        matrices = load_file(str(home / "scores.safetensors"))
        train, queries = read_examples(home / "train.jsonl"), read_examples(home / "queries.jsonl")
        names = [name for name in SHOWN if name in matrices] or list(matrices)[:LIMIT]
        across = np.argsort([str(e.label) for e in train], kind="stable")
        down = np.argsort([str(q.label) for q in queries], kind="stable")
        columns = min(4, len(names))
        lines = -(-len(names) // columns)
        figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, name in zip(axes.flat, names, strict=False):
            axis.set_axis_on()
            shown = _ranks(matrices[name])[np.ix_(down, across)]
            axis.imshow(shown, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(name, fontsize=8)
            axis.set_xticks(_edges([str(train[i].label) for i in across]), [])
            axis.set_yticks(_edges([str(queries[i].label) for i in down]), [])
        figure.supxlabel("training examples, by class", fontsize=9)
        figure.supylabel("queries, by class", fontsize=9)
        figure.suptitle(f"{cell.task}, {cell.protocol}: rank of every training example for every query", fontsize=10)
        figure.tight_layout()
        _save(figure, out / f"heat-{cell.task}-{cell.protocol}")
        plt.close(figure)


def draw_ablation(rows: Sequence[Row], out: Path) -> None:
    """AUPRC of curvature and similarity (down) on loss positions, padding and layers (across), a panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from finetrace.attribution import make

    for task in dict.fromkeys(row.task for row in rows):
        values: dict[tuple[str, str], float] = {}
        for row in rows:
            if row.task != task or not row.metrics or "loss_on=" not in row.spec:
                continue
            method = make(row.spec).parameters
            left = f"{row.spec.split(':')[0]} {method['normalise']}"
            values[left, f"{method['loss_on']}, {method['layers']}"] = row.metrics["auprc"].value
        down, across = list(dict.fromkeys(k[0] for k in values)), list(dict.fromkeys(k[1] for k in values))
        grid = np.array([[values.get((d, a), np.nan) for a in across] for d in down])
        figure, axis = plt.subplots(figsize=(0.55 * len(across) + 2.5, 0.32 * len(down) + 2.2))
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(across)), across, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(down)), down, fontsize=7)
        for i, j in np.ndindex(*grid.shape):
            if np.isfinite(grid[i, j]):
                shade = "black" if grid[i, j] > 0.6 else "white"
                axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=5, color=shade)
        figure.colorbar(image, label="AUPRC")
        axis.set_title(f"{task}: what an influence's success hangs on", fontsize=10)
        figure.tight_layout()
        _save(figure, out / f"ablation-{task}")
        plt.close(figure)


def _ranks(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's ranks, from 0 (least) to 1."""
    order = scores.argsort(axis=1).argsort(axis=1)
    return np.asarray(order / max(1, scores.shape[1] - 1))


def _edges(labels: Sequence[str]) -> list[float]:
    """Where one class ends and the next begins."""
    return [i - 0.5 for i in range(1, len(labels)) if labels[i] != labels[i - 1]]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(path.name + ".png"), dpi=150)
    figure.savefig(path.with_name(path.name + ".svg"))
