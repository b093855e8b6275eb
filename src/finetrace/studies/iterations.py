"""LiSSA's iterations: accuracy, coverage and distance to the exact solve (Fig. 4 of arXiv 2409.19998).

Does LiSSA converge, and to what? Two recurrences stand here: the series with its own scale, which
converges to the exact influence of the same damping, and the released code's, whose curvature term is divided by 1000.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from finetrace.attribution import make
from finetrace.studies.cells import Plan, Prepared, parts, summary, values_of
from finetrace.studies.controls import control_line, controls, table
from finetrace.studies.pieces import Piece
from finetrace.studies.plots import facets, line
from finetrace.studies.records import percent, settings, where
from finetrace.studies.study import Outcome, Setting, Study

COUNTS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
DAMPINGS = {"paper": "damping=0.1,damping_rule=entry", "default": "damping=0.01"}
RECURRENCES = ("neumann", "released")
PLAN = Plan({"mixed-small": 1.0, "harmfulcheck": 0.2, "grammars": 0.1, "mathqa": 0.1})
QUICK = Plan({"emotion": 0.1}, ("corrected",), epochs=2)
METRICS = ("accuracy", "coverage", "spearman", "relative", "scaled")


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Score every count, recurrence and damping on each cell."""
    looks = {f"iterations {COUNTS} {DAMPINGS} {RECURRENCES}": look}
    return parts(QUICK if setting.quick else PLAN, looks, folder, setting)


def outcome(setting: Setting, found: Sequence[Sequence[pd.DataFrame]]) -> Outcome:
    """Of the frame of each cell."""
    plan = QUICK if setting.quick else PLAN
    frame = pd.concat(frame for (frame,) in found)
    words = controls(plan.cells(setting), frame)
    records = summary(frame, ("task", "protocol", "damping", "recurrence", "iterations"), METRICS)
    return Outcome(
        [*records, *words],
        {"iterations": _table(records), "controls": table(words)},
        _figures(records, words),
        [*_reading(records), *plan.left_out()],
        {"counts": COUNTS, "sizes": plan.sizes},
    )


def look(found: Prepared) -> pd.DataFrame:
    """Query by query: the metrics, and rank correlation, relative L2 and L2 after the best scaling to the exact scores.

    `iterations` is 0 for GradSim, which released iterations are all but a multiple of, and -1 for the exact influence.
    """
    frames = []
    start = make("gradsim").score(found.problem).values
    for damping, rule in DAMPINGS.items():
        exact = make(f"exact:{rule}").score(found.problem).values
        scores = {("neumann", 0): start, ("neumann", -1): exact}
        for recurrence in RECURRENCES:
            for count in COUNTS:
                spec = f"lissa:iterations={count},recurrence={recurrence},{rule}"
                scores[recurrence, count] = make(spec).score(found.problem).values
        for (recurrence, count), values in scores.items():
            frame = values_of(found, f"lissa {recurrence} {count}", values)
            frame = frame.assign(damping=damping, recurrence=recurrence, iterations=count)
            frames.append(frame.assign(**_distances(values, exact)))
    return pd.concat(frames)


def _distances(found: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> dict[str, list[float]]:
    norms, own = np.linalg.norm(exact, axis=1), np.linalg.norm(found, axis=1)
    cosine = (found * exact).sum(1) / np.maximum(norms * own, 1e-300)
    return {
        "spearman": [float(spearmanr(a, b).statistic) for a, b in zip(found, exact, strict=True)],
        "relative": list(np.linalg.norm(found - exact, axis=1) / norms),
        "scaled": list(np.sqrt(np.maximum(0, 1 - cosine**2))),
    }


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = [
        "task",
        "protocol",
        "damping",
        "recurrence",
        "iterations",
        "Acc %",
        "Cover %",
        "rank with exact",
        "relative L2",
        "after scaling",
    ]
    lines = []
    for r in records:
        count = {0: "0 (GradSim)", -1: "exact"}.get(r["iterations"], str(r["iterations"]))
        cells = [
            *(percent(r, m) for m in ("accuracy", "coverage")),
            f"{r['spearman']:.3f}",
            f"{r['relative']:.2g}",
            f"{r['scaled']:.2g}",
        ]
        kind = {"neumann": "series", "released": "released"}[r["recurrence"]] if r["iterations"] > 0 else "-"
        lines.append([r["task"], r["protocol"], r["damping"], kind, count, *cells])
    return heads, lines


def _figures(records: Sequence[dict[str, Any]], words: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, coverage, rank correlation with the exact scores and distance to them, over iterations."""
    figures = {}
    for name, metric, head, scale in (
        ("iterations-accuracy", "accuracy", "accuracy, %", 100),
        ("iterations-coverage", "coverage", "coverage, %", 100),
        ("iterations-rank", "spearman", "rank correlation with exact", 1),
        ("iterations-distance", "scaled", "L2 to exact, after the best\nscaling, share of its norm", 1),
    ):

        def draw(axis: Any, here: list[dict[str, Any]], metric: str = metric, scale: float = scale) -> None:
            for place, (damping, recurrence) in enumerate(product(DAMPINGS, RECURRENCES)):
                found = [r for r in where(here, damping=damping, recurrence=recurrence) if r["iterations"] > 0]
                found.sort(key=lambda r: r["iterations"])
                kind = "series" if recurrence == "neumann" else "released"
                x = [r["iterations"] for r in found]
                line(axis, place, x, found, metric, f"{kind}, {damping} damping", scale)
            control_line(axis, words, here[0]["task"], here[0]["protocol"], metric)
            if metric in ("accuracy", "coverage"):
                for damping, style in zip(DAMPINGS, ("--", "-"), strict=True):
                    level = scale * where(here, damping=damping, iterations=-1)[0][metric]
                    axis.axhline(level, color="0.5", linewidth=0.8, linestyle=style, label=f"exact, {damping} damping")
            axis.set_xscale("log")
            if metric == "scaled":
                axis.set_yscale("log")

        figures[name] = facets(records, draw, "iterations", head)
    return figures


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in settings(records):
        here = where(records, task=task, protocol=protocol, damping="default")
        series, released = (where(here, iterations=COUNTS[-1], recurrence=name)[0] for name in RECURRENCES)
        start = where(here, iterations=0)[0]
        lines.append(
            f"{task}, {protocol}: rank correlation with the exact scores, {start['spearman']:.2f} for GradSim, is "
            f"{series['spearman']:.2f} after {COUNTS[-1]} iterations of the series, {released['spearman']:.2f} after as many "
            "released iterations."
        )
    return lines


ITERATIONS = Study(
    "iterations",
    "Fig. 4",
    "accuracy, coverage and distance to the exact solve over LiSSA's iterations, by both recurrences",
    40,
    1,
    pieces,
    outcome,
    37,
)
