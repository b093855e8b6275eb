"""The sentences of the study `ground-truth` on records whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from finetrace.evaluation.removal import CLASS
from finetrace.studies.ground_truth_tables import reading


def lds(spec: str, value: float) -> dict[str, Any]:
    return {
        "task": "t",
        "measure": "lds",
        "spec": spec,
        "method": spec,
        "value": value,
        "value_low": value - 0.05,
        "value_high": value + 0.05,
        "reachable": 0.95,
    }


@pytest.mark.parametrize(("words", "few", "all_"), [(0.5, 1, 1), (0.85, 1, 0)])
@pytest.mark.parametrize("name", ["gradcos", "exact:normalise=cosine"])
def test_a_method_has_to_be_above_what_sees_the_same_text(name: str, words: float, few: int, all_: int) -> None:
    """`bm25` of both texts is low; that of the responses decides whether anything is shown."""
    values = {name: 0.9, "repsim": 0.3, "bm25": 0.4, "random": 0.0, "bm25:text=response": words, CLASS: 0.97}
    said = reading([lds(spec, value) for spec, value in values.items()])
    assert said[0].startswith("t: the best LDS of 5 methods, seen afterwards, is 0.90 [0.85, 0.95]")
    assert said[1].startswith("t: labels alone") and "0.97 [0.92, 1.02]" in said[1]
    last = dict(zip(("first few", "few", "first all", "all"), said[-4:], strict=True))
    assert last["few"].startswith("A gradient method is above repsim, bm25, random with intervals apart on")
    assert last["first few"].startswith("A first-order method is above repsim, bm25, random with")
    first = int(name == "gradcos")
    assert f"on {few} of 1 tasks" in last["few"] and f"on {few * first} of 1 tasks" in last["first few"]
    assert "bm25:text=response" in last["all"] and f"on {all_} of 1 tasks" in last["all"]
    assert f"on {all_ * first} of 1 tasks" in last["first all"]


def test_a_control_that_looks_at_gradients_is_no_gradient_method() -> None:
    values = {"gradnorm": 0.9, "repsim": 0.3, "bm25": 0.4, "random": 0.0}
    said = reading([lds(spec, value) for spec, value in values.items()])
    assert "A gradient method is above repsim, bm25, random with intervals apart on 0 of 1 tasks." in said
