"""Influence where it is exact: softmax regression on digits, trained to its minimum, against training again.

Training adds no noise here: a convex loss has one minimum, and what a row does to an answer is known by leaving it out and
minimising again. A score that is right has to show it here before it is believed of a language model. The loss of
a row always weighs 1/n, so that leaving rows out takes away their terms and changes neither the others' nor the decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from finetrace.errors import FinetraceError
from finetrace.evaluation.lds import draw_subsets, per_query
from finetrace.evaluation.removal import Group, order
from finetrace.fingerprint import of_text
from finetrace.studies.approximation import Trained, dense, methods
from finetrace.studies.mnist import Digits, gradients, softmax_hessian, softmax_regression
from finetrace.studies.pieces import Piece, kept, wordless
from finetrace.studies.plots import legend, line, panels
from finetrace.studies.records import Records, of_seeds, spread, where
from finetrace.studies.study import Outcome, Setting, Study

POINTS, QUICK_POINTS = 4000, 1000
QUERIES, SIDE, DECAY = 100, 7, 1e-2
SUBSETS, QUICK_SUBSETS, SHARE = 40, 12, 0.5
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
GROUPS = 10  # classes of queries that rows are removed for
LEFT_OUT = 50
ENOUGH = 1e-10  # norm of the gradient at which Newton's method ends
EXACT, FISHER = "exact, Hessian", "exact, Fisher"


def minimum(at: Trained, left: Tensor) -> Tensor:
    """(10, p) weights that minimise (1/n) sum over `left` of the cross-entropy + decay / 2 ||W||^2, by Newton's method.

    Args:
        at: The minimum of all n points, where it begins.
        left: Positions of the points that stay.
    """
    weights = at.weights
    for _ in range(50):
        slope = _slope(at, weights, left)
        if float(slope.norm()) < ENOUGH:
            return weights
        weights = weights - _solved(at, weights, left, slope)
    raise FinetraceError(
        f"Newton's method did not converge on {len(left)} of {len(at.train)} points; leave more of them in."
    )


def one_step(at: Trained, left: Tensor) -> Tensor:
    """(10, p) weights one Newton step from the minimum of all points towards that of `left`: second-order group influence."""
    return at.weights - _solved(at, at.weights, left, _slope(at, at.weights, left))


def _slope(at: Trained, weights: Tensor, left: Tensor) -> Tensor:
    """(10 p,) gradient of what `minimum` minimises."""
    inputs, classes = at.digits.train[left], at.digits.train_classes[left]
    return gradients(weights, inputs, classes).sum(0) / len(at.train) + at.decay * weights.flatten()


def _solved(at: Trained, weights: Tensor, left: Tensor, slope: Tensor) -> Tensor:
    """(10, p) the inverse Hessian of what `minimum` minimises times `slope`."""
    hessian = softmax_hessian(weights, at.digits.train[left]) * (len(left) / len(at.train))
    hessian.diagonal().add_(at.decay)
    return torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(hessian)).view_as(weights)


def query_losses(at: Trained, weights: Tensor) -> Tensor:
    """(m,) cross-entropy of every query."""
    return cross_entropy(at.digits.test @ weights.T, at.digits.test_classes, reduction="none")


def train(points: int, seed: int) -> Trained:
    """Digits, the minimum of their loss, and gradients there; ridge and decay are one, since that is what was minimised."""
    digits = Digits.draw(points, QUERIES, SIDE, seed)
    weights = softmax_regression(digits.train, digits.train_classes, DECAY)
    own = gradients(weights, digits.train, digits.train_classes)
    asked = gradients(weights, digits.test, digits.test_classes)
    return Trained(digits, weights, own, asked, damping=0.0, decay=DECAY)


def scores(at: Trained, seed: int) -> dict[str, Tensor]:
    """By method, (m, n), positive = proponent; those of `EXACT` over n are the rise of a query's loss without a row."""
    found: dict[str, Callable[[], Tensor]] = {EXACT: lambda: dense(at, "hessian")}
    fisher = Trained(at.digits, at.weights, at.train, at.query, damping=at.decay, decay=0.0)
    found[FISHER] = lambda: dense(fisher, "fisher")
    wanted = ("EK-FAC", "DataInf", "LiSSA 10", "LiSSA 100", "GradSim")
    for name, compute in methods().items():
        if name in wanted:
            found[name] = lambda compute=compute: compute(at, "hessian")  # type: ignore[misc]
    found["GradCos"] = lambda: normalize(at.query) @ normalize(at.train).T
    found["inputs' cosine"] = lambda: normalize(at.digits.test) @ normalize(at.digits.train).T
    drawing = torch.Generator().manual_seed(seed)
    found["random"] = lambda: torch.rand(len(at.query), len(at.train), generator=drawing, dtype=at.query.dtype)
    return {name: compute() for name, compute in found.items()}


def measure(points: int, subsets: int, seed: int) -> list[dict[str, Any]]:
    """LDS of every method, rows left out singly, and what removing the top rows of `EXACT` does and was predicted to do."""
    at = train(points, seed)
    given = scores(at, seed)
    exact = given[EXACT] / points
    before = query_losses(at, at.weights)
    everything = torch.arange(points)

    def rise(left: Tensor) -> Tensor:
        return query_losses(at, minimum(at, left)) - before

    members = draw_subsets(points, subsets, SHARE, seed)
    after = np.stack([rise(torch.from_numpy(np.flatnonzero(row))).numpy() for row in members])[None]
    records: list[dict[str, Any]] = []
    for name, values in given.items():
        found = per_query(values.numpy(), members, after)
        records.append({"measure": "lds", "method": name, "seed": seed, "value": float(np.nanmean(found))})

    gone = np.random.default_rng(seed).choice(points, LEFT_OUT, replace=False)
    singly = torch.stack([rise(everything[everything != int(row)]) for row in gone], 1)  # (m, LEFT_OUT)
    for name, values in given.items():
        ranks = [spearmanr(a, b).statistic for a, b in zip(values[:, gone], singly, strict=True)]
        records.append({"measure": "loo", "method": name, "seed": seed, "value": float(np.mean(ranks))})
    error = float((exact[:, gone] - singly).norm() / singly.norm())
    records.append({"measure": "loo-error", "method": EXACT, "seed": seed, "value": error})

    for label in range(GROUPS):
        asked = Group(str(label), tuple(torch.nonzero(at.digits.test_classes == label).flatten().tolist()))
        if not asked.queries:
            continue
        mine = list(asked.queries)
        ranked = torch.from_numpy(order(exact.numpy(), asked).copy())
        for count in COUNTS:
            left = ranked[count:].sort().values
            predicted = float(exact[mine][:, ranked[:count]].sum(1).mean())
            stepped = float((query_losses(at, one_step(at, left)) - before)[mine].mean())
            true = float(rise(left)[mine].mean())
            about = {"measure": "drop", "seed": seed, "group": label, "count": count}
            records.append({**about, "true": true, "sum": predicted, "newton": stepped})
    return records


def _sizes(setting: Setting) -> tuple[int, int]:
    """Points, and random halves of them."""
    return (QUICK_POINTS, QUICK_SUBSETS) if setting.quick else (POINTS, SUBSETS)


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """One a seed."""
    points, subsets = _sizes(setting)
    constants = of_text(repr((QUERIES, SIDE, DECAY, SHARE, COUNTS, GROUPS, LEFT_OUT, ENOUGH)))
    found = []
    for seed in range(setting.seeds):
        name, what = f"{points}-{subsets}-{seed}-{constants}", f"{points} digits, {subsets} subsets, seed {seed}"
        found.append(kept(folder, name, what, wordless(measure, points, subsets, seed), seed))
    return found


def outcome(setting: Setting, found: Sequence[Records]) -> Outcome:
    """Of the records of each seed."""
    points, subsets = _sizes(setting)
    records = list(chain.from_iterable(found))
    return Outcome(
        records,
        {"convex": _table(records), "convex-drop": _drops(records)},
        {"convex": _figure(records)},
        _reading(records, points),
        {"points": points, "subsets": subsets, "queries": QUERIES, "decay": DECAY},
    )


def _over_seeds(records: Records, measure: str, method: str) -> Any:
    return of_seeds([r["value"] for r in where(records, measure=measure, method=method)], (-1.0, 1.0))


def _table(records: Records) -> tuple[list[str], list[list[str]]]:
    names = dict.fromkeys(r["method"] for r in where(records, measure="lds"))
    lines = [[name, *(spread(_over_seeds(records, key, name), ".3f") for key in ("lds", "loo"))] for name in names]
    return ["method", "LDS", "left out singly, rank"], lines


def _errors(records: Records, count: int, key: str) -> tuple[float, float]:
    """Median and largest relative error of a predicted removal, over groups and seeds."""
    each = [abs(r[key] - r["true"]) / abs(r["true"]) for r in where(records, measure="drop", count=count)]
    return float(np.median(each)), max(each)


def _drops(records: Records) -> tuple[list[str], list[list[str]]]:
    lines = []
    for count in COUNTS:
        here = where(records, measure="drop", count=count)
        cells = [f"{np.mean([r[key] for r in here]):.4f}" for key in ("true", "sum", "newton")]
        cells += ["{:.1%} ({:.1%})".format(*_errors(records, count, key)) for key in ("sum", "newton")]
        lines.append([str(count), *cells])
    return ["rows", "true, nats", "sum of scores", "one Newton step", "error of the sum", "of the step"], lines


def _figure(records: Records) -> Any:
    """LDS by method, and the rise of the loss over the rows removed: true, summed, and by one step."""
    figure, (left, right) = panels(2, height=2.6)
    names = list(dict.fromkeys(r["method"] for r in where(records, measure="lds")))[::-1]
    for place, name in enumerate(names):
        found = _over_seeds(records, "lds", name)
        known = np.isfinite(found.low)
        reach = [[found.value - found.low], [found.high - found.value]] if known else [[0.0], [0.0]]
        left.errorbar(found.value, place, xerr=reach, marker="o", markersize=4, color="black", elinewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel(f"LDS over subsets of {SHARE:.0%} of the rows", fontsize=7)
    left.axvline(0, color="0.6", linewidth=0.8)
    for place, (key, label) in enumerate(
        (("true", "trained again"), ("sum", "sum of exact scores"), ("newton", "one Newton step"))
    ):
        points = []
        for count in COUNTS:
            by_seed: dict[int, list[float]] = {}
            for r in where(records, measure="drop", count=count):
                by_seed.setdefault(r["seed"], []).append(r[key])
            found = of_seeds([float(np.mean(values)) for values in by_seed.values()])
            assert found is not None
            known = np.isfinite(found.low)
            ends = (found.low, found.high) if known else (None, None)
            points.append({"rise": found.value, "rise_low": ends[0], "rise_high": ends[1]})
        line(right, 1 + 2 * place, COUNTS, points, "rise", label)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("top rows removed for a class of queries", fontsize=7)
    right.set_ylabel("rise of the queries' loss, nats", fontsize=7)
    legend(figure, [right], 3)
    return figure


def _reading(records: Records, points: int) -> list[str]:
    lines = [
        f"Over random halves of {points:,} rows the exact influence with the true Hessian has an LDS of "
        f"{spread(_over_seeds(records, 'lds', EXACT), '.3f')}; one of 1 is possible, since training has no noise.",
        "Rows left out singly: its scores order them by a rank correlation of "
        f"{spread(_over_seeds(records, 'loo', EXACT), '.3f')}, and their values are off by "
        f"{spread(of_seeds([r['value'] for r in where(records, measure='loo-error')]), '.1%')} (relative L2).",
    ]
    for key, name in (("sum", "The sum of scores"), ("newton", "One Newton step on the rows that are left")):
        within = list(takewhile(lambda count: _errors(records, count, key)[1] <= 0.05, COUNTS))  # noqa: B023
        if within:
            worst = _errors(records, within[-1], key)[1]
            lines.append(
                f"{name} predicts removing up to {within[-1]} top rows to within 5% for every class and seed (at "
                f"{within[-1]} rows the largest error is {worst:.1%})."
            )
        else:
            lines.append(f"{name} predicts no removal that was tried to within 5% for every class and seed.")
    return lines


CONVEX = Study(
    "convex",
    "beyond",
    "LDS, leave-one-out and removal against exact retraining, softmax regression on digits",
    1,
    0.3,
    pieces,
    outcome,
    digits="float64",
)
