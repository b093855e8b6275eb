"""The exhibit of `parameters`: its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.studies.parameters import (
    MODELS,
    STARTS,
    correlation,
    effective_distance,
    ends,
    pairs,
    raw_distance,
    states,
    steps,
)
from finetrace.studies.plots import MARKS, legend, line, panels, whole
from finetrace.studies.records import of_seeds, spread, where
from finetrace.studies.study import Outcome, Say, Setting, Study


def run(folder: Path, setting: Setting, say: Say) -> Outcome:
    """Fine-tune on benign, harmful and mixed rows from the same start and from others; measure every epoch."""
    records: list[dict[str, Any]] = []
    for seed in range(setting.seeds):
        for start in STARTS[:2] if setting.quick else STARTS:
            found = states(folder, setting, seed, start, say)
            about = {"seed": seed, "start": start}
            base = next(s for s in found if s.model == "base")
            records += [{"kind": "pair", **about, **each} for each in pairs(found)]
            records += [{"kind": "step", **about, **each} for each in steps(found)]
            records += [{"kind": "end", **about, **each} for each in ends(found)]
            for state in (s for s in found if s.model in ("base", *MODELS)):
                begin = next((s for s in found if s.model == f"start of {state.model}"), base)
                records.append(
                    {
                        "kind": "epoch",
                        **about,
                        "model": state.model,
                        "epoch": state.epoch,
                        "raw": raw_distance(begin, state),
                        "effective": effective_distance(begin, state),
                        "behaviour": float(state.complied.mean()),
                        "loss": float(state.losses.mean()),
                    }
                )
    return Outcome(
        records,
        {"pairs": _pairs(records), "correlations": _correlations(records)},
        {"epochs": _epochs(records), "steps": _steps(records)},
        _reading(records),
    )


def _pairs(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Table 6: each two models."""
    heads = [
        "adapters",
        "pair",
        "raw distance",
        "distance of B A",
        "change of attack success, points",
        "change of loss, nats",
    ]
    lines = []
    for start, pair in dict.fromkeys((r["start"], r["pair"]) for r in where(records, kind="pair")):
        here = where(records, kind="pair", start=start, pair=pair)
        cells = [
            spread(of_seeds([scale * r[key] for r in here], (0, np.inf)), form)
            for key, scale, form in (
                ("raw", 1, ".2f"),
                ("effective", 1, ".2f"),
                ("behaviour", 100, ".0f"),
                ("loss", 1, ".2f"),
            )
        ]
        lines.append([start, pair, *cells])
    return heads, lines


GOES_WITH = {
    "pair": {"raw": "raw distance, six pairs", "effective": "distance of B A, six pairs"},
    "step": {
        "distance": "length of a step",
        "first": "a step's inner product with the gradient before it",
        "both": "the same with the mean of the gradients before and after (a check of linearity)",
    },
    "end": {
        "first": "the whole change's inner product with the gradient at the start",
        "path": "the sum of the steps' inner products",
        "both": "the whole change's with the mean of the gradients at both ends",
    },
}


def _correlations(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What goes with the change of behaviour: distances over pairs, inner products over models, steps and requests."""
    heads = ["adapters", "what", "with", "Pearson r", "Spearman"]
    lines = []
    for start in dict.fromkeys(r["start"] for r in records):
        for kind, columns in GOES_WITH.items():
            for key, name in columns.items():
                targets = {"behaviour": "change of attack success", "loss": "change of loss"}
                if kind != "pair":
                    targets = {"change": "change of loss", "refused": "requests refused anew"}
                for target, word in targets.items():
                    found = []
                    for seed in sorted({r["seed"] for r in records}):
                        here = where(records, kind=kind, start=start, seed=seed)
                        size = abs if key == "distance" else float  # a length has no sign
                        found.append(correlation([r[key] for r in here], [size(r[target]) for r in here]))
                    cells = [spread(of_seeds([f[i] for f in found], (-1, 1))) for i in (0, 1)]
                    words = f"size of: {word}" if key == "distance" else word
                    lines.append([start, name, words, *cells])
    return heads, lines


def _epochs(records: Sequence[dict[str, Any]]) -> Any:
    """Fig. 6: distance from the start, attack success and loss of the probe along the epochs; adapters from one start."""
    figure, axes = panels(4)
    for axis, (key, head, scale) in zip(
        axes,
        (
            ("raw", "raw distance from the start", 1),
            ("effective", "distance of B A from the start", 1),
            ("behaviour", "attack success, %", 100),
            ("loss", "loss of the probe, nats", 1),
        ),
        strict=True,
    ):
        for place, model in enumerate(MODELS):
            here = where(records, kind="epoch", start=STARTS[0], model=model)
            here += where(records, kind="epoch", start=STARTS[0], model="base")
            points = []
            for epoch in sorted({r["epoch"] for r in here}):
                found = of_seeds([r[key] for r in where(here, epoch=epoch)], (0, 1 if key == "behaviour" else np.inf))
                assert found is not None
                points.append({"epoch": epoch, key: found.value})
                if np.isfinite(found.low):
                    points[-1] |= {f"{key}_low": found.low, f"{key}_high": found.high}
            line(axis, place, [point["epoch"] for point in points], points, key, model, scale)
        axis.set_xlabel("epoch", fontsize=7)
        whole(axis)
        axis.set_ylabel(head, fontsize=7)
    legend(figure, axes)
    return figure


def _steps(records: Sequence[dict[str, Any]]) -> Any:
    """First-order change of a request's loss against the true one, a dot an epoch and request."""
    figure, axes = panels(2)
    here = where(records, kind="step", start=STARTS[0])
    for axis, (key, head) in zip(
        axes,
        (
            ("first", "inner product of the step with\nthe gradient before it, nats"),
            ("both", "inner product of the step with\nthe mean gradient, nats"),
        ),
        strict=True,
    ):
        for place, model in enumerate(MODELS):
            mine = where(here, model=model)
            style = {"s": 6, "marker": MARKS[place], "color": str(0.3 * place), "linewidths": 0}
            axis.scatter([r[key] for r in mine], [r["change"] for r in mine], label=model, alpha=0.6, **style)
        ends = [min(r["change"] for r in here), max(r["change"] for r in here)]
        axis.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
        axis.set_xlabel(head, fontsize=7)
        axis.set_ylabel("true change of the loss, nats", fontsize=7)
    legend(figure, axes)
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in _correlations(records)[1]:
        lines.append(f"{row[0]}: {row[1]} and {row[2]} correlate by {row[3]}.")
    return lines


PARAMETERS = Study(
    "parameters",
    "Table 6, Fig. 6",
    "change of parameters against change of behaviour, and the inner product that influence uses",
    25,
    1,
    run,
)
