"""Fine-tuned and indexed tasks that several studies look at, and how methods do on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from finetrace.atomic import write_atomically
from finetrace.attribution import Problem, make
from finetrace.attribution.controls import seeded
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.protocol import protocol
from finetrace.benchmark.run import Run
from finetrace.benchmark.runner import length, task_of
from finetrace.collection import Representation
from finetrace.collection.factors import Labels
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import make_judge
from finetrace.evaluation.metrics import METRICS, precision_at, relevance
from finetrace.evaluation.seeds import bootstrap_crossed, over_seeds
from finetrace.examples import Example
from finetrace.fingerprint import of_text
from finetrace.index import build_index
from finetrace.models import Loaded
from finetrace.moments import Moment
from finetrace.studies.pieces import Piece, Say
from finetrace.studies.study import Setting
from finetrace.tracing import prepare

Look = Callable[["Prepared"], pd.DataFrame]

SPECS = {  # what studies compare where they compare every method
    "corrected": (
        "gradsim",
        "gradcos",
        "datainf",
        "lissa",
        "exact:normalise=cosine",
        "ekfac:normalise=cosine",
        "repsim",
    ),
    "paper": (
        "gradsim",
        "gradcos",
        "datainf:damping=0.1,damping_rule=entry",
        "lissa:damping=0.1,damping_rule=entry,recurrence=released",
        "exact:damping=0.1,damping_rule=entry",
        "repsim",
    ),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """One fine-tuning of a task under a protocol, indexed, with its queries.

    Attributes:
        cell: What it is.
        folder: Where its adapter and index are.
        problem: Training examples against queries.
        relevant: (m, n) whether a training example is of the query's class.
    """

    cell: Cell
    folder: Path
    problem: Problem
    relevant: NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """Which cells a study looks at.

    Attributes:
        sizes: Share of each task by its name.
        protocols: Of each task.
        epochs: Another number than the corrected protocol's; the paper's keeps its own.
        without: Tasks that the paper protocol leaves out. On the mixed sets its learning rate of 5e-5 hardly undoes the
            embedded model's alignment, so there are few answers to trace; the `parameters` study measures that.
    """

    sizes: dict[str, float]
    protocols: tuple[str, ...] = ("corrected", "paper")
    epochs: int | None = None
    without: tuple[str, ...] = ("mixed-small", "mixed-large")

    def cells(self, setting: Setting) -> list[Cell]:
        """Tasks x protocols x seeds, all first seeds first."""
        return [
            Cell(task, name, seed, size, 0, (), setting.model, self._epochs(name), setting.dtype, setting.device)
            for seed in range(setting.seeds)
            for name in self.protocols
            for task, size in self.sizes.items()
            if name == "corrected" or task not in self.without
        ]

    def left_out(self) -> list[str]:
        """A sentence where the paper protocol leaves tasks out."""
        named = [task for task in self.sizes if task in self.without and "paper" in self.protocols]
        why = "left out of the paper protocol, after which the model refuses most requests still (see the parameters study)"
        return [f"{' and '.join(named)} {'is' if len(named) == 1 else 'are'} {why}."] if named else []

    def _epochs(self, name: str) -> int | None:
        return None if name == "paper" else self.epochs


def prepared(cell: Cell, home: Path, say: Say, *, factors: bool = False) -> Prepared | None:
    """The cell in `home`, shared by every study there; `None` where its model complies with nothing."""
    folder = home / f"{cell.task}-{cell.size:g}" / cell.protocol / f"seed-{cell.seed}"
    problem = run_of(cell, folder).ready(say, factors=factors)
    if problem is None:
        return None
    relevant = relevance(problem.rows.labels, [query.label for query in problem.queries])
    return Prepared(cell, folder, problem, relevant)


def indexed(
    made: Run,
    tuned: Loaded,
    queries: Sequence[Example],
    work: Path,
    specs: Sequence[str],
    representations: Sequence[Representation] = DEFAULT_REPRESENTATIONS,
    at: Moment = "end",
) -> Prepared:
    """The rows of a run and some queries under another model than the run's own, in a folder that is emptied first.

    `at`: its adapter as it is, or taken back to its start.
    """
    shutil.rmtree(work, ignore_errors=True)
    encoder = made.protocol.encoder(tuned, made.cell.chat_template)
    fit: Labels | None = "model" if any(make(spec).name in ("ekfac", "kfac") for spec in specs) else None
    kinds = tuple(representations)
    index, _ = build_index(tuned, made.task.train, work / "index", encoder, representations=kinds, kronecker=fit, at=at)
    kept, _ = build_index(tuned, queries, work / "queries", encoder, representations=kinds, at=at)
    problem = Problem(index, queries, kept_queries=kept)
    prepare(problem, [make(spec) for spec in specs])
    return Prepared(made.cell, work, problem, relevance(index.rows.labels, [query.label for query in queries]))


def scored(found: Prepared, specs: Sequence[str]) -> pd.DataFrame:
    """The metrics of some methods query by query."""
    scores = {make(spec).label: seeded(make(spec), found.cell.seed).score(found.problem) for spec in specs}
    return pd.concat([values_of(found, label, each.values) for label, each in scores.items()])


def run_of(cell: Cell, folder: Path) -> Run:
    """The benchmark's run of a cell, which keeps its index."""
    task, recipe = task_of(cell, None)
    return Run(folder, cell, task, recipe, protocol(cell.protocol), make_judge(None, None), keep=True)


def parts(
    plan: Plan, looks: Mapping[str, Look], folder: Path, setting: Setting, *, factors: bool = False
) -> list[Piece]:
    """A piece a cell, with a frame for each of `looks`: what it makes of the cell, kept under the cell and the look's name."""
    pieces = []
    for cell in plan.cells(setting):
        names = [f"{cell.task}-{cell.protocol}-{cell.seed}-{of_text(what + repr(cell))}.parquet" for what in looks]
        kept = {folder / "parts" / name: look for name, look in zip(names, looks.values(), strict=True)}
        find = partial(_looked, cell, kept, setting.home(folder), factors)
        pieces.append(Piece(cell.name, tuple(kept), find, cell.seed, partial(length, cell)))
    return pieces


def _looked(cell: Cell, kept: Mapping[Path, Look], home: Path, factors: bool, say: Say) -> list[pd.DataFrame] | None:
    """A frame a look; `None` where there is nothing to look at."""
    missing = {path: look for path, look in kept.items() if not path.exists()}
    if missing:
        found = prepared(cell, home, say, factors=factors)
        if found is None:
            return None
        say(f"{cell.name}: scoring")
        for path, look in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, of_cell(look(found), cell).to_parquet(index=False))
    return [pd.read_parquet(path) for path in kept]


def of_cell(frame: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The frame with what decides the cell in columns."""
    return frame.assign(task=cell.task, protocol=cell.protocol, seed=cell.seed, size=cell.size)


def values_of(found: Prepared, spec: str, scores: NDArray[np.float64]) -> pd.DataFrame:
    """The metrics of (m, n) scores query by query, with coverage as the cell's protocol counts it."""
    metrics = dict(METRICS)
    if protocol(found.cell.protocol).coverage == "share":
        classes = len(set(found.problem.rows.labels))
        metrics["coverage"] = precision_at(max(1, found.problem.n // classes))
    values: dict[str, Any] = {name: metric(scores, found.relevant) for name, metric in metrics.items()}
    first = [found.problem.rows.ids[i] for i in scores.argmax(1)]
    about = {"spec": spec, "query": [q.id for q in found.problem.queries], "first": first, "n_train": found.problem.n}
    return pd.DataFrame({**about, **values})


def name_of(spec: str) -> str:
    """A method as a legend has it, the released recurrence and the study's damping told from ours."""
    method = make(spec)
    marks = {"released": method.parameters.get("recurrence"), "paper's damping": method.parameters.get("damping_rule")}
    marks = {mark: value for mark, value in marks.items() if value in ("released", "entry")}
    return ", ".join([method.title.split(" damping")[0].removesuffix(" recurrence=released"), *marks])


def summary(
    frame: pd.DataFrame, by: Sequence[str], metrics: Sequence[str] = tuple(METRICS), constants: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Means over seeds and queries, one flat record a group, with 95% intervals over both; `constants` have one value a seed,
    at least 0, and an interval over seeds alone. What is not known is `None`.
    """
    records = []
    for key, group in frame.groupby(list(by), sort=False):
        plain = [each.item() if isinstance(each, np.generic) else each for each in key]
        record: dict[str, Any] = dict(zip(by, plain, strict=True)) | {
            "seeds": int(group["seed"].nunique()),
            "n_queries": int(group["query"].nunique()),
            "n_train": int(group["n_train"].iloc[0]),
        }
        for name in (*metrics, *constants):
            if name in constants:
                estimate = over_seeds(list(group.groupby("seed")[name].first()), bounds=(0, np.inf))
            else:
                estimate = crossed(group, name)
            ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
            record |= {f"{name}{end}": value if np.isfinite(value) else None for end, value in ends.items()}
        records.append(record)
    return records


def crossed(group: pd.DataFrame, name: str) -> Estimate:
    """Of one method on one task: mean over seeds and queries with an interval over both; NaN where none has a value.

    What is not a metric, and the same for all, is so by what it is: a method's rank correlation with itself, say.
    """
    values = np.asarray(group.pivot(index="seed", columns="query", values=name), dtype=np.float64)
    if not np.isfinite(values).any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    if name not in METRICS and np.nanmax(values) - np.nanmin(values) <= 1e-12:
        only = float(np.nanmean(values))
        return Estimate(only, only, only, int(np.isfinite(values).any(0).sum()))
    return bootstrap_crossed(values)
