"""What a study's methods are held against: orders that look at words alone, or at nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd

from finetrace.attribution import Problem, make
from finetrace.attribution.controls import seeded
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.runner import task_of
from finetrace.evaluation.metrics import relevance
from finetrace.examples import Example
from finetrace.studies.cells import Prepared, of_cell, summary, values_of
from finetrace.studies.records import percent, where

PROMPTS = ("bm25:text=prompt", "tfidf:text=prompt", "random")
BOTH = ("bm25", "tfidf")  # of prompt and response, where the task has the queries' responses
METRICS = ("accuracy", "coverage", "auprc")


@dataclass(frozen=True)
class _Rows:
    """Training examples without their tokens."""

    examples: tuple[Example, ...]

    @cached_property
    def labels(self) -> list[str | None]:
        return [example.label for example in self.examples]

    @cached_property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]


@dataclass(frozen=True)
class _Texts:
    """As much of a `Problem` as methods of words ask for: no index, no model."""

    rows: _Rows
    queries: tuple[Example, ...]

    @property
    def n(self) -> int:
        return len(self.rows.examples)

    @property
    def m(self) -> int:
        return len(self.queries)


def controls(cells: Iterable[Cell], frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over seeds and queries of each control on each task and protocol, as `cells.summary` has them, marked `control`.

    Args:
        cells: Of the study.
        frame: What the study found, query by query; the controls are asked the queries that it has of a cell, whichever its
            methods were.
    """
    found = []
    for cell in cells:
        here = frame[(frame["task"] == cell.task) & (frame["protocol"] == cell.protocol) & (frame["seed"] == cell.seed)]
        asked = set(here["query"])
        task, _ = task_of(cell, None)
        queries = tuple(query for query in task.queries if query.id in asked)
        if not queries:
            continue
        texts = _Texts(_Rows(task.train), queries)
        relevant = relevance(texts.rows.labels, [query.label for query in queries])
        specs = (*PROMPTS[:-1], *(BOTH if task.answered else ()), PROMPTS[-1])
        problem = cast(Problem, texts)
        asked_of = Prepared(cell, Path(), problem, relevant)
        matrices = [(make(spec).label, seeded(make(spec), cell.seed).matrix(problem)) for spec in specs]
        frames = [values_of(asked_of, label, matrix) for label, matrix in matrices]
        found.append(of_cell(pd.concat(frames), cell))
    if not found:
        return []
    return [{"control": True, **each} for each in summary(pd.concat(found), ("task", "protocol", "spec"), METRICS)]


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Accuracy, coverage and AUPRC of each control in %, with intervals."""
    heads = ["task", "protocol", "control", "queries", "Acc %", "Cover %", "AUPRC %"]
    lines = []
    for r in records:
        cells = [percent(r, metric) for metric in METRICS]
        lines.append([r["task"], r["protocol"], make(r["spec"]).title, str(r["n_queries"]), *cells])
    return heads, lines


def control_line(axis: Any, records: Sequence[dict[str, Any]], task: str, protocol: str, metric: str) -> None:
    """A line where BM25 stands, in %: of prompt and response, or of the prompt where the model gives the response."""
    here = where(records, task=task, protocol=protocol)
    for r in (where(here, spec=BOTH[0]) or where(here, spec=PROMPTS[0]))[:1]:
        if r.get(metric) is not None:
            style: dict[str, Any] = {"color": "0.4", "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
            axis.axhline(100 * r[metric], label="BM25 (control)", zorder=1, **style)
