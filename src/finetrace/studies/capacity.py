"""Parameter change against test accuracy while small networks learn digits (Fig. 7 of arXiv 2409.19998).

Two linear layers without activation, wider and wider, by plain stochastic gradient descent. If a change of parameters told of
a change of behaviour, accuracy would follow the distance from where training began. From zero in both layers nothing can
be learnt: each layer's gradient carries the other layer as a factor. That run is kept, beside zero in the last layer alone
and the usual random start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

from finetrace.studies.mnist import CLASSES, SIDE, Digits
from finetrace.studies.pieces import Piece, Say, kept, wordless
from finetrace.studies.plots import STYLES, legend, line, panels
from finetrace.studies.records import of_seeds, spread, where
from finetrace.studies.study import Outcome, Setting, Study

WIDTHS, QUICK_WIDTHS = (16, 64, 256, 1024), (8, 16, 32, 64)
STARTS = ("zero", "zero last", "random")
BATCH, RATE = 50, 0.05

Name = tuple[int, str, int]  # width, start, seed
Curve = list[dict[str, float]]


def train(width: int, start: str, seed: int, points: int, epochs: int, every: int) -> list[dict[str, float]]:
    """One run: distance from the start, test accuracy and loss, at every `every`-th step."""
    digits = Digits.draw(points, 1000, SIDE, seed)
    inputs, tests = digits.train.float(), digits.test.float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIDE**2, width, bias=False), nn.Linear(width, CLASSES, bias=False))
    for weight in {"zero": list(model.parameters()), "zero last": [list(model.parameters())[1]], "random": []}[start]:
        nn.init.zeros_(weight)
    began = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    records: list[dict[str, float]] = []
    steps = epochs * points // BATCH
    rows = torch.cat([torch.randperm(points, generator=order) for _ in range(epochs)]).view(steps, BATCH)
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                logits = model(tests)
                moved = [p - first for p, first in zip(model.parameters(), began, strict=True)]
                records.append(
                    {
                        "step": step,
                        "change": float(torch.sqrt(sum(m.square().sum() for m in moved))),  # type: ignore[arg-type]
                        "accuracy": float((logits.argmax(1) == digits.test_classes).float().mean()),
                        "loss": float(nn.functional.cross_entropy(logits, digits.test_classes)),
                    }
                )
        if step < steps:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows[step]]), digits.train_classes[rows[step]]).backward()
            optimizer.step()
    return records


def correlations(records: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Over the records of one run: of distance with accuracy, and of the growth of one with that of the other."""
    change, accuracy = ([r[key] for r in records] for key in ("change", "accuracy"))
    if np.ptp(change) == 0 or np.ptp(accuracy) == 0:
        return {"pearson": None, "spearman": None, "late": None, "stepwise": None}
    half = len(records) // 2
    late = (change[half:], accuracy[half:])
    gains = ([b - a for a, b in pairwise(change)], [b - a for a, b in pairwise(accuracy)])
    return {
        "pearson": float(pearsonr(change, accuracy).statistic),
        "spearman": float(spearmanr(change, accuracy).statistic),
        "late": float(spearmanr(*late).statistic) if np.ptp(late[1]) > 0 else None,
        "stepwise": float(spearmanr(*gains).statistic) if np.ptp(gains[0]) > 0 and np.ptp(gains[1]) > 0 else None,
    }


def _sizes(setting: Setting) -> tuple[tuple[int, ...], int, int, int]:
    """Widths, points, epochs, and steps from record to record."""
    return (QUICK_WIDTHS, 1000, 3, 3) if setting.quick else (WIDTHS, 4000, 10, 10)


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """One a width, start and seed."""
    widths, points, epochs, every = _sizes(setting)
    found = []
    for seed, start, width in product(range(setting.seeds), STARTS, widths):
        name = f"{width}-{start.replace(' ', '-')}-{seed}-{points}-{epochs}-{every}-{BATCH}-{RATE}"
        what = f"width {width}, {start} start, seed {seed}"
        piece = kept(folder, name, what, wordless(train, width, start, seed, points, epochs, every), seed)
        found.append(replace(piece, find=partial(_named, (width, start, seed), piece.find)))
    return found


def _named(name: Name, find: Callable[[Say], Curve], say: Say) -> tuple[Name, Curve]:
    """A curve with what it is of, which its file says by its name alone."""
    return name, find(say)


def outcome(setting: Setting, found: Sequence[tuple[Name, Curve]]) -> Outcome:
    """Of the curves of whole seeds."""
    widths, points, epochs, _ = _sizes(setting)
    curves = dict(found)
    records = [
        {
            "width": width,
            "parameters": width * (SIDE**2 + CLASSES),
            "start": start,
            "seed": seed,
            "accuracy": curve[-1]["accuracy"],
            "change": curve[-1]["change"],
            **correlations(curve),
        }
        for (width, start, seed), curve in curves.items()
    ]
    return Outcome(
        records,
        {"capacity": _table(records)},
        {"capacity": _figure(curves, records, widths)},
        _reading(records),
        {"points": points, "epochs": epochs, "batch": BATCH, "learning_rate": RATE},
    )


BOUNDS = {"accuracy": (0.0, 1.0), "change": (0.0, float("inf"))}  # of what is not a correlation


def _spread(records: Sequence[dict[str, Any]], key: str) -> str:
    """Mean over seeds with its interval."""
    found = of_seeds([r[key] for r in records], BOUNDS.get(key, (-1.0, 1.0)))
    return spread(found) if found is not None else "undefined"


def _table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = [
        "start",
        "width",
        "parameters",
        "accuracy",
        "change",
        "Pearson r",
        "Spearman",
        "second half",
        "from record to record",
    ]
    lines = []
    for start, width in dict.fromkeys((r["start"], r["width"]) for r in records):
        here = where(records, start=start, width=width)
        cells = [_spread(here, key) for key in ("accuracy", "change", "pearson", "spearman", "late", "stepwise")]
        lines.append([start, str(width), f"{here[0]['parameters']:,}", *cells])
    return heads, lines


def _figure(curves: dict[Name, Curve], records: Sequence[dict[str, Any]], widths: Sequence[int]) -> Any:
    """Accuracy against distance, one panel a start, a line a seed and a shade a width; and their correlation by width."""
    figure, axes = panels(len(STARTS), across=len(STARTS))
    for axis, start in zip(axes, STARTS[1:], strict=False):
        for i, width in enumerate(widths):
            for place, seed in enumerate(sorted({key[2] for key in curves})):
                curve = curves[width, start, seed]
                axis.plot(
                    [r["change"] for r in curve],
                    [100 * r["accuracy"] for r in curve],
                    color=str(0.6 * i / (len(widths) - 1)),
                    linestyle=STYLES[i],
                    linewidth=1,
                    label=f"width {width}" if place == 0 else None,
                )
        stuck = [100 * r["accuracy"] for r in where(records, start=STARTS[0])]
        label = "zero in both layers: nothing moves"
        axis.plot([0] * len(stuck), stuck, marker="x", markersize=4, linestyle="none", color="black", label=label)
        axis.set_title(f"{start} start", fontsize=8)
        axis.set_xlabel("distance from the start,\nL2 norm of all weights", fontsize=7)
        axis.set_ylabel("test accuracy, %", fontsize=7)
    last = axes[-1]
    for i, start in enumerate(STARTS[1:]):
        points = []
        for width in widths:
            found = of_seeds([r["pearson"] for r in where(records, start=start, width=width)], (-1, 1))
            assert found is not None
            known = np.isfinite(found.low)
            points.append(
                {"r": found.value, "r_low": found.low if known else None, "r_high": found.high if known else None}
            )
        line(last, 2 * i, widths, points, "r", f"{start} start")
    last.set_xscale("log", base=2)
    last.margins(x=0.1)
    last.set_xticks(widths, [str(width) for width in widths])
    last.set_title("accuracy with distance", fontsize=8)
    last.set_xlabel("width", fontsize=7)
    last.set_ylabel("Pearson r along training", fontsize=7)
    last.set_ylim(None, 1)
    legend(figure, axes)
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    stuck = where(records, start="zero")
    lines = [
        f"From zero in both layers the parameters move by {max(r['change'] for r in stuck):g}: each layer's gradient has the "
        "other as a factor."
    ]
    for start in STARTS[1:]:
        here = where(records, start=start)
        widest = max(r["width"] for r in here)
        of = where(here, width=widest)
        lines.append(
            f"{start} start, width {widest}: along training distance and accuracy correlate by {_spread(of, 'spearman')} "
            f"(ranks), in the second half by {_spread(of, 'late')}, their growth by {_spread(of, 'stepwise')}."
        )
    return lines


CAPACITY = Study(
    "capacity",
    "Fig. 7",
    "parameter change against accuracy while two-layer linear models of growing width learn digits",
    0.25,
    0.25,
    pieces,
    outcome,
    whole_seeds=True,
    digits="float32",
)
