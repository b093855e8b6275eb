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

from finetrace.attribution import make
from finetrace.studies.cells import Plan, Prepared, measured, parts, summary
from finetrace.studies.plots import legend, line, panels
from finetrace.studies.study import Outcome, Say, Setting, Study

MULTIPLES = tuple(10.0**k for k in range(-6, 3))  # of the trace of the empirical Fisher; the default is 0.01
CURVES = {
    "exact, block": "exact:",
    "exact, joint": "exact:scope=joint,",
    "exact cosine, block": "exact:normalise=cosine,",
    "DataInf": "datainf:",
}
LIMITS = ("gradsim", "gradcos")
PLAN = Plan({"mixed-small": 1.0, "harmfulcheck": 0.2, "grammars": 0.1, "mathqa": 0.1})
QUICK = Plan({"emotion": 0.1}, ("corrected",), epochs=2)


def specs() -> dict[tuple[str, float], str]:
    """Every curve's method at every lambda."""
    return {(name, m): make(f"{start}damping={m!r}").label for name, start in CURVES.items() for m in MULTIPLES}


def run(folder: Path, setting: Setting, say: Say) -> Outcome:
    """Score, and decompose."""
    plan = QUICK if setting.quick else PLAN
    wanted = specs()
    home = setting.home(folder)
    frame = measured(plan, [*wanted.values(), *LIMITS], folder, home, setting, say)
    spectra = pd.concat(parts(plan, "spectrum", folder, home, setting, say, _spectrum))
    records = summary(frame, ("task", "protocol", "spec"))
    by_spec = {spec: key for key, spec in wanted.items()}
    for record in records:
        name, multiple = by_spec.get(record["spec"], (record["spec"], None))
        record |= {"curve": name, "multiple": multiple}
    return Outcome(
        records,
        {"damping": _table(records)},
        {"damping": _figure(records), "spectrum": _spectra(spectra)},
        _reading(records),
        {"multiples": MULTIPLES, "sizes": plan.sizes},
    )


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
    """Coverage at each lambda."""
    heads = ["task", "protocol", "method", *(f"{m:g}" for m in MULTIPLES), "no curvature"]
    lines = []
    for task, protocol in dict.fromkeys((r["task"], r["protocol"]) for r in records):
        here = [r for r in records if (r["task"], r["protocol"]) == (task, protocol)]
        limits = {r["spec"]: r for r in here if r["multiple"] is None}
        for curve in CURVES:
            found = {r["multiple"]: r for r in here if r["curve"] == curve}
            limit = limits["gradcos" if "cosine" in curve else "gradsim"]
            cells = [f"{100 * found[m]['coverage']:.0f}" for m in MULTIPLES]
            lines.append([task, protocol, curve, *cells, f"{100 * limit['coverage']:.0f}"])
    return heads, lines


def _figure(records: Sequence[dict[str, Any]]) -> Any:
    """Coverage over lambda, a panel a task and protocol."""
    cells = list(dict.fromkeys((r["task"], r["protocol"]) for r in records))
    figure, axes = panels(len(cells))
    for axis, (task, protocol) in zip(axes, cells, strict=True):
        here = [r for r in records if (r["task"], r["protocol"]) == (task, protocol)]
        for place, curve in enumerate(CURVES):
            found = sorted((r for r in here if r["curve"] == curve), key=lambda r: r["multiple"])
            line(axis, place, [r["multiple"] for r in found], found, "coverage", curve, 100)
        for style, spec in zip(("-", ":"), LIMITS, strict=True):
            level = next(r["coverage"] for r in here if r["spec"] == spec)
            axis.axhline(100 * level, color="0.75", linestyle=style, linewidth=1, label=f"{spec} (no curvature)")
        axis.axvline(0.01, color="0.85", linewidth=3, zorder=0)
        axis.set_xscale("log")
        axis.set_title(f"{task}, {protocol}", fontsize=8)
        axis.set_xlabel("lambda / trace of the empirical Fisher (grey: default)", fontsize=7)
        axis.set_ylabel("coverage, %", fontsize=7)
    legend(figure, axes[0], 3)
    return figure


def _spectra(frame: pd.DataFrame) -> Any:
    """Eigenvalues of K / n, joint in black and every block in grey; first seed."""
    cells = list(dict.fromkeys(zip(frame["task"], frame["protocol"], strict=True)))
    figure, axes = panels(len(cells))
    for axis, (task, protocol) in zip(axes, cells, strict=True):
        here = frame[(frame["task"] == task) & (frame["protocol"] == protocol) & (frame["seed"] == 0)]
        for name, group in here.groupby("block", sort=False):
            joint = name == "joint"
            axis.plot(
                group["rank"],
                np.maximum(group["share"], 1e-12),
                color="black" if joint else "0.75",
                linewidth=1.5 if joint else 0.4,
                zorder=2 if joint else 1,
            )
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 1)
        axis.set_title(f"{task}, {protocol}", fontsize=8)
        axis.set_xlabel("eigenvalue (black: all blocks, grey: one each)", fontsize=7)
        axis.set_ylabel("share of the trace", fontsize=7)
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in dict.fromkeys((r["task"], r["protocol"]) for r in records):
        here = [r for r in records if (r["task"], r["protocol"]) == (task, protocol)]
        found = [r for r in here if r["curve"] == "exact, block"]
        best = max(found, key=lambda r: r["coverage"])
        worst = min(found, key=lambda r: r["coverage"])
        lines.append(
            f"{task}, {protocol}: exact per block covers {100 * worst['coverage']:.0f}% at {worst['multiple']:g} "
            f"to {100 * best['coverage']:.0f}% at {best['multiple']:g} times the trace."
        )
    return lines


DAMPING = Study(
    "damping",
    "beyond",
    "scores and accuracy over eight decades of lambda, per block and joint, and the Gram matrix's spectrum",
    lambda setting: (
        "about 2 minutes" if setting.quick else "about 2 hours, 10 minutes where its cells are there already"
    ),
    run,
)
