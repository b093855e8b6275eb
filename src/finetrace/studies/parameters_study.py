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
    pairs,
    raw_distance,
    states,
    steps,
)
from finetrace.studies.plots import MARKS, STYLES, legend, panels
from finetrace.studies.study import Outcome, Say, Setting, Study


def run(folder: Path, setting: Setting, say: Say) -> Outcome:
    """Fine-tune on benign, harmful and mixed rows from the same start and from others; measure every epoch."""
    records: list[dict[str, Any]] = []
    for seed in range(setting.seeds):
        for start in STARTS:
            found = states(folder, setting, seed, start, say)
            about = {"seed": seed, "start": start}
            base = next(s for s in found if s.model == "base")
            records += [{"kind": "pair", **about, **each} for each in pairs(found)]
            records += [{"kind": "step", **about, **each} for each in steps(found)]
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


def _of(records: Sequence[dict[str, Any]], **where: Any) -> list[dict[str, Any]]:
    return [r for r in records if all(r[key] == value for key, value in where.items())]


def _spread(values: Sequence[float], form: str) -> str:
    known = [v for v in values if np.isfinite(v)]
    if not known:
        return "-"
    return f"{np.mean(known):{form}} ({min(known):{form}} to {max(known):{form}})"


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
    for start in STARTS:
        for pair in dict.fromkeys(r["pair"] for r in _of(records, kind="pair")):
            here = _of(records, kind="pair", start=start, pair=pair)
            cells = [_spread([r[key] for r in here], ".2f") for key in ("raw", "effective")]
            cells.append(_spread([100 * r["behaviour"] for r in here], ".0f"))
            lines.append([start, pair, *cells, _spread([r["loss"] for r in here], ".2f")])
    return heads, lines


def _correlations(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What goes with the change of behaviour: distances over pairs, inner products over steps and requests."""
    heads = ["adapters", "what", "with", "Pearson r", "Spearman"]
    lines = []
    for start in STARTS:
        seeds = sorted({r["seed"] for r in records})
        for key, name in (("raw", "raw distance"), ("effective", "distance of B A")):
            for target, word in (("behaviour", "change of attack success"), ("loss", "change of loss")):
                each = [_of(records, kind="pair", start=start, seed=seed) for seed in seeds]
                found = [correlation([r[key] for r in here], [r[target] for r in here]) for here in each]
                lines.append(
                    [start, f"{name}, six pairs", word, *(_spread([f[i] for f in found], ".2f") for i in (0, 1))]
                )
        for key, name in (
            ("distance", "length of an epoch's change"),
            ("first", "inner product with the gradient before"),
            ("both", "the same with the mean of the gradients before and after (a check of linearity)"),
        ):
            each = [_of(records, kind="step", start=start, seed=seed) for seed in seeds]
            size = abs if key == "distance" else float  # a length has no sign
            found = [correlation([r[key] for r in here], [size(r["change"]) for r in here]) for here in each]
            target = "size of the change of loss" if key == "distance" else "change of loss"
            lines.append([start, name, target, *(_spread([f[i] for f in found], ".2f") for i in (0, 1))])
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
            here = _of(records, kind="epoch", start=STARTS[0], model=model)
            here += _of(records, kind="epoch", start=STARTS[0], model="base")
            epochs = sorted({r["epoch"] for r in here})
            values = [[scale * r[key] for r in here if r["epoch"] == epoch] for epoch in epochs]
            shade, style = str(0.3 * place), {"linestyle": STYLES[place], "marker": MARKS[place], "markersize": 3}
            axis.plot(epochs, [np.mean(v) for v in values], color=shade, linewidth=1.1, label=model, **style)
            axis.fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=shade, alpha=0.15, linewidth=0
            )
        axis.set_xlabel("epoch", fontsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(head, fontsize=7)
    legend(figure, axes[0])
    return figure


def _steps(records: Sequence[dict[str, Any]]) -> Any:
    """First-order change of a request's loss against the true one, a dot an epoch and request."""
    figure, axes = panels(2)
    here = _of(records, kind="step", start=STARTS[0])
    for axis, (key, head) in zip(
        axes,
        (
            ("first", "inner product of the step with\nthe gradient before it, nats"),
            ("both", "inner product of the step with\nthe mean gradient, nats"),
        ),
        strict=True,
    ):
        for place, model in enumerate(MODELS):
            mine = _of(here, model=model)
            style = {"s": 6, "marker": MARKS[place], "color": str(0.3 * place), "linewidths": 0}
            axis.scatter([r[key] for r in mine], [r["change"] for r in mine], label=model, alpha=0.6, **style)
        ends = [min(r["change"] for r in here), max(r["change"] for r in here)]
        axis.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
        axis.set_xlabel(head, fontsize=7)
        axis.set_ylabel("true change of the loss, nats", fontsize=7)
    legend(figure, axes[0])
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
    lambda setting: "about 3 minutes" if setting.quick else "about 1 hour",
    run,
)
