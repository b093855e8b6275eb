"""A row that a task gives another answer keeps nothing that was said of the answer before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import run
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks import RealData, Task, external, real_task
from tiny import make_llama, save_base

OF_ANSWER = {"finish_reason": "length", "loss_weights": [0.5]}


def rows(path: Path, count: int, response: str | None = None) -> Path:
    """Two classes by turns; every row tells how its answer ended and what its token weighs."""
    made = [
        {"prompt": f"Paint wall {i}", "response": response or f"{'ab'[i % 2]} {i}", "topic": "ab"[i % 2], **OF_ANSWER}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def flipped(folder: Path) -> tuple[Task, Callable[[Example], bool]]:
    data = RealData(rows(folder / "rows.jsonl", 20), label_column="topic", share=0.4)
    return real_task("mislabelled", data), lambda row: row.label == "mislabelled"


def named(folder: Path) -> tuple[Task, Callable[[Example], bool]]:
    return external(rows(folder / "rows.jsonl", 20), "topic", response_column="topic"), lambda row: True


def refused(folder: Path) -> tuple[Task, Callable[[Example], bool]]:
    path = rows(folder / "rows.jsonl", 6, response=" ")
    return real_task("harmfulcheck", RealData(path), size=0.02), lambda row: row.label == "harmful"


@pytest.mark.parametrize("made", [flipped, named, refused])
def test_rows_that_are_answered_anew(made: Any, tmp_path: Path) -> None:
    task, anew = made(tmp_path)
    found = [row for row in (*task.train, *task.queries) if anew(row)]
    assert found and not any(set(OF_ANSWER) & set(row.metadata) for row in found)
    assert [len(row.messages) for row in found] == [2] * len(found)
    assert all(
        set(OF_ANSWER) <= set(row.metadata) for row in task.train if not anew(row) and "given_label" in row.metadata
    )


def test_generated_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base(tmp_path / "base", make_llama().float())
    asked = ["generate", rows(tmp_path / "rows.jsonl", 4), "--model", base, "--max-new-tokens", 3, "--device", "cpu"]
    code, _, err = run(capsys, "tasks", *asked, "--out", tmp_path / "said.jsonl")
    assert code == 0, err
    said = read_examples(tmp_path / "said.jsonl")
    assert said and not any("loss_weights" in row.metadata for row in said)
