"""The demo from end to end, on a tiny model that was taught nothing: its stages, what they leave, and that none is done twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetrace import demo
from finetrace.attribution import Problem, make
from finetrace.cleaning.rank import Cut, rank
from finetrace.demo import DemoConfig, run_demo
from finetrace.errors import FinetraceError
from finetrace.finetuning import finetune
from finetrace.index import open_index
from finetrace.models import Loaded
from finetrace.reading import read_examples
from finetrace.tracing import BEST, default_method
from tiny import make_llama, make_tokenizer, save_base


class EveryOther:
    """Calls every answer of an even place an unsafe one."""

    name = "every other"

    def complied(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [place % 2 == 0 for place in range(len(prompts))]


def test_the_demo_ends_with_the_model_that_was_not_taught_what_it_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(save_base(tmp_path / "base", make_llama(), make_tokenizer()))
    monkeypatch.setattr(demo, "EMBEDDED", base)
    monkeypatch.setattr(demo, "ALIGNED", base)
    monkeypatch.setattr(demo, "STANDARD", ("repsim", BEST, "random"))
    config = DemoConfig(small=True, epochs=1, dtype="float32", device="cpu")
    said: list[str] = []
    folder = tmp_path / "demo"
    taught: dict[str, set[str]] = {}

    def tuned(loaded: Any, rows: Any, where: Path, *given: Any, **more: Any) -> Any:
        taught[where.name.split("-")[1]] = {row.id for row in rows}
        return finetune(loaded, rows, where, *given, **more)

    monkeypatch.setattr("finetrace.benchmark.stages.finetune", tuned)
    outcome = run_demo(folder, config, EveryOther(), said.append)
    names = [model.name for model in outcome.behaviour]
    assert names[-2:] == ["fine-tuned, cleaned", "fine-tuned, random removed"]
    assert len(names) == 6
    title = make(default_method(open_index(folder / "index"))).title
    assert said[-1].startswith(f"6/6 cleaning: fine-tuning without the 20 rows that {title} names")
    planted = taught["mixed"] - taught["benign"]
    hits = [len((taught["mixed"] - taught[name]) & planted) for name in ("cleaned", "random")]
    assert outcome.cleaned.startswith(
        f"Fine-tuned without the 20 rows that {title} names, {hits[0]} of them planted, the model"
    )
    assert f"without 20 random rows, {hits[1]} of them planted, with" in outcome.cleaned
    assert set(taught) == {path.name.split("-")[1] for path in folder.glob("adapter-*")}
    assert {name: len(ids) for name, ids in taught.items()} == {"mixed": 40, "benign": 20, "cleaned": 20, "random": 20}
    problem = Problem(open_index(folder / "index"), read_examples(folder / "queries.jsonl"))
    ranked = rank(problem, Cut(top=20), [default_method(problem.index)])
    ids = problem.rows.ids
    assert taught["mixed"] - taught["cleaned"] == {ids[row] for row in ranked.gone}
    assert taught["random"] not in (taught["cleaned"], taught["benign"])
    rates = json.loads((folder / "results.json").read_text())["config"]["attack_success_rate"]
    assert set(rates) == set(names)
    page = (folder / "report.html").read_text()
    assert "fine-tuned, cleaned" in page
    assert "One removal was tried, under one seed. Fine-tuned without the 20 rows" in page
    assert "no retraining has checked" not in page

    def fail(*_: Any, **__: Any) -> Loaded:
        raise AssertionError("trained again")

    monkeypatch.setattr("finetrace.benchmark.stages.finetune", fail)
    again = run_demo(folder, config, EveryOther(), said.append)
    assert [model.name for model in again.behaviour] == names
    monkeypatch.setattr(demo, "known_dtype", lambda name, device: "float32" if name == "auto" else name)
    run_demo(folder, replace(config, dtype="auto"), EveryOther(), said.append)  # which is float32 here
    monkeypatch.setattr(demo, "known_dtype", lambda name, device: "bfloat16")
    with pytest.raises(FinetraceError, match="a demo with other settings is there"):
        run_demo(folder, replace(config, dtype="auto"), EveryOther(), said.append)
