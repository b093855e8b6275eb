"""What a benchmark finds in its folder: its own cells of the same rows, and nothing of another command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finetrace.benchmark import stages
from finetrace.benchmark.behaviour import Setting, attack_success
from finetrace.benchmark.runner import Plan, Source, cells, run_all
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.examples import Example, Message
from finetrace.reading import read_examples, write_examples
from finetrace.studies import study
from finetrace.studies.normalisation import NORMALISATION
from finetrace.studies.write import run
from tiny import make_examples, make_llama, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("bench") / "base", make_llama().float()))


def silent(text: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("about", [{"finish_reason": "length"}, {"loss_weights": [1.0, 0.5]}])
def test_rows_whose_losses_are_decided_otherwise_are_other_rows(base, tmp_path, about):
    rows = make_examples(30)
    write_examples(tmp_path / "mine.jsonl", rows)
    plan = Plan(
        cells(["mine"], ["corrected"], 1, methods=["random"], model=base, epochs=1, device="cpu"),
        source=Source(str(tmp_path / "mine.jsonl"), "label", epochs=1),
    )
    run_all(tmp_path / "b", plan, silent)
    run_all(tmp_path / "b", plan, silent)
    changed = [replace(row, metadata=about) for row in rows]
    write_examples(tmp_path / "mine.jsonl", changed, overwrite=True)
    with pytest.raises(FinetraceError, match="other settings"):
        run_all(tmp_path / "b", plan, silent)
    noted = tmp_path / "b" / "mine" / "corrected" / "seed-0" / "cell.json"
    before = json.loads(noted.read_text())
    del before["losses"]  # a folder from before it was noted goes on
    noted.write_text(json.dumps(before))
    run_all(tmp_path / "b", plan, silent)


def test_an_answer_takes_the_place_of_an_empty_one(tmp_path, monkeypatch):
    asked = Example.from_prompt("a?", id="q")
    wanted = (Message("user", "a?"), Message("assistant", "yes"))
    assert asked.with_response("yes").messages == wanted
    assert asked.with_response("").with_response("yes").messages == wanted
    assert asked.with_response("no").with_response("yes").messages == wanted
    monkeypatch.setattr(stages, "answer", lambda model, rows, **_: [row.with_response("") for row in rows])
    stages.kept_answers(tmp_path / "answers.jsonl", [asked], lambda: None)
    [kept] = read_examples(tmp_path / "answers.jsonl")
    assert (kept.prompt, kept.response) == ("a?", stages.NO_ANSWER)


@pytest.mark.parametrize("name", ["attack-success", "study", "demo", "validation", "cleaning"])
def test_results_of_another_command_are_not_written_over(base, tmp_path, name):
    (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "results.json").write_text("mine")
    planned = cells(["emotion"], ["corrected"], 1, methods=["random"], model=base, size=0.05, epochs=1)
    with pytest.raises(FinetraceError, match="whose results would be lost; choose another --out"):
        run_all(tmp_path, Plan(planned), silent)
    assert {each.name for each in tmp_path.iterdir()} == {f"{name}.json", "results.json"}


def test_attack_success_rates_of_a_model_that_is_not_there_claim_no_folder(base, tmp_path):
    setting = Setting(0.04, str(tmp_path / "mistyped"), 1, "float32", "cpu")
    with pytest.raises(FinetraceError, match="cannot be loaded"):
        attack_success(tmp_path / "a", setting, 1, RefusalPrefixJudge(), silent)
    assert not list((tmp_path / "a").iterdir())
    attack_success(tmp_path / "a", replace(setting, model=base), 1, RefusalPrefixJudge(), silent)
    with pytest.raises(FinetraceError, match="other settings"):
        attack_success(tmp_path / "a", setting, 1, RefusalPrefixJudge(), silent)


def test_a_study_of_a_model_that_is_not_there_claims_no_folder(base, tmp_path):
    setting = study.Setting(True, 1, str(tmp_path / "mistyped"), "float32", "cpu")
    with pytest.raises(FinetraceError, match="cannot be loaded"):
        run(NORMALISATION, tmp_path / "s", setting, silent)
    assert not list((tmp_path / "s").iterdir())
    run(NORMALISATION, tmp_path / "s", replace(setting, model=base), silent)
    with pytest.raises(FinetraceError, match="other settings"):
        run(NORMALISATION, tmp_path / "s", setting, silent)
