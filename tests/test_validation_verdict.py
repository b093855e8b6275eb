"""What the verdict of a validation says, and of what."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.lds import Comparison
from finetrace.evaluation.removal import CLASS, RANDOM, Effect
from finetrace.index import manifest
from finetrace.reporting.validated import keep_verdict, kept_verdict
from finetrace.validation.plan import FEW, STEPS, VALIDATED
from finetrace.validation.verdict import verdict


def test_verdicts_say_what_the_intervals_say() -> None:
    def estimate(value: float, half: float) -> Estimate:
        return Estimate(value, value - half, value + half, 5)

    names = {"exact": "exact", "repsim": "repsim"}
    lds = Comparison(
        {"exact": estimate(0.6, 0.1), "repsim": estimate(0.05, 0.1)},
        frozenset({"exact"}),
        estimate(0.81, 0.02),
        0.9,
        {"exact": estimate(0, 0), "repsim": estimate(-0.55, 0.1)},
    )
    drops = [
        Effect("exact", 5, estimate(0.4, 0.1), estimate(0.35, 0.1), sure=True),
        Effect("repsim", 5, estimate(0.06, 0.1), estimate(0.01, 0.1)),
        Effect(RANDOM, 5, estimate(0.05, 0.02), None),
    ]
    lines = verdict(lds, drops, (1.0, 1.02), names)
    assert lines[0].startswith("On this run exact predicts what training on other rows does to the answers: LDS 0.60")
    assert "of a possible 0.90" in lines[0]
    assert "repsim has 0.05 [-0.05, 0.15]." in lines[1]
    assert (
        "top 5 rows of exact raises the answers' loss by 0.40 [0.30, 0.50] nats, more than without 5 random" in lines[2]
    )
    assert lines[3] == "Not told apart from 5 random rows: repsim."
    assert lines[4].endswith("after retraining on all rows.")
    weak = Comparison({"exact": estimate(0.15, 0.1)}, frozenset(), None, None, {"exact": estimate(0, 0)})
    assert "does not show that it predicts" in verdict(weak, [], (1.0, 2.0), names)[0]
    assert "may not be those that made the adapter" in verdict(weak, [], (1.0, 2.0), names)[1]


@pytest.mark.parametrize(("half", "overlap"), [(0.02, False), (0.1, True)])
def test_the_best_control_stands_beside_the_best_method(half: float, overlap: bool) -> None:
    values = {"exact": 0.9, "bm25": 0.6, "bm25:text=response": 0.8, "selfinf": 0.1, "random": 0.0}
    lds = {name: Estimate(value, value - half, value + half, 5) for name, value in values.items()}
    found = Comparison(lds, frozenset({"exact"}), None, None, lds)
    said = [line for line in verdict(found, [], None, {name: name for name in lds}) if "control" in line]
    assert len(said) == 1
    assert said[0].startswith("The best control, bm25:text=response, has 0.80")
    assert ("overlap" in said[0]) is overlap


def test_labels_alone_are_no_method() -> None:
    values = {"exact": 0.7, "gradcos": 0.5, CLASS: 0.8}
    lds = {name: Estimate(value, value - 0.02, value + 0.02, 5) for name, value in values.items()}
    said = verdict(
        Comparison(lds, frozenset({"exact"}), None, None, lds), [], None, {"exact": "exact", "gradcos": "gradcos"}
    )
    assert "On this run exact predicts" in said[0]
    assert "the best of 2 methods" in said[0]
    assert said[1].startswith("Labels alone, which count each row of the answer's class as 1, have 0.80")
    assert said[1].endswith("0.80 [0.78, 0.82], more than any method.")


def test_a_verdict_says_of_how_much_it_is_and_when_losses_part() -> None:
    lds = {"exact": Estimate(0.7, 0.6, 0.8, 5)}
    compared, names = Comparison(lds, frozenset({"exact"}), None, None, lds), {"exact": "exact"}
    said = verdict(compared, [], (0.02, 0.03), names, extent="5 answers, 3 subsets and 1 seed")
    assert said[0].endswith("LDS 0.70 [0.60, 0.80], the best of 1 method, over 5 answers, 3 subsets and 1 seed.")
    assert said[-1].endswith("0.03 after retraining on all rows.")
    assert "so far apart" in verdict(None, [], (0.4, 0.6), names)[-1]
    assert "so far apart" not in verdict(None, [], (1.9, 2.4), names)[-1]


@pytest.mark.parametrize(("labels", "said"), [(0.7, ", and their intervals overlap."), (0.5, "0.50 [0.48, 0.52].")])
def test_labels_lie_where_their_interval_does(labels: float, said: str) -> None:
    lds = {
        name: Estimate(value, value - 0.02, value + 0.02, 5) for name, value in {"exact": 0.7, CLASS: labels}.items()
    }
    lines = verdict(Comparison(lds, frozenset({"exact"}), None, None, lds), [], None, {"exact": "exact"})
    assert lines[1].endswith(said)


def test_a_control_that_is_ahead_is_called_one() -> None:
    values = {"exact": 0.6, "gradcos": 0.5, "bm25": 0.8, "tfidf": 0.79}
    lds = {name: Estimate(value, value - 0.02, value + 0.02, 5) for name, value in values.items()}
    lines = verdict(Comparison(lds, frozenset(lds), None, None, lds), [], None, {name: name for name in lds})
    assert lines[0].startswith("On this run bm25 predicts")
    assert lines[1] == "That is a control; the best method that is none, exact, has 0.60 [0.58, 0.62]."
    assert not any("best control" in line for line in lines)


def test_a_verdict_claims_no_more_than_was_measured() -> None:
    def estimate(value: float, half: float) -> Estimate:
        return Estimate(value, value - half, value + half, 5)

    names = {"exact": "exact", "repsim": "repsim"}
    picked = [
        Effect("exact", 5, estimate(0.4, 0.1), estimate(0.35, 0.1)),
        Effect("repsim", 5, estimate(0.06, 0.1), estimate(0.01, 0.1)),
        Effect(RANDOM, 5, estimate(0.05, 0.02), None),
    ]
    first = verdict(None, picked, None, names)[0]
    assert "not demonstrably more than without 5 random ones" in first
    assert first.endswith(", being the best of 2 methods.")  # its own interval is above chance
    fallen = [Effect("exact", 5, estimate(-0.05, 0.1), estimate(-0.01, 0.1)), picked[-1]]
    assert (
        "changes the answers' loss by -0.05 [-0.15, 0.05] nats, not demonstrably"
        in verdict(None, fallen, None, names)[0]
    )
    unsteady = Comparison(
        {"exact": estimate(0.3, 0.1)}, frozenset({"exact"}), estimate(0.1, 0.2), None, {"exact": estimate(0, 0)}
    )
    said = verdict(unsteady, [], None, names)[0]
    assert "of a possible" not in said
    assert "how much is possible is not known: two seeds agree by 0.10 [-0.10, 0.30]" in said


def test_removals_of_no_method_are_no_tail_patches() -> None:
    random = Effect(RANDOM, 5, Estimate(0.05, 0.03, 0.07, 5), None)
    [said] = verdict(
        None, [random], (float("nan"), 1.0), {"random": "random"}
    )  # a loss on other tokens is not compared
    assert said.startswith("Rows were removed at random and by class alone")
    assert verdict(None, [], None, {}) == ["Tail patches alone were measured; they say nothing of removing rows."]


def test_where_no_loss_varies_nothing_is_said_to_predict() -> None:
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
    found = Comparison({"exact": nothing, CLASS: nothing}, frozenset(), None, None, {"exact": nothing})
    [said] = verdict(found, [], None, {"exact": "exact"})
    assert "does not change the answers' losses" in said
    [said] = verdict(None, [], None, {"exact": "exact"}, loo=found)
    assert "do not change the answers' losses" in said


def test_a_verdict_of_more_retrainings_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "read", lambda folder: SimpleNamespace(data_fingerprint="d"))
    assert keep_verdict(tmp_path, ["few."], "quick", FEW) is None
    assert keep_verdict(tmp_path, ["many."], "whole", VALIDATED) is None
    for basis in (FEW, STEPS):
        assert keep_verdict(tmp_path, ["less."], "again", basis) == "whole"
    assert kept_verdict(tmp_path) == "Validated by retraining. many."
    monkeypatch.setattr(manifest, "read", lambda folder: SimpleNamespace(data_fingerprint="other rows"))
    assert keep_verdict(tmp_path, ["steps."], "again", STEPS) is None
    assert (kept_verdict(tmp_path) or "").endswith("steps.")


def test_a_damaged_verdict_is_named(tmp_path: Path) -> None:
    assert kept_verdict(tmp_path) is None
    (tmp_path / "validation.json").write_text("[]")
    with pytest.raises(Exception, match="run finetrace validate again"):
        kept_verdict(tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps({"verdict": ["one.", "two."]}))
    assert kept_verdict(tmp_path) == "Validated by retraining. one. two."


def test_the_verdict_says_what_became_of_the_rate() -> None:
    def estimate(value: float) -> Estimate:
        return Estimate(value, value - 0.01, value + 0.01, 5)

    rates = [
        Effect("exact", 5, estimate(0.7), estimate(0.68), sure=True),
        Effect("repsim", 5, estimate(0.1), estimate(0.08)),
        Effect(RANDOM, 5, estimate(0.02), None),
    ]
    lines = verdict(None, [], None, {"exact": "exact", "repsim": "repsim"}, rates=rates, before=0.9)
    assert lines == [
        "The judge counts 90% of the answers after training on all rows, 20% without the top 5 of exact, fewer than without 5 "
        "random rows (88%)."
    ]
    weak = [Effect("exact", 5, estimate(0.04), Estimate(0.02, -0.3, 0.3, 5)), rates[-1]]
    assert "not demonstrably fewer" in verdict(None, [], None, {"exact": "exact"}, rates=weak, before=0.9)[0]
    loo = Comparison({"exact": estimate(0.3)}, frozenset(), None, None, {"exact": estimate(0)})
    assert verdict(None, [], (float("nan"), 1.0), {"exact": "exact"}, loo=loo) == [
        "Rows left out singly: exact orders what that does by a rank correlation of 0.30 [0.29, 0.31], the best of 1 method, "
        "not demonstrably above chance."
    ]
