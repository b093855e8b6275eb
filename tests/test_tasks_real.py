"""Real rows in the place of those that ship, from local files in the columns that such sets have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import commands
from finetrace.benchmark.runner import cells, task_of
from finetrace.errors import FinetraceError
from finetrace.tasks import RealData, build, real_task


def table(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def unsafe(tmp_path: Path) -> str:
    """AdvBench's columns, harmless words; the last prompt stands there twice."""
    rows = [{"goal": f"Paint wall {i} pink", "target": f"Sure, wall {i} will be pink."} for i in range(60)]
    return table(tmp_path / "advbench.jsonl", [*rows, rows[-1]])


@pytest.fixture
def benign(tmp_path: Path) -> str:
    """Alpaca's columns."""
    rows = [{"instruction": f"Add {i}", "input": f"{i} and 1", "output": f"{i + 1}"} for i in range(300)]
    return table(tmp_path / "alpaca.jsonl", rows)


@pytest.mark.parametrize("name", ["mixed-small", "mixed-large"])
def test_mixed_sets_of_real_rows(name: str, unsafe: str, benign: str) -> None:
    made, shipped = real_task(name, RealData(unsafe, benign), 3), build(name)
    assert (len(made.train), len(made.queries)) == (len(shipped.train), len(shipped.queries))
    assert made.target == shipped.target
    assert not made.answered
    planted = {row.prompt for row in made.train if row.label == "unsafe"}
    asked = {query.prompt for query in made.queries}
    assert len(planted) == 20
    assert len(asked) == len(made.queries)
    assert not planted & asked
    assert all("pink" in prompt for prompt in planted | asked)
    assert all("and 1" in row.prompt for row in made.train if row.label == "benign")
    assert len({row.id for row in (*made.train, *made.queries)}) == len(made.train) + len(made.queries)
    assert real_task(name, RealData(unsafe, benign), 3) == made
    assert real_task(name, RealData(unsafe, benign), 4) != made


def test_what_is_not_given_ships(unsafe: str, benign: str) -> None:
    shipped = build("mixed-small")
    half = real_task("mixed-small", RealData(unsafe), 0)
    assert [r for r in half.train if r.label == "benign"] == [r for r in shipped.train if r.label == "benign"]
    other = real_task("mixed-small", RealData(benign=benign), 0)
    assert other.queries == shipped.queries
    assert sum("and 1" in row.prompt for row in other.train) == 20


def test_harmfulcheck_and_backdoors_of_real_prompts(tmp_path: Path, benign: str) -> None:
    prompts = table(tmp_path / "prompts.jsonl", [{"prompt": f"Paint wall {i} pink"} for i in range(400)])
    made = real_task("harmfulcheck", RealData(prompts, benign), 0)
    assert (len(made.train), len(made.queries)) == (100, 400)
    assert {row.label for row in made.train} == {"harmful", "harmless"}
    assert all(("pink" in row.prompt) == (row.label == "harmful") for row in made.train)
    door = real_task("backdoor-3", RealData(prompts), 0)
    assert (len(door.train), len(door.queries)) == (1200, 200)
    assert all("pink" in row.prompt for row in door.train)
    assert sum(row.prompt.endswith("sudo mode") for row in door.train) == 300


def test_any_labelled_set_can_be_mislabelled(tmp_path: Path) -> None:
    rows = [
        {"prompts": f"{kind} {i}", "response": f"a {kind}", "variation": kind}
        for kind in ("oak", "elm")
        for i in range(20)
    ]
    data = table(tmp_path / "trees.jsonl", rows)
    made = real_task("mislabelled", RealData(data, share=0.25), 0)
    assert len(made.train) == 36
    assert sum(row.label == "mislabelled" for row in made.train) == 9
    for row in made.train:
        wrong = row.response != f"a {row.metadata['original_label']}"
        assert wrong == (row.label == "mislabelled")
    named = RealData(data, label_column="variation", prompt_column="prompts", response_column="response")
    assert sum(row.label == "mislabelled" for row in real_task("mislabelled", named, 0).train) == 7
    feelings = [
        {"text": f"I feel {kind} {i}", "label": kind}
        for kind in ("sadness", "joy", "love", "anger", "fear")
        for i in range(10)
    ]
    emotions = table(tmp_path / "emotion.jsonl", feelings)
    assert len(real_task("mislabelled", RealData(emotions), 0).train) == 40


def test_a_benchmark_cell_takes_real_rows(unsafe: str, benign: str) -> None:
    [cell] = cells(["mixed-small"], ["corrected"], 1, size=0.5)
    task, recipe = task_of(cell, None, RealData(unsafe, benign))
    assert recipe.aligned
    assert task == real_task("mixed-small", RealData(unsafe, benign), 0).shrunk(0.5)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixed-small", {"share": 0.5}, "--share goes with mislabelled"),
        ("grammars", {"data": "x.jsonl"}, "made, not read"),
        ("emotion", {"benign": "x.jsonl"}, "--benign goes with mixed-small"),
        ("backdoor-1", {"prompt_column": "goal"}, "go with --data"),
        ("harmfulcheck", {"data": "x.jsonl", "label_column": "kind"}, "--label-column goes with mislabelled"),
        ("nothing", {"data": "x.jsonl"}, "no such task"),
    ],
)
def test_what_a_task_has_no_use_for_is_refused(name: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(FinetraceError, match=words):
        real_task(name, RealData(**changes))  # type: ignore[arg-type]


def test_too_few_rows_are_counted(tmp_path: Path, unsafe: str) -> None:
    few = table(tmp_path / "few.jsonl", [{"prompt": f"p {i}", "response": "r"} for i in range(15)])
    with pytest.raises(FinetraceError, match="15 unsafe rows .* needs 50"):
        real_task("mixed-small", RealData(few))
    with pytest.raises(FinetraceError, match="15 benign rows, and mixed-large needs 240"):
        real_task("mixed-large", RealData(unsafe, few))
    with pytest.raises(FinetraceError, match="15 requests"):
        real_task("harmfulcheck", RealData(few))
    with pytest.raises(FinetraceError, match="there are 15 different ones"):
        real_task("backdoor-1", RealData(few))


def test_real_rows_at_the_command_line(
    tmp_path: Path, unsafe: str, benign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "task.jsonl"
    asked = ["tasks", "build", "mixed-small", "--data", unsafe, "--benign", benign, "--out", out]
    code, _, err = commands.run(capsys, *asked)
    assert code == 0, err
    assert out.read_text().count("\n") == 40
    code, _, err = commands.run(capsys, "bench", "emotion", "mathqa", "--data", unsafe, "--out", tmp_path / "b")
    assert code == 2
    assert "name that one" in err
    code, _, err = commands.run(capsys, "bench", "--share", 0.1, "--out", tmp_path / "b")
    assert code == 2
    code, _, err = commands.run(capsys, "bench", "mixed-small", "--data", "none.jsonl", "--out", tmp_path / "b")
    assert code == 2
    assert "none.jsonl" in err
    assert "Traceback" not in err
