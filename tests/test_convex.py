"""Softmax regression trained to its minimum: there influence can be held against the truth itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetrace.studies import convex
from finetrace.studies.approximation import dense
from finetrace.studies.convex import CONVEX, EXACT, minimum, one_step, query_losses, train
from finetrace.studies.mnist import gradients
from finetrace.studies.study import Setting
from finetrace.studies.write import run


def test_the_minimum_without_some_rows_has_no_slope_and_one_step_comes_near_it() -> None:
    at = train(300, 0)
    kept = torch.arange(300)[5:]
    weights = minimum(at, kept)
    inputs, classes = at.digits.train[kept], at.digits.train_classes[kept]
    slope = gradients(weights, inputs, classes).sum(0) / 300 + at.decay * weights.flatten()
    assert float(slope.norm()) < 1e-9
    assert torch.allclose(minimum(at, torch.arange(300)), at.weights, atol=1e-7)
    start, near = (float((each - weights).norm()) for each in (at.weights, one_step(at, kept)))
    assert near < 0.2 * start


def test_exact_influence_is_what_leaving_a_row_out_does_but_for_the_rows_own_leverage() -> None:
    at = train(300, 1)
    scores = dense(at, "hessian") / 300
    everything = torch.arange(300)
    for row in (7, 100):
        without = query_losses(at, minimum(at, everything[everything != row])) - query_losses(at, at.weights)
        assert torch.corrcoef(torch.stack([without, scores[:, row]]))[0, 1] > 0.99
        assert 1 < float(without.norm() / scores[:, row].norm()) < 1.25  # a first-order score falls a little short


@pytest.mark.slow
def test_exact_influence_predicts_retraining_on_digits() -> None:
    records = convex.measure(4000, 20, 5)
    lds = {r["method"]: r["value"] for r in records if r["measure"] == "lds"}
    assert lds[EXACT] >= 0.95
    assert abs(lds["random"]) < 0.1
    loo = {r["method"]: r["value"] for r in records if r["measure"] == "loo"}
    assert loo[EXACT] > 0.999
    assert next(r["value"] for r in records if r["measure"] == "loo-error") < 0.05
    for count, key in ((1, "sum"), (2, "sum"), (20, "newton")):
        each = [r for r in records if r["measure"] == "drop" and r["count"] == count]
        assert max(abs(r[key] - r["true"]) / r["true"] for r in each) < 0.05, (count, key)


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
