"""Softmax regression trained to its minimum: there influence can be held against the truth itself."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian
from torch.nn.functional import cross_entropy

from finetrace.studies import convex
from finetrace.studies.approximation import Trained
from finetrace.studies.convex import CONVEX, EXACT, minimum, one_step, query_losses, train
from finetrace.studies.study import Setting
from finetrace.studies.write import run


def objective(at: Trained, weight: Tensor, flat: Tensor) -> Tensor:
    """What is minimised where the rows count by `weight`, from its definition."""
    losses = cross_entropy(at.digits.train @ flat.view(10, -1).T, at.digits.train_classes, reduction="none")
    return (weight * losses).mean() + at.decay / 2 * flat.square().sum()


def newton(at: Trained, weight: Tensor, steps: int) -> Tensor:
    """So many Newton steps from the minimum of all rows, by automatic differentiation."""
    flat = at.weights.flatten()
    for _ in range(steps):
        slope = grad(partial(objective, at, weight))(flat)
        flat = flat - torch.linalg.solve(hessian(partial(objective, at, weight))(flat), slope)
    return flat.view_as(at.weights)


@pytest.fixture(scope="module")
def at() -> Trained:
    return train(120, 0)


def test_the_minimum_and_the_step_towards_it_are_those_of_automatic_differentiation(at: Trained) -> None:
    weight = torch.ones(120, dtype=torch.float64)
    weight[[3, 40, 77]] = 0
    left = weight.nonzero().squeeze(1)
    torch.testing.assert_close(minimum(at, left), newton(at, weight, 8), rtol=0, atol=1e-9)  # the slope's norm / decay
    torch.testing.assert_close(one_step(at, left), newton(at, weight, 1), rtol=1e-9, atol=1e-12)


def test_exact_influence_is_the_derivative_by_a_rows_weight(at: Trained) -> None:
    scores, step = scores_of(at), 1e-4
    for row in (7, 100):
        sides = []
        for sign in (1, -1):
            weight = torch.ones(120, dtype=torch.float64)
            weight[row] += sign * step
            sides.append(query_losses(at, newton(at, weight, 4)))
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(-slope, scores[:, row], rtol=1e-5, atol=1e-9)


def scores_of(at: Trained) -> Tensor:
    """(m, n) rise of a query's loss without a row, to first order."""
    return convex.scores(at, 0)[EXACT] / len(at.train)


@pytest.mark.slow
def test_exact_influence_predicts_retraining_on_digits() -> None:
    records = convex.measure(4000, 20, 5)
    lds = {r["method"]: r["value"] for r in records if r["measure"] == "lds"}
    assert lds[EXACT] >= 0.95
    assert abs(lds["random"]) < 0.1
    loo = {r["method"]: r["value"] for r in records if r["measure"] == "loo"}
    assert loo[EXACT] > 0.999
    assert next(r["value"] for r in records if r["measure"] == "loo-error") < 0.02
    for count, key in ((1, "sum"), (2, "sum"), (20, "newton")):
        each = [r for r in records if r["measure"] == "drop" and r["count"] == count]
        assert max(abs(r[key] - r["true"]) / r["true"] for r in each) < 0.05, (count, key)


@pytest.mark.slow
def test_the_convex_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convex, "QUICK_POINTS", 250)
    monkeypatch.setattr(convex, "QUICK_SUBSETS", 4)
    monkeypatch.setattr(convex, "LEFT_OUT", 5)
    monkeypatch.setattr(convex, "COUNTS", (1, 5))
    outcome = run(CONVEX, tmp_path, Setting(True, 2), lambda text: None)
    assert {r["measure"] for r in outcome.records} == {"lds", "loo", "loo-error", "drop"}
    assert outcome.reading[0].startswith("Over random halves of 250 rows the exact influence")
    assert {path.suffix for path in tmp_path.glob("convex.*")} == {".md", ".tex", ".png", ".svg"}
    assert json.loads((tmp_path / "results.json").read_text())["config"]["decay"] == convex.DECAY
    monkeypatch.setattr(convex, "measure", lambda *_: pytest.fail("measured again"))
    run(CONVEX, tmp_path, Setting(True, 2), lambda text: None)
