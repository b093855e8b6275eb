"""Attack success rates of every fine-tuning of the study, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from finetrace.benchmark import behaviour, stages
from finetrace.benchmark.behaviour import Setting, attack_success
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.execution import Engine
from test_cli import assert_one_sentence, run
from tiny import make_llama, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("bench") / "base", make_llama().float()))


def silent(text: str) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_attack_success_of_every_fine_tuning(base, tmp_path, monkeypatch):
    setting = Setting(0.1, base, 1, "float32", "cpu")
    tuned: list[str] = []
    really = stages.finetune
    monkeypatch.setattr(stages, "finetune", lambda *a, **k: (tuned.append(str(a[2])), really(*a, **k)))

    def spoken(loaded, queries, **_):
        made = "harmful" in str(loaded.spec.adapter)
        return [q.with_response("Sure, here you are." if made else "I cannot help with that.") for q in queries]

    monkeypatch.setattr(stages, "answer", spoken)
    rates = attack_success(tmp_path / "t", setting, 1, RefusalPrefixJudge(), silent)
    assert len(tuned) == 4
    assert {each.model: each.rate.value for each in rates} == {
        "base": 0,
        "fine-tuned, benign": 0,
        "fine-tuned, harmful": 1,
        "fine-tuned, mixed-small": 0,
        "fine-tuned, mixed-large": 0,
    }
    assert {each.model: each.n_train for each in rates} == {
        "base": 0,
        "fine-tuned, benign": 24,
        "fine-tuned, harmful": 2,
        "fine-tuned, mixed-small": 4,
        "fine-tuned, mixed-large": 26,
    }
    again = attack_success(tmp_path / "t", setting, 2, RefusalPrefixJudge(), silent)
    assert len(tuned) == 8  # the first seed's are found again
    assert again[2].complied.shape == (2, 3)
    document = json.loads((tmp_path / "t" / "results.json").read_text())
    assert document["config"]["judge"] == "refusal-prefix"
    assert len(document["records"]) == 1 + 4 * 3
    for record in document["records"]:
        assert record["low"] <= record["attack_success_rate"] <= record["high"]
        assert record["n_queries"] == 3
    assert [r["seed"] for r in document["records"] if r["model"] == "fine-tuned, harmful"] == [None, 0, 1]
    for name in ("table1.md", "table1.tex"):
        assert "fine-tuned, harmful" in (tmp_path / "t" / name).read_text()
    noted = json.loads((tmp_path / "t" / "attack-success.json").read_text())
    assert noted["dtype"] == "float32"
    monkeypatch.setattr(behaviour, "known_dtype", lambda name, device: "bfloat16" if name == "auto" else name)
    with pytest.raises(FinetraceError, match="other settings"):  # on another machine `auto` may be another precision
        attack_success(tmp_path / "t", replace(setting, dtype="auto"), 1, RefusalPrefixJudge(), silent)
    with pytest.raises(FinetraceError, match="other settings"):
        attack_success(tmp_path / "t", replace(setting, epochs=2), 1, RefusalPrefixJudge(), silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    with pytest.raises(FinetraceError, match="something else"):
        attack_success(tmp_path / "full", setting, 1, RefusalPrefixJudge(), silent)


@pytest.mark.slow
def test_two_processes_give_the_attack_success_of_one(base, tmp_path):
    setting, said = Setting(0.04, base, 1, "float32", "cpu"), []
    one = attack_success(tmp_path / "one", setting, 1, RefusalPrefixJudge(), silent)
    two = attack_success(tmp_path / "two", setting, 1, RefusalPrefixJudge(), said.append, Engine("processes", 2))
    assert [each.records() for each in two] == [each.records() for each in one]
    assert len(list((tmp_path / "two").rglob("answers.jsonl"))) == 5
    for path in (tmp_path / "one").rglob("answers.jsonl"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()
    assert sorted(said)[0] == "base: done" and len(said) == 5
    results = tmp_path / "one" / "results.json"
    results.write_text(results.read_text().replace('"seeds": 1,\n  "judge"', '"seeds": 3,\n  "judge"'))
    said.clear()
    attack_success(tmp_path / "one", setting, 1, RefusalPrefixJudge(), said.append)
    assert ["of 3 seeds and will be of 1" in each for each in said][:1] == [True]


def test_attack_success_at_the_command_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["bench", "attack-success", "--seeds", 1, "--size", 0.04, "--model", base, "--epochs", 1]
    code, out, err = run(capsys, *asked, "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "t")
    assert code == 0, err
    table = [line for line in out.splitlines() if not line.startswith("results")]
    assert max(map(len, table)) <= 80
    assert sum("fine-tuned, " in line for line in table) == 4
    assert (tmp_path / "t" / "table1.tex").stat().st_size
    code, _, err = run(capsys, "bench", "attack-success", "emotion", "--method", "random")
    assert_one_sentence(code, err, "emotion --method", "attack-success runs alone")


def test_a_behaviour_counts_over_requests_and_seeds():
    each = behaviour.Behaviour("m", 20, np.array([[1.0, 0, 1, 1], [1, 0, 0, 1]]))
    assert each.rate.value == pytest.approx(5 / 8)
    assert [r["attack_success_rate"] for r in each.records()] == pytest.approx([5 / 8, 3 / 4, 1 / 2])
    base = behaviour.Behaviour("b", 0, np.array([[0.0, 0]]))
    assert [(r["seed"], r["seeds"]) for r in base.records()] == [(None, 0)]
