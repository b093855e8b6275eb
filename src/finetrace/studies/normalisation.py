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
from finetrace.studies.cells import Plan, Prepared, parts, summary, values_of
from finetrace.studies.plots import MARKS, facets
from finetrace.studies.records import percent, settings, where
from finetrace.studies.study import Outcome, Say, Setting, Study

CURVATURES = ("gradsim", "datainf", "exact", "ekfac")
SIMILARITIES = ("none", "relatif", "cosine")
SPECS = (*(f"{name}:normalise={each}" for name in CURVATURES for each in SIMILARITIES), "gradcos:scope=block")
PLAN = Plan({"mixed-small": 1.0, "harmfulcheck": 0.2, "grammars": 0.1, "mathqa": 0.1})
QUICK = Plan({"emotion": 0.1}, ("corrected",), epochs=2)
METRICS = ("accuracy", "coverage", "auprc", "with_norm")


def run(folder: Path, setting: Setting, say: Say) -> Outcome:
    """Score by every curvature and similarity."""
    plan = QUICK if setting.quick else PLAN
    frame = pd.concat(parts(plan, " ".join(SPECS), folder, setting.home(folder), setting, say, look, factors=True))
    records = summary(frame, ("task", "protocol", "spec"), METRICS)
    hubs = {key: _hub(group) for key, group in frame.groupby(["task", "protocol", "spec"], sort=False)}
    spread = frame.groupby(["task", "protocol"], sort=False)["norm_ratio"].mean()
    for record in records:
        method = make(record["spec"])
        record |= {"curvature": method.name, "normalise": method.normalisation, "title": method.title}
        record |= {"hub_share": hubs[record["task"], record["protocol"], record["spec"]]}
        record |= {"norm_ratio": float(spread[record["task"], record["protocol"]])}
    return Outcome(
        records,
        {"normalisation": _table(records)},
        {"normalisation": _figure(records)},
        _reading(records),
        {"sizes": plan.sizes},
    )


def look(found: Prepared) -> pd.DataFrame:
    """Query by query: the metrics, and the rank correlation of its scores with the norms of the training gradients.

    `norm_ratio` is the largest training gradient's norm over their median.
    """
    norms = found.problem.train_norms.numpy()
    frames = []
    for spec in SPECS:
        method = make(spec)
        values = method.score(found.problem).values
        with_norm = [float(spearmanr(row, norms).statistic) for row in values]
        frame = values_of(found, method.label, values)
        frames.append(frame.assign(with_norm=with_norm, norm_ratio=float(norms.max() / np.median(norms))))
    return pd.concat(frames)


def _hub(group: pd.DataFrame) -> float:
    """The share of queries that the commonest first example takes, mean over seeds."""
    return float(group.groupby("seed")["first"].agg(lambda ids: ids.value_counts(normalize=True).iloc[0]).mean())


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = ["task", "protocol", "method", "Acc %", "Cover %", "AUPRC", "hub %", "rank with norm"]
    lines = []
    for r in records:
        metrics = [percent(r, m) for m in ("accuracy", "coverage")]
        cells = [*metrics, f"{r['auprc']:.2f}", f"{100 * r['hub_share']:.0f}", f"{r['with_norm']:+.2f}"]
        lines.append([r["task"], r["protocol"], r["title"], *cells])
    return heads, lines


def _figure(records: Sequence[dict[str, Any]]) -> Any:
    """Accuracy against the share of queries that the largest hub takes; a mark a similarity, a shade a curvature."""
    shades = dict(zip((*CURVATURES, "gradcos"), ("0.0", "0.3", "0.5", "0.65", "0.8"), strict=True))
    names = {"none": "product", "relatif": "RelatIF", "cosine": "cosine"}

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for r in here:
            block = r["curvature"] == "gradcos"
            mark = MARKS[3] if block else MARKS[SIMILARITIES.index(r["normalise"])]
            error = [[100 * (r["accuracy"] - r["accuracy_low"])], [100 * (r["accuracy_high"] - r["accuracy"])]]
            style = {"marker": mark, "color": shades[r["curvature"]], "markersize": 5, "linestyle": "none"}
            label = f"{r['curvature']} {names[r['normalise']]}" if not block else "cosine of each block"
            place = (100 * r["hub_share"], 100 * r["accuracy"])
            axis.errorbar(*place, yerr=np.maximum(error, 0), label=label, elinewidth=0.5, **style)

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
    run,
    37,
)
