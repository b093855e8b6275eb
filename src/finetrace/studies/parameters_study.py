"""The exhibit of `parameters`: its tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.fingerprint import of_text
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
    tunings,
)
from finetrace.studies.pieces import Piece, Say, kept
from finetrace.studies.plots import MARKS, legend, line, panels, whole
from finetrace.studies.records import of_seeds, spread, where
from finetrace.studies.study import Outcome, Setting, Study


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Fine-tune on benign, harmful and mixed rows from the same start and from others; measure every epoch."""
    found = []
    for seed, start in product(range(setting.seeds), STARTS[:2] if setting.quick else STARTS):
        decided = of_text(" ".join(each.decided for each in tunings(setting, seed, start)))
        name = f"{start.replace(' ', '-')}-seed-{seed}-{decided}"
        found.append(
            kept(folder, name, f"seed {seed}, {start}", partial(_measured, folder, setting, seed, start), seed)
        )
    return found


def outcome(setting: Setting, found: Sequence[Sequence[dict[str, Any]]]) -> Outcome:
    """Of the records of whole seeds."""
    records = list(chain.from_iterable(found))
    return Outcome(
        records,
        {"pairs": _pairs(records), "correlations": _correlations(records)},
        {
            f"epochs-{start.replace(' ', '-')}": _epochs(records, start)
            for start in dict.fromkeys(r["start"] for r in records)
        }
        | {"steps": _steps(records)},
        _reading(records),
    )


def _measured(folder: Path, setting: Setting, seed: int, start: str, say: Say) -> list[dict[str, Any]]:
    """The records of one seed and kind of start."""
    found = states(folder, setting, seed, start, say)
    about = {"seed": seed, "start": start}
    base = next(s for s in found if s.model == "base")
    records: list[dict[str, Any]] = [{"kind": "pair", **about, **each} for each in pairs(found)]
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
    return records


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
            spread(of_seeds([scale * r[key] for r in here], (0, scale if key == "behaviour" else np.inf)), form)
            for key, scale, form in (
                ("raw", 1, ".2f"),
                ("effective", 1, ".2f"),
                ("behaviour", 100, ".0f"),
                ("loss", 1, ".2f"),
            )
        ]
        lines.append([start, pair, *cells])
    return heads, lines


LOSS, VERDICT, ATTACKS = "change of loss", "requests refused anew", "change of attack success"
BOTH_ENDS = "inner product with the mean of the gradients before and after (a check of linearity)"
# unit of the correlation, what (a column and its name), and with what
GOES_WITH = (
    ("pair", "raw", "raw distance", "behaviour", ATTACKS),
    ("pair", "raw", "raw distance", "loss", LOSS),
    ("pair", "effective", "distance of B A", "behaviour", ATTACKS),
    ("pair", "effective", "distance of B A", "loss", LOSS),
    ("mean", "distance", "length of a step", "size", f"size of the mean {LOSS}"),
    ("mean", "first", "mean inner product with the gradient before", "change", f"mean {LOSS}"),
    ("mean", "both", f"mean {BOTH_ENDS}", "change", f"mean {LOSS}"),
    ("step", "first", "inner product with the gradient before", "change", LOSS),
    ("step", "both", BOTH_ENDS, "change", LOSS),
    ("end", "first", "inner product with the gradient at the start", "change", LOSS),
    ("end", "path", "sum of the steps' inner products", "change", LOSS),
    ("end", "both", BOTH_ENDS, "change", LOSS),
    ("end", "first", "inner product with the gradient at the start", "refused", VERDICT),
    ("end", "path", "sum of the steps' inner products", "refused", VERDICT),
)
UNITS = {
    "pair": "two models",
    "mean": "a step, mean of requests",
    "step": "a request in a step",
    "end": "a request, start to end",
}


def _units(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """What one correlation is over; `mean` averages the requests of each step."""
    if kind != "mean":
        return where(records, kind=kind)
    steps: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in where(records, kind="step"):
        steps.setdefault((r["model"], r["epoch"]), []).append(r)
    found = []
    for (model, _), here in steps.items():
        means = {key: float(np.mean([r[key] for r in here])) for key in ("distance", "change", "first", "both")}
        found.append({"model": model, **means, "size": abs(means["change"])})
    return found


def _within(here: Sequence[dict[str, Any]], key: str, target: str) -> float:
    """The mean over models of Pearson's r within each; NaN where none has one."""
    each = [correlation([r[key] for r in mine], [r[target] for r in mine])[0] for mine in _by_model(here)]
    known = [r for r in each if np.isfinite(r)]
    return float(np.mean(known)) if known else float("nan")


def _by_model(here: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [where(here, model=model) for model in MODELS]


def _correlations(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What goes with the change of behaviour: distances over pairs, inner products over models, steps and requests."""
    heads = ["adapters", "unit", "what", "with", "n a seed", "Pearson r", "within a model", "Spearman"]
    lines = []
    seeds = sorted({r["seed"] for r in records})
    for start in dict.fromkeys(r["start"] for r in records):
        for kind, key, name, target, word in GOES_WITH:
            each = [_units(where(records, start=start, seed=seed), kind) for seed in seeds]
            found = [correlation([r[key] for r in here], [r[target] for r in here]) for here in each]
            inner = [float("nan") if kind == "pair" else _within(here, key, target) for here in each]
            cells = [
                spread(of_seeds(values, (-1, 1))) for values in ([f[0] for f in found], inner, [f[1] for f in found])
            ]
            if target == "refused":
                word = f"{word} ({sum(r[target] != 0 for here in each for r in here)} verdicts changed)"
            lines.append([start, UNITS[kind], name, word, str(len(each[0])), *cells])
    return heads, lines


def _epochs(records: Sequence[dict[str, Any]], start: str) -> Any:
    """Fig. 6: distance from the start, attack success and loss of the probe along the epochs."""
    figure, axes = panels(4)
    for axis, (key, head, scale) in zip(
        axes,
        (
            ("raw", "raw distance from the start, L2", 1),
            ("effective", "distance of B A from the start, L2", 1),
            ("behaviour", "attack success, %", 100),
            ("loss", "loss of the probe, nats a token", 1),
        ),
        strict=True,
    ):
        for place, model in enumerate(MODELS):
            here = where(records, kind="epoch", start=start, model=model)
            here += where(records, kind="epoch", start=start, model="base")
            points = []
            for epoch in sorted({r["epoch"] for r in here}):
                found = of_seeds([r[key] for r in where(here, epoch=epoch)], (0, 1 if key == "behaviour" else np.inf))
                assert found is not None
                known = np.isfinite(found.low)
                ends = (found.low, found.high) if known else (None, None)
                points.append({"epoch": epoch, key: found.value, f"{key}_low": ends[0], f"{key}_high": ends[1]})
            line(axis, place, [point["epoch"] for point in points], points, key, model, scale, apart=False)
        axis.set_xlabel(f"epoch, {start}", fontsize=7)
        whole(axis)
        axis.set_ylabel(head, fontsize=7)
    legend(figure, axes)
    return figure


def _steps(records: Sequence[dict[str, Any]]) -> Any:
    """First-order change of a request's loss against the true one, a dot a step and request; a panel a kind of start."""
    starts = list(dict.fromkeys(r["start"] for r in records))
    figure, axes = panels(len(starts), across=3)
    for axis, start in zip(axes, starts, strict=True):
        here = where(records, kind="step", start=start)
        for place, model in enumerate(MODELS):
            mine = where(here, model=model)
            style = {"s": 8, "marker": MARKS[place], "color": str(0.25 * place), "linewidths": 0}
            axis.scatter([r["first"] for r in mine], [r["change"] for r in mine], label=model, **style)
        ends = [min(r["change"] for r in here), max(r["change"] for r in here)]
        axis.plot(ends, ends, color="0.6", linewidth=0.8, label="equal")
        axis.set_title(start, fontsize=8)
        axis.set_xlabel("inner product of a step with\nthe gradient before it, nats", fontsize=7)
    axes[0].set_ylabel("true change of the loss, nats", fontsize=7)
    legend(figure, axes)
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    """Two distances with the change of attack success, and a step's length and inner product with the change of loss."""
    rows = _correlations(records)[1]
    lines = []
    for start in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == start]
        found = {(kind, key, target): row for (kind, key, _, target, _), row in zip(GOES_WITH, mine, strict=True)}
        lines.append(
            f"{start}: over six pairs of models the change of attack success correlates with raw distance by "
            f"{found['pair', 'raw', 'behaviour'][5]}, with that of B A by {found['pair', 'effective', 'behaviour'][5]}; "
            f"over steps the mean change of loss by {found['mean', 'distance', 'size'][5]} (sizes) with the length and by "
            f"{found['mean', 'first', 'change'][5]} with the mean inner product; over requests by "
            f"{found['step', 'first', 'change'][6]} within a model."
        )
    return lines


PARAMETERS = Study(
    "parameters",
    "Table 6, Fig. 6",
    "change of parameters against change of behaviour, and the inner product that influence uses",
    45,
    1,
    pieces,
    outcome,
    whole_seeds=True,
)
