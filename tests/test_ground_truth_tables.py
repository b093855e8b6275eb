"""The sentences of the study `ground-truth` on records whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from finetrace.evaluation.removal import CLASS, RANDOM
from finetrace.studies.ground_truth_drops import DRAWN, curves, drop_tables, said
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


def drop(
    spec: str, count: int, value: float, over: float | None = None, sure: bool = False, task: str = "t"
) -> dict[str, Any]:
    record = {"task": task, "measure": "drop", "spec": spec, "method": spec, "removed": count, "n_train": 40}
    record |= {"value": value, "value_low": value - 0.1, "value_high": value + 0.1}
    if over is not None:
        record |= {"over_random": over, "over_random_low": over - 0.1, "over_random_high": over + 0.1}
        record["above_chance"] = sure
    return record


DROPS = [
    drop("exact", 4, 0.5, 0.4, True),
    drop("bm25", 4, 0.25, 0.15),
    drop("length", 4, 0.1, 0.0),
    drop(RANDOM, 4, 0.1),
    drop(CLASS, 4, 0.6, 0.5, True),
    drop("exact", 10, 0.9, 0.5, True),
    drop("bm25", 10, 0.9, 0.5, True),
    drop("length", 10, 0.7, 0.3, True),
    drop(RANDOM, 10, 0.4),
    drop("exact", 6, 0.2, 0.15, task="u"),
]


def test_removals_stand_in_a_table_for_each_number_of_rows() -> None:
    tables = drop_tables(DROPS)
    assert list(tables) == ["ground-truth-drop-1", "ground-truth-drop-2"]
    heads, lines = tables["ground-truth-drop-1"]
    assert heads[1:] == ["t: 4 of 40", "u: 6 of 40"]
    assert lines == [
        ["exact", "+0.40 [+0.30, +0.50] *", "+0.15 [+0.05, +0.25]"],
        ["bm25", "+0.15 [+0.05, +0.25]", "-"],
        ["length", "+0.00 [-0.10, +0.10]", "-"],
        [CLASS, "+0.50 [+0.40, +0.60] *", "-"],
        ["random rows themselves", "0.10 [0.00, 0.20]", "-"],
    ]
    heads, lines = tables["ground-truth-drop-2"]
    assert heads[1:] == ["t: 10 of 40"] and [line[0] for line in lines] == [
        "exact",
        "bm25",
        "length",
        "random rows themselves",
    ]


def test_what_is_said_of_removals() -> None:
    few, many, alike = said([*DROPS, lds("exact", 0.9), lds("bm25", 0.8), lds("length", 0.1)], "t")
    assert "than without 4 random ones for 2 of 3 methods (exact, bm25)" in few
    assert "all of them taken into account for 1 of 3 methods (exact)" in few
    assert "most by exact (+0.40 [+0.30, +0.50] more), seen afterwards; rows of the class +0.50 [+0.40, +0.60]." in few
    assert "for all 3 methods, with all of them taken into account for all 3 methods" in many
    assert "most by exact and 1 other (+0.50" in many
    assert alike == "t: over 3 methods, LDS and the rise without 10 rows are rank-correlated by 0.87."


def test_every_method_has_a_curve() -> None:
    figure = curves(DROPS)
    thin = [line for line in figure.axes[0].lines if line.get_color() == "0.8" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in thin] == [[0.25, 0.9], [0.1, 0.7]]  # bm25 and length
    drawn = [spec for spec in DRAWN if any(r["spec"] == spec for r in DROPS)]
    assert [each.get_label() for each in figure.axes[0].containers] == drawn == ["exact", RANDOM, CLASS]


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


def test_no_method_is_said_to_be_above_one_that_was_not_tried() -> None:
    said = reading([lds(spec, value) for spec, value in {"gradcos": 0.9, "repsim": 0.3, "random": 0.0}.items()])
    assert said[1:] == [
        "t: above repsim, random with intervals apart: gradcos.",
        "A first-order method is above repsim, random with intervals apart on 1 of 1 tasks: t.",
        "A gradient method is above repsim, random with intervals apart on 1 of 1 tasks: t.",
    ]
    said = reading([lds(spec, value) for spec, value in {"gradcos": 0.9, "exact": 0.3}.items()])
    assert len(said) == 1 and said[0].startswith("t: the best LDS of 2 methods")
