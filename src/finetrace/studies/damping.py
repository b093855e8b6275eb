"""What damping decides: scores and accuracy over eight decades of lambda, and the spectrum that lambda is added to.

As lambda grows, P tends to I / lambda: jointly the ranking becomes GradSim's, and block by block that of inner products divided
by each block's own lambda. As it shrinks, all directions that training examples span weigh alike, however little they vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from finetrace.attribution import make
from finetrace.attribution.gradient import DEFAULT_DAMPING
from finetrace.studies.cells import Plan, Prepared, parts, summary, values_of
from finetrace.studies.controls import control_line, controls, table
from finetrace.studies.pieces import Piece
from finetrace.studies.plots import facets, line
from finetrace.studies.records import percent, settings, where
from finetrace.studies.study import Outcome, Setting, Study

MULTIPLES = tuple(10.0**k for k in range(-6, 3))  # of the trace of the empirical Fisher; the default is 0.01
CURVES = {
    "exact, block": "exact:",
    "exact, joint": "exact:scope=joint,",
    "exact cosine, block": "exact:normalise=cosine,",
    "DataInf": "datainf:",
}
LIMITS = ("gradsim", "gradcos")
METRICS = ("accuracy", "coverage", "auprc", "with_default", "with_none")
PAPER = ("paper_low", "paper_high", "paper_joint")
FIGURES = {
    "accuracy": ("accuracy", "accuracy, %", 100.0),
    "coverage": ("coverage", "coverage, %", 100.0),
    "scores": ("with_default", "rank correlation with\nthe default's scores", 1.0),
}
PLAN = Plan({"mixed-small": 1.0, "harmfulcheck": 0.2, "grammars": 0.1, "mathqa": 0.1})
QUICK = Plan({"emotion": 0.1}, ("corrected",), epochs=2)


def spec(curve: str, multiple: float) -> str:
    """A curve's method at a lambda."""
    return make(f"{CURVES[curve]}damping={multiple!r}").label


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Score each cell, and decompose it."""
    looks = {f"damping {MULTIPLES} {CURVES} {LIMITS}": look, "spectrum of shares": _spectrum}
    return parts(QUICK if setting.quick else PLAN, looks, folder, setting)


def outcome(setting: Setting, found: Sequence[Sequence[pd.DataFrame]]) -> Outcome:
    """Of the two frames of each cell."""
    plan = QUICK if setting.quick else PLAN
    frame, spectra = (pd.concat(frames) for frames in zip(*found, strict=True))
    words = controls(plan.cells(setting), frame)
    records = summary(frame, ("task", "protocol", "curve", "multiple"), METRICS, PAPER)
    return Outcome(
        [*records, *words],
        {"damping": _table(records), "controls": table(words)},
        {f"damping-{name}": _figure(records, *of, words) for name, of in FIGURES.items()}
        | {"spectrum": _spectra(spectra)},
        [*_reading(records), *plan.left_out()],
        {"multiples": MULTIPLES, "sizes": plan.sizes},
    )


def look(found: Prepared) -> pd.DataFrame:
    """Query by query at every lambda: the metrics, and rank correlations with the scores of the default lambda and of none.

    `multiple` is -1 without curvature. `paper_low` and `paper_high` are the least and the largest that the study's rule, 0.1
    of the mean squared entry of a block, is of a block's trace: 0.1 / d_b. `paper_joint` is the same of all blocks at once.
    """
    widths = [block.size for block in found.problem.blocks]
    ends = dict(zip(PAPER, (0.1 / max(widths), 0.1 / min(widths), 0.1 / sum(widths)), strict=True))
    plain = {name: make(name).score(found.problem).values for name in LIMITS}
    frames = [values_of(found, name, values).assign(curve=name, multiple=-1.0) for name, values in plain.items()]
    for curve in CURVES:
        scores = {m: make(spec(curve, m)).score(found.problem).values for m in MULTIPLES}
        for multiple, values in scores.items():
            frames.append(
                values_of(found, spec(curve, multiple), values).assign(
                    curve=curve,
                    multiple=multiple,
                    with_default=_ranks(values, scores[DEFAULT_DAMPING]),
                    with_none=_ranks(values, plain[_limit(curve)]),
                )
            )
    return pd.concat(frames).assign(**ends)


def _limit(curve: str) -> str:
    """What a curve is without curvature."""
    return "gradcos" if "cosine" in curve else "gradsim"


def _ranks(found: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
    return [float(spearmanr(a, b).statistic) for a, b in zip(found, other, strict=True)]


def _spectrum(found: Prepared) -> pd.DataFrame:
    """Eigenvalues of K / n jointly, and of every block, as shares of their sum, largest first."""
    frames = []
    joint = found.problem.joint.gram
    for name, gram in [("joint", joint), *((block.name, p.gram) for block, p in found.problem.products())]:
        values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
        shares = (values / values.sum()).numpy()
        frames.append(pd.DataFrame({"block": name, "rank": np.arange(1, len(shares) + 1), "share": shares}))
    return pd.concat(frames)


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Accuracy and coverage at each lambda with intervals, and the rank correlation with the default's scores."""
    heads = ["task", "protocol", "method", "what", *(f"{m:g}" for m in MULTIPLES), "GradSim, or its cosine"]
    lines = []
    for task, protocol in settings(records):
        here = where(records, task=task, protocol=protocol)
        for curve in CURVES:
            found = [where(here, curve=curve, multiple=m)[0] for m in MULTIPLES]
            limit = where(here, curve=_limit(curve))[0]
            for metric in ("accuracy", "coverage"):
                cells = [percent(r, metric) for r in (*found, limit)]
                lines.append([task, protocol, curve, f"{metric} %", *cells])
            for metric, words in (
                ("with_default", "rank with default, %"),
                ("with_none", "rank with the last column, %"),
            ):
                lines.append([task, protocol, curve, words, *(percent(r, metric) for r in found), ""])
    return heads, lines


def _figure(
    records: Sequence[dict[str, Any]], metric: str, head: str, scale: float, words: Sequence[dict[str, Any]]
) -> Any:
    """A metric over lambda, a panel a task and protocol; a wide band is the default, a dark one the study's rule."""

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for place, curve in enumerate(CURVES):
            found = [where(here, curve=curve, multiple=m)[0] for m in MULTIPLES]
            line(axis, place, MULTIPLES, found, metric, curve, scale)
        for style, name in zip(("-", ":"), LIMITS, strict=True):
            level = where(here, curve=name)[0].get(metric)
            if level is not None:
                axis.axhline(scale * level, color="0.75", linestyle=style, linewidth=1, label=name)
        control_line(axis, words, here[0]["task"], here[0]["protocol"], metric)
        axis.axvline(DEFAULT_DAMPING, color="0.9", linewidth=4, zorder=0, label="default")
        low, high, joint = (here[0][key] for key in PAPER)
        axis.axvspan(low, high, color="0.8", linewidth=0, zorder=0, label="paper's rule, by block")
        axis.axvline(joint, color="0.7", linestyle="--", linewidth=0.8, zorder=0, label="the same, joint")
        axis.set_xscale("log")

    return facets(records, draw, "lambda / trace of the empirical Fisher", head, columns=4)


def _spectra(frame: pd.DataFrame) -> Any:
    """Eigenvalues of K / n, joint in black and every block in grey; first seed."""
    cells: list[dict[str, Any]] = frame[["task", "protocol"]].drop_duplicates().to_dict("records")

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        [cell] = here
        mine = frame[(frame["task"] == cell["task"]) & (frame["protocol"] == cell["protocol"]) & (frame["seed"] == 0)]
        for name, group in mine.groupby("block", sort=False):
            joint = name == "joint"
            axis.plot(
                group["rank"],
                np.maximum(group["share"], 1e-12),
                color="black" if joint else "0.75",
                linewidth=1.5 if joint else 0.4,
                zorder=2 if joint else 1,
                label="all blocks" if joint else "each block",
            )
        axis.axhline(DEFAULT_DAMPING, color="0.5", linestyle="--", linewidth=0.8, label="lambda, default")
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 1)

    return facets(cells, draw, "eigenvalue, largest first", "share of the trace")


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in settings(records):
        found = [
            r for r in where(records, task=task, protocol=protocol, curve="exact, block") if r["coverage"] is not None
        ]
        best = max(found, key=lambda r: r["coverage"])
        worst = min(found, key=lambda r: r["coverage"])
        least = min(found, key=lambda r: r["with_default"])
        lines.append(
            f"{task}, {protocol}: exact per block covers {100 * worst['coverage']:.0f}% at {worst['multiple']:g} "
            f"to {100 * best['coverage']:.0f}% at {best['multiple']:g} times the trace; its scores correlate with those of the "
            f"default by ranks at least {least['with_default']:.2f} (at {least['multiple']:g})."
        )
    return lines


DAMPING = Study(
    "damping",
    "beyond",
    "scores and accuracy over eight decades of lambda, per block and joint, and the Gram matrix's spectrum",
    40,
    1,
    pieces,
    outcome,
    37,
)
