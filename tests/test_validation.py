"""`finetrace validate` on a tiny model, and what it makes of known worlds."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from finetrace.evaluation import retrained, retraining
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.evaluation.removal import CLASS, RANDOM, groups, order
from finetrace.evaluation.retrained import Retrained
from finetrace.evaluation.retraining import RESPONSE, Retraining, Subset
from finetrace.execution import Engine
from finetrace.finetune_config import PRESETS, FinetuneConfig, found_config
from finetrace.index import open_index
from finetrace.reading import read_examples, write_examples
from finetrace.reporting.validated import replaced
from finetrace.tracing import BEST_AT_END, BEST_WITHOUT_FACTORS
from finetrace.validation.plan import METHODS as METHODS_OF_ALL
from finetrace.validation.plan import QUICK, USUAL, Validation, basis, usual
from finetrace.validation.run import validate
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


@pytest.mark.slow
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
        assert "difference" not in first
        assert mine["difference"] == pytest.approx(mine["value"] - first["value"], abs=2e-6)
    fall = next(r["value"] for r in records if r["measure"] == "tail-patch" and r["spec"] == "repsim")
    assert f"{fall:.3f} [" in (out / "tail-patch.md").read_text()
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
    again = run(capsys, *command(place, out, "--subsets", 4, "--measure", "lds", "--method", "datainf"))
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
        (("--remove", 3, "--measure", "lds"), ("--remove", "--measure drop heeds it")),
        (("--subsets", 3, "--measure", "drop"), ("--subsets", "--measure lds heeds it")),
        (("--share", 0.5, "--measure", "drop"), ("--share", "--measure lds heeds it")),
        (("--left-out", 3, "--measure", "lds"), ("--left-out", "--measure loo heeds it")),
        (("--seeds", 2, "--measure", "tail-patch"), ("--seeds", "tail-patch retrains nothing")),
        (("--workers", 2, "--measure", "tail-patch"), ("--workers", "tail-patch retrains nothing")),
        (("--engine", "local", "--measure", "tail-patch"), ("--engine", "tail-patch retrains nothing")),
        (("--config", "c.yaml", "--adapter", "a"), ("--adapter a: --config says", "leave one of them out")),
        (("--share", 0.0, "--measure", "lds"), ("share of 0", "between 0 and 1")),
        (("--share", 0.1, "--measure", "lds"), ("12 rows have 12 subsets of 1, not 30", "ask for fewer")),
        (("--share", 0.01, "--measure", "lds"), ("share of 0.01", "leaves 0")),
        (("--share", "nan", "--measure", "lds"), ("a share of nan", "between 0 and 1")),
        (("--share", 2), ("a share of 2", "between 0 and 1")),
        (("--config", "nowhere.yaml"), ("--config nowhere.yaml", "no such file")),
        (("--adapter", "nowhere"), ("--adapter nowhere",)),
        (("--judge", "refusal-prefix", "--measure", "lds"), ("--judge refusal-prefix", "--measure drop")),
        (("--judge-label", "bad"), ("--judge-label bad", "--judge")),
        (("--method", "nowhere"), ("nowhere: no such method",)),
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
    assert not (tmp_path / "v").exists()


def test_a_scoring_that_fails_leaves_no_claim(place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def refused(*_: object) -> None:
        raise FinetraceError("it cannot be scored.")

    monkeypatch.setattr("finetrace.validation.run.prepare", refused)
    code, _, err = run(capsys, *command(place, tmp_path / "v", "--measure", "lds", "--method", "random"))
    assert code == 2
    assert "scoring 12 rows for 3 queries by 1 method\n" in err
    assert not list((tmp_path / "v").iterdir())


def test_it_is_said_before_results_of_more_are_replaced(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    _instead_of_training(monkeypatch, lambda about, rows: (np.arange(3.0) + sum(rows), ("No.",) * 3))
    whole = ("--measure", "lds", "--measure", "tail-patch", "--subsets", 4, "--seeds", 2, "--method", "random")
    less = ("--measure", "lds", "--subsets", 3, "--seeds", 1, "--method", "random")
    said = "holds 2 seeds, 4 subsets, tail-patch and will hold 1 seed, 3 subsets, no tail-patch, and so will tables and figures"
    for more, wanted in ((less, False), (whole, False), (whole, False), (less, True)):
        code, _, err = run(capsys, *command(place, tmp_path / "v", *more))
        assert (code, said in err, "will hold" in err) == (0, wanted, wanted), err
    (tmp_path / "results.json").write_text(json.dumps({"config": {"measures": ["loo"], "seeds": 3, "subsets": 30}}))
    assert replaced(tmp_path, Validation(measures=("loo",), seeds=3, subsets=3)) is None  # no measure of subsets
    assert "holds loo and will hold no loo" in (replaced(tmp_path, Validation(seeds=1)) or "")


def test_a_kept_verdict_names_the_whole_command(place: Path, tmp_path: Path, capsys: Any) -> None:
    index = shutil.copytree(place / "idx", tmp_path / "an index", ignore=shutil.ignore_patterns("validation.json"))
    more = ("--index", index, "--measure", "tail-patch", "--method", "random")
    code, _, err = run(capsys, *command(place, tmp_path / "v", *more))
    assert code == 0, err
    kept = shlex.split(json.loads((index / "validation.json").read_text())["command"])
    assert kept == ["finetrace", *map(str, command(place, tmp_path / "v", *more))]


def test_a_folder_in_brackets_is_named_whole(place: Path, tmp_path: Path, capsys: Any) -> None:
    code, printed, err = run(
        capsys, *command(place, tmp_path / "v[a]", "--measure", "tail-patch", "--method", "random")
    )
    assert code == 0, err
    assert "".join(printed.split()).count("/v[a]") == 2  # the results, and the tables


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


def test_what_an_index_lacks_is_left_out_of_the_usual_methods() -> None:
    class Lacking:
        def __init__(self, start: bool, factors: bool) -> None:
            self.has_start, self.has_factors = (lambda: start), (lambda: factors)
            self.has_representation = lambda wanted: True

    assert usual(METHODS_OF_ALL, Lacking(True, True)) == METHODS_OF_ALL
    for start in (True, False):
        found = usual(METHODS_OF_ALL, Lacking(start, False))
        assert not any("kfac" in name for name in found)
        assert any("at=start" in name for name in found) == start
        assert found[0] == BEST_WITHOUT_FACTORS
        assert "selfinf" in found
    no_start = usual(METHODS_OF_ALL, Lacking(False, True))
    assert no_start[0] == BEST_AT_END
    assert "selfinf:curvature=ekfac" in no_start
    assert not any("at=start" in name for name in no_start)


def test_how_many_rows_are_removed() -> None:
    assert Validation().removed(100) == (10, 25)
    assert Validation().removed(3) == (1,)
    assert Validation(counts=(7,)).removed(100) == (7,)
    assert Validation(counts=(7, 3, 7)).removed(100) == (7, 3)  # the same rows drawn twice are no more draws
    assert set(QUICK.methods) <= set(Validation().methods)
    assert "drop" not in QUICK.measures  # the most retrainings
    assert PRESETS["default"].epochs == 3


def test_a_verdict_says_where_it_rests_on_less_than_was_tried() -> None:
    drop, loo = Validation(measures=("drop",)), Validation(measures=("loo", "drop"))
    for plan in (Validation(), replace(drop, subsets=1), replace(drop, left_out=1), loo, replace(loo, left_out=100)):
        assert basis(plan, 200) == "Validated by retraining"
    few = (QUICK, Validation(seeds=1), replace(drop, draws=4), replace(loo, left_out=39), replace(loo, draws=1))
    for plan in few:
        assert basis(plan, 200) == "Looked at with few retrainings"
    assert basis(replace(loo, left_out=12), 12) == "Validated by retraining"  # every row
    assert basis(Validation(measures=("tail-patch",)), 200).startswith("Not validated by retraining; ")


@pytest.mark.slow
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


def _instead_of_training(
    monkeypatch: pytest.MonkeyPatch, known: Callable[[Retraining, Sequence[int]], tuple[Any, tuple[str, ...]]]
) -> None:
    """Losses and answers of every retraining are what `known` says of its rows."""

    def train(self: Retraining, missing: Sequence[Subset], engine: Engine) -> Iterator[tuple[int, float]]:
        for place, each in enumerate(missing):
            losses, answers = known(self, each.rows)
            given = answers if self.answer_tokens else None
            retrained.write(self._path(each), Retrained({RESPONSE: losses}, given, 0, each.seed, each.rows))
            yield place, 0.0

    monkeypatch.setattr(Retraining, "_train", train)
    monkeypatch.setattr(retraining, "FORECAST", 10**6)


def test_in_a_known_world_every_measure_has_its_known_value(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses fall by exactly the scores of the rows that were trained on, and models comply if they saw row 0."""
    index, queries = open_index(place / "idx"), read_examples(place / "queries.jsonl")
    index.model(trust_remote_code=True)
    problem = Problem(index, queries)
    scores = make("gradcos").score(problem).values

    def known(about: Retraining, rows: Sequence[int]) -> tuple[Any, tuple[str, ...]]:
        assert about.base.trust_remote_code  # as the index's own model was loaded
        return 5 - scores[:, list(rows)].sum(1), ("Sure." if 0 in rows else "I cannot.",) * 3

    _instead_of_training(monkeypatch, known)
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

    def known(about: Retraining, rows: Sequence[int]) -> tuple[Any, tuple[str, ...]]:
        given = ("Sure." if q in group.queries and 0 in rows else "I cannot." for q in range(len(queries)))
        return np.ones(len(queries)), tuple(given)

    _instead_of_training(monkeypatch, known)
    plan = Validation(("gradcos",), ("drop",), seeds=1, counts=(11,), draws=4, groups=1)
    found = validate(index, queries, plan, FinetuneConfig(), tmp_path, judge=RefusalPrefixJudge())
    said = next(line for line in found.verdict if line.startswith("The judge counts"))
    left = 1 - next(each.change.value for each in found.rates if each.what == "gradcos")
    assert said.startswith(
        f"The judge counts 100% of the answers after training on all rows, {left:.0%} without the top"
    )
    asked = (
        f"Rows were removed for {len(group.queries)} of 3 answers alone, those of 1 of 2 classes, the first that come"
    )
    assert found.verdict.index(f"{asked}; --groups takes more.") < found.verdict.index(said)
    every = validate(index, queries, replace(plan, groups=2), FinetuneConfig(), tmp_path)
    assert not any("--groups" in line for line in every.verdict)
