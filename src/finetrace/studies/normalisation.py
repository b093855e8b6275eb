"""Hubs and norms: what dividing by them does (cosine, RelatIF, a cosine for each block).

A training example with a large gradient has a large inner product with every query. Such hubs are ranked first for many
queries whatever they ask, and the study's raw products have nothing against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from finetrace.attribution import make
from finetrace.attribution.controls import seeded
from finetrace.evaluation.seeds import over_seeds
from finetrace.index.factors import FORMAT
from finetrace.studies.cells import Plan, Prepared, parts, summary, values_of
from finetrace.studies.controls import controls, table
from finetrace.studies.pieces import Piece
from finetrace.studies.plots import MARKS, facets
from finetrace.studies.records import percent, reach, settings, where
from finetrace.studies.study import Outcome, Setting, Study

CURVATURES = ("gradsim", "datainf", "exact", "ekfac")
SIMILARITIES = ("none", "relatif", "cosine")
RULE = {"paper": {"datainf": ",damping=0.1,damping_rule=entry", "exact": ",damping=0.1,damping_rule=entry"}}
PLAN = Plan({"mixed-small": 1.0, "harmfulcheck": 0.2, "grammars": 0.1, "mathqa": 0.1})
QUICK = Plan({"emotion": 0.1}, ("corrected",), epochs=2)
METRICS = ("accuracy", "coverage", "auprc", "with_norm")


def specs(protocol: str) -> list[str]:
    """Curvatures x similarities at the protocol's damping; RelatIF without curvature ranks as the cosine does.

    `random` says how large a hub chance makes of so few queries.
    """
    rule = RULE.get(protocol, {})
    pairs = [(c, s) for c in CURVATURES for s in SIMILARITIES if (c, s) != ("gradsim", "relatif")]
    grid = [f"{c}:normalise={s}{rule.get(c, '')}" for c, s in pairs]
    return [*grid, "gradcos:scope=block", "random"]


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Score each cell by every curvature and similarity."""
    plan = QUICK if setting.quick else PLAN
    what = repr([FORMAT, *(specs(each) for each in plan.protocols)])
    return parts(plan, {what: look}, folder, setting, factors=True)


def outcome(setting: Setting, found: Sequence[Sequence[pd.DataFrame]]) -> Outcome:
    """Of the frame of each cell."""
    plan = QUICK if setting.quick else PLAN
    frame = pd.concat(frame for (frame,) in found)
    words = controls(plan.cells(setting), frame)
    records = summary(frame, ("task", "protocol", "spec"), METRICS, ("norm_ratio",))
    hubs = {key: _hub(group) for key, group in frame.groupby(["task", "protocol", "spec"], sort=False)}
    for record in records:
        method = make(record["spec"])
        record |= {"curvature": method.name, "normalise": method.normalisation, "title": method.title}
        record |= hubs[record["task"], record["protocol"], record["spec"]]
    return Outcome(
        [*records, *words],
        {"normalisation": _table(records), "controls": table(words)},
        {"normalisation": _figure(records)},
        [*_reading(records), *plan.left_out()],
        {"sizes": plan.sizes},
    )


def look(found: Prepared) -> pd.DataFrame:
    """Query by query: the metrics, and the rank correlation of its scores with the norms of the training gradients.

    `norm_ratio` is the largest training gradient's norm over their median.
    """
    norms = found.problem.train_norms.numpy()
    frames = []
    for spec in specs(found.cell.protocol):
        method = make(spec)
        values = seeded(method, found.cell.seed).score(found.problem).values
        with_norm = [float(spearmanr(row, norms).statistic) for row in values]
        frame = values_of(found, method.label, values)
        frames.append(frame.assign(with_norm=with_norm, norm_ratio=float(norms.max() / np.median(norms))))
    return pd.concat(frames)


def _hub(group: pd.DataFrame) -> dict[str, float | None]:
    """The share of queries that the commonest first example takes, and its interval over seeds."""
    shares = group.groupby("seed")["first"].agg(lambda ids: ids.value_counts(normalize=True).iloc[0])
    found = over_seeds(list(shares), bounds=(0, 1))
    ends = {"": found.value, "_low": found.low, "_high": found.high}
    return {f"hub_share{end}": value if np.isfinite(value) else None for end, value in ends.items()}


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = ["task", "protocol", "method", "Acc %", "Cover %", "AUPRC %", "hub %", "rank with norm, %"]
    lines = []
    for r in records:
        cells = [percent(r, m) for m in ("accuracy", "coverage", "auprc", "hub_share", "with_norm")]
        lines.append([r["task"], r["protocol"], r["title"], *cells])
    return heads, lines


def _figure(records: Sequence[dict[str, Any]]) -> Any:
    """Accuracy against the share of queries that the largest hub takes; a mark a similarity, its filling a curvature."""
    fillings = dict(
        zip((*CURVATURES, "gradcos", "random"), ("full", "none", "left", "bottom", "full", "full"), strict=True)
    )
    alone = {"gradcos": ("cosine of each block", MARKS[3]), "random": ("random", MARKS[6])}
    names = {"none": "product", "relatif": "RelatIF", "cosine": "cosine"}

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for r in here:
            label, mark = alone.get(r["curvature"]) or (
                f"{r['curvature']} {names[r['normalise']]}",
                MARKS[SIMILARITIES.index(r["normalise"])],
            )
            style = {
                "marker": mark,
                "fillstyle": fillings[r["curvature"]],
                "color": "black",
                "ecolor": "0.6",
                "markersize": 5,
                "markeredgewidth": 0.7,
                "linestyle": "none",
                "elinewidth": 0.5,
            }
            across, up = (reach([r], key, 100) for key in ("hub_share", "accuracy"))
            place = (100 * r["hub_share"], 100 * r["accuracy"])
            axis.errorbar(*place, xerr=across, yerr=up, label=label, **style)
        axis.set_xlim(0, 105)
        axis.set_ylim(-5, 105)

    return facets(records, draw, "queries for which one example is first, %", "accuracy, %", columns=4)


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in settings(records):
        found = {r["spec"]: r for r in where(records, task=task, protocol=protocol)}
        plain, cosine = found["gradsim"], found["gradsim:normalise=cosine"]
        lines.append(
            f"{task}, {protocol}: the largest gradient is {plain['norm_ratio']:.1f} times the median; one example is first for "
            f"{100 * plain['hub_share']:.0f}% of queries by product and {100 * cosine['hub_share']:.0f}% by cosine, accuracy "
            f"{100 * plain['accuracy']:.0f} and {100 * cosine['accuracy']:.0f}%."
        )
    return lines


NORMALISATION = Study(
    "normalisation",
    "beyond",
    "hubs and gradient norms, and what cosine, RelatIF and a cosine for each block do to them",
    40,
    1,
    pieces,
    outcome,
    37,
)
