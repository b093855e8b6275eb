"""What of a report goes into its page: one JSON-ready dictionary.

A page has to open at once, so it does not hold everything: `page_data` keeps the highest and lowest rows of every
query and method, the texts of those rows only, and one heat map a method whose columns are single training examples
or, for large training sets, means over bins of one label. `PageData.notes` says in words what was left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.reporting.payload import ExampleView, MethodView, Report

MAX_COLUMNS = 2_000  # single-example columns of a heat map; above this they are binned
BINS = 400
MAX_CELLS = 1_000_000  # heat map cells on one page, over all methods: about 10 MB
# Rows kept at either end of a ranking, and characters of one training prompt or response (queries are never cut): the
# first pair that fits the budget, else the last.
SIZES = ((100, 4_000), (50, 4_000), (25, 4_000), (10, 4_000), (10, 1_000), (10, 500))
LIST_BUDGET = 6_000_000  # characters of ranked lists and of their texts on one page
ENTRY = 14  # characters of one list entry, a row and its score
DIGITS = 6  # significant, of a score; the page shows four at most, and a number rounded twice may come out one higher
PREFERRED = "repsim"  # shown beside the default method where it was run


@dataclass(frozen=True)
class PageData:
    """The JSON island of a page, and what it leaves out, in sentences."""

    island: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Columns:
    """Heat map columns: `order` lists rows by label then row, column c covers `order[starts[c]:starts[c + 1]]`."""

    order: list[int]
    starts: list[int]
    groups: list[dict[str, Any]]  # label, first column, end column, number of rows

    @property
    def binned(self) -> bool:
        """Whether some column covers several rows."""
        return len(self.starts) < len(self.order)


def best_control(methods: Sequence[MethodView]) -> str | None:
    """Name of the control with the best AUPRC, then coverage, as the verdict picks it; without metrics the first one."""

    def strength(method: MethodView) -> tuple[float, ...]:
        values = (method.metrics[key].value if key in method.metrics else -1.0 for key in ("auprc", "coverage"))
        return tuple(value if math.isfinite(value) else -1.0 for value in values)

    controls = [method for method in methods if method.control]
    return max(controls, key=strength).method if controls else None


def page_data(report: Report) -> PageData:
    """Choose what the page holds, and turn it into plain lists, strings, numbers and None."""
    m, n, count = len(report.queries), len(report.train), len(report.methods)
    room = MAX_CELLS // (m * count)
    columns = _columns(report.train, report.target_label, n if n <= min(MAX_COLUMNS, room) else max(1, min(BINS, room)))
    rows = _columns(report.queries, report.target_label, m)
    scores = [np.asarray(method.scores, dtype=np.float64) for method in report.methods]
    ends = [_ends(matrix) for matrix in scores]
    keep, limit, shown = _fit(report.train, ends)
    cut = [row for row in shown if max(len(report.train[row].prompt), len(report.train[row].response)) > limit]
    beside = [report.default_method, best_control(report.methods), PREFERRED]
    names = {method.method for method in report.methods}
    island = {
        "target": report.target_label,
        "default": report.default_method,
        "beside": [name for name in dict.fromkeys(beside) if name in names],
        "total": n,
        "kept": min(keep, n),
        "labels": Counter(example.label for example in report.train if example.label is not None),
        "columns": {
            "binned": columns.binned,
            "names": _column_names(report.train, columns),
            "groups": columns.groups,
        },
        "rows": {"order": rows.order, "groups": rows.groups},
        "queries": [_text(query) for query in report.queries],
        "examples": {str(row): _text(report.train[row], limit) for row in shown},
        "methods": [
            {
                "name": method.method,
                "title": method.title,
                "control": method.control,
                "unit": method.unit,
                "note": method.note,
                "missing": [int(number) for number in (~np.isfinite(matrix)).sum(axis=1)],
                "cells": [rounded(line) for line in _cells(matrix, columns)],
                "top": [_listed(line, order[:keep]) for line, order in zip(matrix, high, strict=True)],
                "bottom": [_listed(line, order[:keep]) for line, order in zip(matrix, low, strict=True)],
            }
            for method, matrix, (high, low) in zip(report.methods, scores, ends, strict=True)
        ],
    }
    return PageData(island, _notes(n, keep, limit, len(shown), len(cut), columns))


def to_json(value: Any) -> str:
    """ASCII JSON that is inert inside a script element: no `<`, `>`, `&`, U+2028 or U+2029, no NaN."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(values: NDArray[np.float64]) -> list[float | None]:
    """The values to `DIGITS` significant digits; None where they are not finite."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _columns(examples: Sequence[ExampleView], target: str | None, limit: int) -> _Columns:
    """Order rows by label (target first, unlabelled last) then row, and bin each label into its share of `limit`."""
    labels = [example.label for example in examples]
    order = sorted(range(len(labels)), key=lambda i: (labels[i] is None, labels[i] != target, labels[i] or "", i))
    starts: list[int] = []
    groups: list[dict[str, Any]] = []
    begin = 0
    for label, size in Counter(labels[row] for row in order).items():  # insertion order = column order
        bins = size if limit >= len(order) else min(size, max(1, round(limit * size / len(order))))
        groups.append({"label": label, "start": len(starts), "stop": len(starts) + bins, "rows": size})
        starts += [begin + (size * part) // bins for part in range(bins)]
        begin += size
    return _Columns(order, starts, groups)


def _cells(matrix: NDArray[np.float64], columns: _Columns) -> NDArray[np.float64]:
    """(m, n) scores to (m, columns) means over the finite scores of each column; NaN where there are none."""
    ordered = matrix[:, columns.order]
    finite = np.isfinite(ordered)
    sums = np.add.reduceat(np.where(finite, ordered, 0.0), columns.starts, axis=1)
    sizes = np.add.reduceat(finite.astype(np.float64), columns.starts, axis=1)
    means: NDArray[np.float64] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
    return means


def _column_names(train: Sequence[ExampleView], columns: _Columns) -> list[str]:
    ends = [*columns.starts[1:], len(columns.order)]
    names = []
    for start, end in zip(columns.starts, ends, strict=True):
        first, last = train[columns.order[start]].id, train[columns.order[end - 1]].id
        names.append(first if end - start == 1 else f"mean of {end - start} rows, {first} to {last}")
    return names


_Ends = tuple[list[NDArray[np.intp]], list[NDArray[np.intp]]]


def _ends(matrix: NDArray[np.float64]) -> _Ends:
    """Per query the highest and the lowest rows with a finite score, best first; ties in row order."""
    longest = SIZES[0][0]
    high, low = [], []
    for line in matrix:
        finite = np.flatnonzero(np.isfinite(line))
        high.append(finite[np.argsort(-line[finite], kind="stable")[:longest]])
        low.append(finite[np.argsort(line[finite], kind="stable")[:longest]])
    return high, low


def _fit(train: Sequence[ExampleView], ends: Sequence[_Ends]) -> tuple[int, int, list[int]]:
    """The first of `SIZES` that fits the budget, and the rows that its lists refer to."""
    shown: list[int] = []
    for keep, limit in SIZES:
        shown = sorted({int(row) for sides in ends for side in sides for order in side for row in order[:keep]})
        entries = sum(len(order[:keep]) for sides in ends for side in sides for order in side)
        texts = sum(min(len(train[row].prompt), limit) + min(len(train[row].response), limit) for row in shown)
        if texts + ENTRY * entries <= LIST_BUDGET:
            break
    return keep, limit, shown


def _listed(line: NDArray[np.float64], order: NDArray[np.intp]) -> dict[str, list[Any]]:
    """Rows, their scores, and the places whose score is that of the next one too, before both are rounded."""
    tied = np.flatnonzero(np.diff(line[order]) == 0)
    return {"rows": order.tolist(), "scores": rounded(line[order]), "tied": tied.tolist()}


def _text(example: ExampleView, limit: int | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {"id": example.id, "label": example.label}
    for name, text in (("prompt", example.prompt), ("response", example.response)):
        out[name] = text[:limit]
        if limit is not None and len(text) > limit:
            out[f"{name}_cut"] = len(text) - limit
    return out


def _notes(n: int, keep: int, limit: int, shown: int, cut: int, columns: _Columns) -> list[str]:
    notes = [f"Scores on this page are rounded to {DIGITS} significant digits; ranks were computed before rounding."]
    if n > keep:
        notes.append(
            f"Lists hold the {keep} highest and {keep} lowest of {n:,} training examples per query and method."
        )
    if shown < n:
        notes.append(f"{n - shown:,} of {n:,} training examples are in none of these lists: their text is not here.")
    if columns.binned:
        notes.append(
            f"The heat map is binned: its {len(columns.starts):,} columns are means over consecutive rows of one "
            f"label, about {n / len(columns.starts):.0f} training examples each, so a single high score can vanish "
            "in its bin."
        )
    if cut:
        notes.append(
            f"Training texts are cut at {limit:,} characters, marked where cut ({cut:,} of {shown:,} examples)."
        )
    return notes
