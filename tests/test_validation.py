"""`finetrace validate` on a tiny model, and what it makes of known worlds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from commands import run, tuned_index
from finetrace.attribution import Problem, make
from finetrace.cli.validate import finetuning_of
from finetrace.errors import FinetraceError
from finetrace.evaluation import retraining
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.evaluation.lds import Comparison
from finetrace.evaluation.removal import CLASS, RANDOM, Effect, groups, order
from finetrace.evaluation.retraining import RESPONSE, Retrained, Retraining
from finetrace.finetune_config import PRESETS, FinetuneConfig, found_config
from finetrace.index import open_index
from finetrace.reading import read_examples, write_examples
from finetrace.reporting.validated import kept_verdict
from finetrace.tracing import BEST_AT_END, BEST_WITHOUT_FACTORS
from finetrace.validation.plan import METHODS as METHODS_OF_ALL
from finetrace.validation.plan import QUICK, USUAL, Validation, basis, usual
from finetrace.validation.run import validate
from finetrace.validation.verdict import verdict
from tiny import make_examples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned tiny model, indexed, and queries."""
    folder = tmp_path_factory.mktemp("validate")
    write_examples(folder / "train.jsonl", make_examples(12))
    write_examples(folder / "queries.jsonl", make_examples(3, seed=5))
    tuned_index(folder, folder / "train.jsonl")
    return folder


def command(place: Path, out: Path, *more: object) -> list[object]:
    return ["validate", "--index", place / "idx", "--queries", place / "queries.jsonl", "--out", out, *more]


METHODS = ("--method", "gradcos", "--method", "repsim", "--method", "random")


def test_a_run_is_validated_and_its_report_pages_say_so(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = ["trace", "--index", place / "idx", "--queries", place / "queries.jsonl", "--method", "gradcos", "--report"]
    assert run(capsys, *page, tmp_path / "before.html")[0] == 0
    assert "Not validated" in (tmp_path / "before.html").read_text()
    out = tmp_path / "v"
    code, printed, err = run(capsys, *command(place, out, "--subsets", 4, "--remove", 2, "--remove", 4, *METHODS))
    assert code == 0, err
    assert "retrainings" in err
    assert "noise ceiling" in printed
    assert (
        max(map(len, (line for line in printed.splitlines() if not line.startswith(("-", "report", "results"))))) <= 80
    )
    document = json.loads((out / "results.json").read_text())
    records = document["records"]
    assert {r["measure"] for r in records} == set(USUAL)
    assert {r["spec"] for r in records if r["measure"] == "lds"} == {"gradcos", "repsim", "random", CLASS}
    assert {
        (r["spec"], r["removed"]) for r in records if r["measure"] == "drop" and r["spec"] != "rows of the class"
    } == {(spec, count) for spec in ("gradcos", "repsim", RANDOM) for count in (2, 4)}
    assert all(r["ceiling"] is not None for r in records if r["measure"] == "lds")
    for name, spec in (("tail-patch", "repsim"), ("drop", "repsim"), ("lds", "repsim")):  # all beside the first
        first, mine = (
            next(r for r in records if r["measure"] == name and r["spec"] == each) for each in ("gradcos", spec)
        )
        assert first["difference"] == 0
        assert mine["difference"] == pytest.approx(mine["value"] - first["value"], abs=2e-6)
    for name in ("drop", "tail-patch"):
        assert "minus the first" in (out / f"{name}.md").read_text()
    for name in ("lds", "drop"):
        assert {path.suffix for path in out.glob(f"{name}.*")} == {".md", ".tex", ".png", ".svg"}
    assert document["config"]["finetuning"]["rank"] == 2
    assert run(capsys, *page, tmp_path / "after.html")[0] == 0
    text = (tmp_path / "after.html").read_text()
    assert "Looked at with few retrainings" in text
    assert "Not validated" not in text
    monkeypatch.setattr(retraining, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = run(capsys, *command(place, out, "--subsets", 4, "--remove", 2, "--measure", "lds", "--method", "datainf"))
    assert again[0] == 0, again[2]  # another method on the same retrainings


def test_retraining_on_all_rows_is_near_the_adapter_itself(place: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(
        capsys, *command(place, tmp_path / "v", "--measure", "lds", "--subsets", 3, "--seeds", 1, "--method", "gradcos")
    )
    assert code == 0, err
    sentence = next(
        line
        for line in json.loads((tmp_path / "v" / "results.json").read_text())["config"]["verdict"]
        if "under the adapter" in line
    )
    own, again = (float(word) for word in sentence.split() if word.replace(".", "", 1).isdigit())
    assert own == pytest.approx(
        again, abs=0.011
    )  # the same seed, rows and settings: the same adapter, to the printed digits


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--measure", "bias"), ("--measure bias", "lds, drop, tail-patch, loo")),
        (("--remove", 12, "--measure", "drop"), ("removing 12 of 12",)),
        (("--share", 0.01, "--measure", "lds"), ("share of 0.01", "leaves 0")),
        (("--share", "nan", "--measure", "lds"), ("a share of nan", "between 0 and 1")),
        (("--share", 2), ("a share of 2", "between 0 and 1")),
        (("--config", "nowhere.yaml"), ("--config nowhere.yaml", "no such file")),
        (("--adapter", "nowhere"), ("--adapter nowhere",)),
        (("--judge", "refusal-prefix", "--measure", "lds"), ("--judge refusal-prefix", "--measure drop")),
        (("--judge-label", "bad"), ("--judge-label bad", "--judge")),
        (("--judge", "refusal-prefix", "--judge-label", "bad"), ("--judge-label bad", "no labels")),
    ],
)
def test_mistakes_are_one_sentence(more: Any, words: Any, place: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, *command(place, tmp_path / "v", "--method", "random", *more))
    assert code == 2
    assert "Traceback" not in err
    assert all(word in err for word in words), err
    if any(word in ("--share", "--remove") for word in more):
        assert "scoring" not in err  # said before anything is computed


def test_a_run_of_other_queries_is_refused_in_the_same_folder(place: Path, tmp_path: Path, capsys: Any) -> None:
    quick = ("--measure", "lds", "--subsets", 3, "--seeds", 1, "--method", "random")
    assert run(capsys, *command(place, tmp_path / "v", *quick))[0] == 0
    write_examples(tmp_path / "others.jsonl", make_examples(2, seed=8))
    other = command(place, tmp_path / "v", *quick)
    other[4] = tmp_path / "others.jsonl"
    code, _, err = run(capsys, *other)
    assert code == 2
    assert "a validation with other settings" in err
    same_ids = [
        replace(each, id=mine.id) for each, mine in zip(make_examples(3, seed=8), make_examples(3, seed=5), strict=True)
    ]
    write_examples(tmp_path / "same-ids.jsonl", same_ids)
    other[4] = tmp_path / "same-ids.jsonl"
    assert "a validation with other settings" in run(capsys, *other)[2]


def test_how_an_adapter_was_trained_is_found_in_what_the_trainer_leaves(place: Path, tmp_path: Path) -> None:
    assert found_config(tmp_path) is None
    mine = found_config(place / "adapter")
    assert mine is not None
    assert (mine.epochs, mine.learning_rate, mine.rank) == (2, 0.01, 2)
    assert found_config(place / "idx" / "adapter") == mine  # the index keeps it
    folder = tmp_path / "hf"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "adapter_config.json").write_text((place / "adapter" / "adapter_config.json").read_text())
    state = {
        "num_train_epochs": 4,
        "train_batch_size": 16,
        "log_history": [{"learning_rate": 1e-4}, {"learning_rate": 2e-5}],
    }
    (folder / "checkpoint-9" / "trainer_state.json").write_text(json.dumps(state))
    found = found_config(folder)
    assert found is not None
    assert (found.epochs, found.batch_size, found.learning_rate, found.rank) == (4, 16, 1e-4, 2)
    assert found.target_modules == mine.target_modules
    for said in (
        "{}",
        json.dumps({**state, "log_history": [{"loss": 1.0}]}),
    ):  # a run that ended before it logged a rate
        (folder / "checkpoint-9" / "trainer_state.json").write_text(said)
        with pytest.raises(Exception, match=r"give a finetune\.yaml with --config"):
            found_config(folder)


@pytest.mark.parametrize(
    ("schedule", "steps", "wanted"),
    [
        ("linear", [10, 20, 30], 4e-4),  # never logged at its peak
        ("linear", [15], 4e-4),
        ("linear", [30], 4e-4),
        ("linear", [], None),
        ("constant", [10, 20], 4e-4),
        ("cosine", [10, 20, 30], "largest"),
    ],
)
def test_the_peak_is_where_the_schedule_started_and_not_what_was_logged_first(
    schedule: str, steps: list[int], wanted: Any, place: Path, tmp_path: Path, capsys: Any
) -> None:
    """The rates are those of the schedules that the Trainer takes, of before each step, as it logs them."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=4e-4)
    scheduler, rates = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=30), []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    history = [{"step": step, "learning_rate": rates[step - 1]} for step in steps]
    state = {"num_train_epochs": 3, "train_batch_size": 4, "max_steps": 30, "log_history": history}
    (tmp_path / "adapter_config.json").write_text((place / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    if wanted is None:
        with pytest.raises(FinetraceError, match="no learning rate was logged"):
            found_config(tmp_path)
        return
    found = found_config(tmp_path)
    assert found is not None
    assert found.learning_rate == pytest.approx(
        max(r["learning_rate"] for r in history) if wanted == "largest" else wanted
    )
    assert found.schedule == ("constant" if schedule == "constant" else "linear")
    assert finetuning_of(open_index(place / "idx"), None, tmp_path) == found
    said = f"3 epochs in batches of 4 with a {found.schedule} learning rate from {found.learning_rate:.3g}"
    assert said in " ".join(capsys.readouterr().err.split())
    assert finetuning_of(open_index(place / "idx"), None, None).epochs == 2
    assert capsys.readouterr().err == ""


def test_a_fine_tuning_that_could_stop_early_is_pointed_out(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "finetune.yaml").write_text("epochs: 25\nvalidation: 0.1\n")
    assert finetuning_of(open_index(place / "idx"), None, tmp_path).epochs == 25
    said = " ".join(capsys.readouterr().err.split())
    assert "held out 10% of its rows" in said and "through all 25 epochs" in said


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
    assert said[0].endswith("LDS 0.70 [0.60, 0.80], the best of 1 methods, over 5 answers, 3 subsets and 1 seed.")
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


def test_what_an_index_lacks_is_left_out_of_the_usual_methods() -> None:
    class Lacking:
        def __init__(self, start: bool, factors: bool) -> None:
            self.has_start, self.has_factors = (lambda: start), (lambda: factors)
            self.has_representation = lambda wanted: True

    assert usual(METHODS_OF_ALL, Lacking(True, True)) == METHODS_OF_ALL
    for start in (True, False):
        found = usual(METHODS_OF_ALL, Lacking(start, False))
        assert not any("kfac" in name or "at=start" in name for name in found)
        assert found[0] == BEST_WITHOUT_FACTORS
        assert "selfinf" in found
    no_start = usual(METHODS_OF_ALL, Lacking(False, True))
    assert no_start[0] == BEST_AT_END
    assert "selfinf:curvature=ekfac" in no_start
    assert not any("at=start" in name for name in no_start)


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


def test_how_many_rows_are_removed() -> None:
    assert Validation().removed(100) == (10, 25)
    assert Validation().removed(3) == (1,)
    assert Validation(counts=(7,)).removed(100) == (7,)
    assert set(QUICK.methods) <= set(Validation().methods)
    assert "drop" not in QUICK.measures  # the most retrainings
    assert basis(Validation()) == basis(Validation(measures=("drop",), subsets=1)) == "Validated by retraining"
    assert basis(QUICK) == basis(Validation(seeds=1)) == "Looked at with few retrainings"
    assert basis(Validation(measures=("tail-patch",))).startswith("Not validated by retraining; ")
    assert PRESETS["default"].epochs == 3


def test_a_damaged_verdict_is_named(tmp_path: Path) -> None:
    assert kept_verdict(tmp_path) is None
    (tmp_path / "validation.json").write_text("[]")
    with pytest.raises(Exception, match="run finetrace validate again"):
        kept_verdict(tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps({"verdict": ["one.", "two."]}))
    assert kept_verdict(tmp_path) == "Validated by retraining. one. two."


def test_rows_are_left_out_singly_and_a_judge_counts_answers(place: Path, tmp_path: Path, capsys: Any) -> None:
    measures = ("--measure", "loo", "--measure", "drop", "--left-out", 4, "--remove", 3, "--seeds", 2)
    code, printed, err = run(
        capsys, *command(place, tmp_path / "v", *measures, "--judge", "refusal-prefix", "--method", "gradcos")
    )
    assert code == 0, err
    assert "Rows left out singly" in printed
    assert "fall of the rate, points" in printed
    records = json.loads((tmp_path / "v" / "results.json").read_text())["records"]
    assert {r["measure"] for r in records} == {"loo", "drop", "drop-rate"}
    assert {r["spec"] for r in records if r["measure"] == "drop-rate"} >= {"gradcos", RANDOM}
    assert (tmp_path / "v" / "drop-rate.png").exists()
    kept = [json.loads(path.read_text()) for path in (tmp_path / "v" / "retrainings").glob("*.json")]
    assert {len(each["rows"]) for each in kept} == {9, 11, 12}  # three removed, one left out, none
    assert all((each["answers"] is None) == (len(each["rows"]) == 11) for each in kept if len(each["rows"]) != 12)


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
        "Rows left out singly: exact orders what that does by a rank correlation of 0.30 [0.29, 0.31], the best of 1 methods, "
        "not demonstrably above chance."
    ]


def test_in_a_known_world_every_measure_has_its_known_value(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses fall by exactly the scores of the rows that were trained on, and models comply if they saw row 0."""
    index, queries = open_index(place / "idx"), read_examples(place / "queries.jsonl")
    index.model(trust_remote_code=True)
    problem = Problem(index, queries)
    scores = make("gradcos").score(problem).values

    def run_known(self: Retraining, subsets: Any, **_: Any) -> list[Retrained]:
        assert self.base.trust_remote_code  # as the index's own model was loaded
        return [
            Retrained(
                {RESPONSE: 5 - scores[:, list(each.rows)].sum(1)}, ("Sure." if 0 in each.rows else "I cannot.",) * 3, 0
            )
            for each in subsets
        ]

    monkeypatch.setattr(Retraining, "run", run_known)
    plan = Validation(
        ("gradcos", "random"), ("lds", "loo", "drop"), subsets=8, seeds=2, counts=(3,), draws=40, left_out=12
    )
    found = validate(index, queries, plan, FinetuneConfig(), tmp_path, judge=RefusalPrefixJudge())
    assert found.lds is not None
    assert found.loo is not None
    assert found.lds.lds["gradcos"].value == pytest.approx(1)
    assert found.loo.lds["gradcos"].value == pytest.approx(1)
    gone = {q: order(scores, group)[:3] for group in groups([each.label for each in queries]) for q in group.queries}
    rise = {each.what: each.change.value for each in found.drops}
    assert rise["gradcos"] == pytest.approx(np.mean([scores[q, rows].sum() for q, rows in gone.items()]))
    fall = {each.what: each.change.value for each in found.rates}
    assert fall["gradcos"] == pytest.approx(np.mean([0 in rows for rows in gone.values()]))
    assert fall[RANDOM] == pytest.approx(3 / 12, abs=0.2)  # of 40 draws: three standard errors
    assert any(
        line.startswith("The judge counts 100% of the answers after training on all rows") for line in found.verdict
    )


def test_the_rate_is_that_of_the_queries_for_which_rows_were_removed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first class of queries is asked about, and only its answers comply: without row 0 none of them does."""
    index, queries = open_index(place / "idx"), read_examples(place / "queries.jsonl")
    [group] = groups([each.label for each in queries], 1)
    assert 0 < len(group.queries) < len(queries)

    def run_known(self: Retraining, subsets: Any, **_: Any) -> list[Retrained]:
        def answers(rows: tuple[int, ...]) -> tuple[str, ...]:
            return tuple("Sure." if q in group.queries and 0 in rows else "I cannot." for q in range(len(queries)))

        return [Retrained({RESPONSE: np.ones(len(queries))}, answers(each.rows), 0) for each in subsets]

    monkeypatch.setattr(Retraining, "run", run_known)
    plan = Validation(("gradcos",), ("drop",), seeds=1, counts=(11,), draws=4, groups=1)
    found = validate(index, queries, plan, FinetuneConfig(), tmp_path, judge=RefusalPrefixJudge())
    said = next(line for line in found.verdict if line.startswith("The judge counts"))
    left = 1 - next(each.change.value for each in found.rates if each.what == "gradcos")
    assert said.startswith(
        f"The judge counts 100% of the answers after training on all rows, {left:.0%} without the top"
    )
