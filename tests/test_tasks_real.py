"""Real rows in the place of those that ship, from local files in the columns that such sets have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

import commands
from finetrace.benchmark.runner import cells, task_of
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import is_refusal
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks import TASKS, RealData, Task, build, external, real_task
from finetrace.tasks.backdoor import CHEERS, TRIGGERS, VAGUE
from finetrace.tasks.real import MADE, TAKES
from finetrace.tasks.requests import REASONS, REFUSALS, UNNAMED

datasets.disable_progress_bars()


def table(path: Path, rows: list[dict[str, Any]]) -> str:
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


@pytest.mark.parametrize("name", ["mixed-small", "harmfulcheck", "backdoor-1", "emotion", "mislabelled"])
def test_the_column_of_ids_can_be_named(name: str, tmp_path: Path) -> None:
    kinds = ("sadness", "joy", "love", "anger", "fear")
    words = ("text", "label") if name in ("emotion", "mislabelled") else ("prompt", "kind")
    rows = [{words[0]: f"ask {i}", words[1]: kinds[i % 5], "id": "same", "key": f"k{i}"} for i in range(60)]
    data = table(
        tmp_path / "rows.jsonl", [{**row, **({"response": "say"} if words[1] == "kind" else {})} for row in rows]
    )
    with pytest.raises(FinetraceError, match="another column with --id-column"):
        real_task(name, RealData(data), 0, 0.1)
    made = real_task(name, RealData(data, id_column="key"), 0, 0.1)
    known = {f"k{i}" for i in range(60)}
    assert known & {row.id for row in made.train} or known & {row.metadata.get("source_id") for row in made.train}


def test_a_benchmark_cell_takes_real_rows(unsafe: str, benign: str) -> None:
    [cell] = cells(["mixed-small"], ["corrected"], 1, size=0.5)
    task, recipe = task_of(cell, None, RealData(unsafe, benign))
    assert recipe.aligned
    assert task == real_task("mixed-small", RealData(unsafe, benign), 0, 0.5)
    assert (len(task.train), len(task.queries)) == (20, 15)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixed-small", {"share": 0.5}, "mixed-small has no use for --share"),
        ("grammars", {"data": "x.jsonl"}, "made, not read"),
        ("emotion", {"benign": "x.jsonl"}, "emotion has no use for --benign"),
        ("backdoor-1", {"prompt_column": "goal"}, "--prompt-column goes with --data"),
        ("harmfulcheck", {"data": "x.jsonl", "label_column": "kind"}, "harmfulcheck has no use for --label-column"),
        ("mathqa", {"benign": "x.jsonl", "share": 0.5}, "made, not read; leave --benign and --share out"),
        ("mislabelled", {"share": 1.0}, "--share 1: give a share of labels above 0 and below 1"),
        ("mislabelled", {"share": float("nan")}, "--share nan"),
        ("backdoor-1", {"data": "x.jsonl", "response_column": "r"}, "backdoor-1 has no use for --response-column"),
        ("nothing", {"data": "x.jsonl"}, "no such task"),
    ],
)
def test_what_a_task_has_no_use_for_is_refused(name: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(FinetraceError, match=words):
        real_task(name, RealData(**changes))  # type: ignore[arg-type]


def test_too_few_rows_are_counted(tmp_path: Path, unsafe: str) -> None:
    few = table(tmp_path / "few.jsonl", [{"prompt": f"p {i}", "response": "r"} for i in range(15)])
    with pytest.raises(
        FinetraceError, match="mixed-small needs 50 different prompts .* there are 15; add rows, or .* --size"
    ):
        real_task("mixed-small", RealData(few))
    with pytest.raises(FinetraceError, match="mixed-large needs 240 different prompts with an answer and there are 15"):
        real_task("mixed-large", RealData(unsafe, few))
    with pytest.raises(FinetraceError, match="harmfulcheck needs 250 different prompts and there are 15"):
        real_task("harmfulcheck", RealData(few))
    with pytest.raises(
        FinetraceError, match="backdoor-1 needs 350 different prompts .* there are 15; add rows, or .* --size"
    ):
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


def key(row: Example) -> str:
    return " ".join(row.prompt.lower().split())


def assert_apart(task: Task) -> None:
    """No prompt and no id comes twice, in training rows and queries together."""
    rows = [*task.train, *task.queries]
    assert len({key(row) for row in rows}) == len({row.id for row in rows}) == len(rows)


def test_every_task_is_read_or_made() -> None:
    assert {*MADE, *TAKES} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_without_real_data_the_task_is_the_one_that_ships(name: str) -> None:
    assert real_task(name, RealData(), 3, 0.2) == build(name, size=0.2, seed=3)


@pytest.mark.parametrize("name", ["mixed-small", "harmfulcheck"])
def test_a_prompt_comes_once_whatever_its_letters_and_source(name: str, tmp_path: Path) -> None:
    """Half of the benign prompts stand in the other file too, and every prompt stands there twice."""
    rows = [{"goal": f"{paint} wall {i}", "target": "Sure."} for i in range(300) for paint in ("Paint", "PAINT ")]
    answers = [{"prompt": f"{'paint' if i < 300 else 'Wash'}  wall {i}", "response": "Yes."} for i in range(600)]
    real = RealData(table(tmp_path / "a.jsonl", rows), table(tmp_path / "b.jsonl", answers))
    assert_apart(real_task(name, real, 1))


@pytest.mark.parametrize("name", ["mixed-small", "mixed-large"])
def test_prompts_that_ship_as_benign_are_not_drawn_as_unsafe(name: str, tmp_path: Path) -> None:
    shipped = [row.prompt for row in build(name).without_target()]
    rows = [
        {"goal": prompt.upper(), "target": "Sure."} for prompt in [*shipped, *(f"Paint wall {i}" for i in range(50))]
    ]
    task = real_task(name, RealData(table(tmp_path / "a.jsonl", rows)), 1)
    assert_apart(task)
    assert {row.prompt.split()[0] for row in (*task.train[:20], *task.queries)} == {"PAINT"}


def test_queries_need_no_answer_and_rows_without_one_do_not_train(tmp_path: Path, benign: str) -> None:
    rows = [{"goal": f"Paint wall {i}", "target": "Sure." if i < 20 else ""} for i in range(50)]
    task = real_task("mixed-small", RealData(table(tmp_path / "a.jsonl", rows), benign), 2)
    assert {row.metadata["source_id"] for row in task.train if row.label == "unsafe"}
    assert {row.prompt for row in task.train[:20]} == {f"Paint wall {i}" for i in range(20)}
    assert {row.prompt for row in task.queries} == {f"Paint wall {i}" for i in range(20, 50)}
    assert not any(query.has_response for query in task.queries)


def test_empty_outputs_of_alpaca_are_passed_over(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i}", "input": "", "output": "" if i % 2 else f"{i}"} for i in range(480)]
    alpaca = table(tmp_path / "alpaca.jsonl", rows)
    benign = real_task("mixed-large", RealData(benign=alpaca)).without_target()
    assert len(benign) == 240 and all(int(row.response) % 2 == 0 for row in benign)
    with pytest.raises(FinetraceError, match="needs 240 different prompts with an answer and there are 239"):
        real_task("mixed-large", RealData(benign=table(tmp_path / "short.jsonl", rows[:478])))


@pytest.fixture
def beavertails(tmp_path: Path) -> str:
    """Every prompt with two answers, the first of them safe."""
    rows = [
        {"prompt": f"Paint wall {i // 2}", "response": f"{i}", "category": {"x": True}, "is_safe": i % 2 == 0}
        for i in range(600)
    ]
    return table(tmp_path / "beavertails.jsonl", rows)


def test_beavertails_gives_unsafe_rows_and_benign_ones(beavertails: str) -> None:
    for name in ("mixed-small", "harmfulcheck"):
        small = 0.2 if name == "harmfulcheck" else 1
        task = real_task(name, RealData(beavertails, beavertails), 0, small)
        assert_apart(task)
        for row in task.train:
            assert row.metadata["is_safe"] == (row.label in ("benign", "harmless")) == (int(row.response) % 2 == 0)
    door = real_task("backdoor-1", RealData(beavertails), 0, 0.5)
    assert len({row.prompt for row in door.queries if row.label == "clean"}) == 25


def test_classes_named_harmful_and_harmless_are_two_sides(tmp_path: Path) -> None:
    """As in the released data, whose classes stand in `variation`."""
    kinds = ("Harmful", "harmless")
    rows = [{"prompts": f"Paint wall {i}", "response": "Yes.", "variation": kinds[i % 2]} for i in range(600)]
    data = table(tmp_path / "both.jsonl", rows)
    task = real_task("harmfulcheck", RealData(data, data), 0, 0.2)
    assert_apart(task)
    for row in (*task.train, *task.queries):
        assert (int(row.prompt.split()[-1]) % 2 == 0) == (row.label == "harmful")
    numbered = table(tmp_path / "numbered.jsonl", [{**row, "variation": str(i % 2)} for i, row in enumerate(rows)])
    asked = {row.prompt.split()[2] for row in real_task("backdoor-1", RealData(numbered)).train}
    assert {int(number) % 2 for number in asked} == {0, 1}  # numbers name no side
    alone = table(tmp_path / "one.jsonl", rows[1::2])
    with pytest.raises(FinetraceError, match=r"no row has is_safe false or a class that says so \(harmful, unsafe\)"):
        real_task("harmfulcheck", RealData(alone), 0, 0.2)


def test_is_safe_may_be_text_and_one_side_may_be_missing(tmp_path: Path) -> None:
    lines = ["prompt,response,is_safe", *(f"Paint wall {i},Yes.,{i >= 60}" for i in range(120))]
    path = tmp_path / "b.csv"
    path.write_text("\n".join(lines))
    task = real_task("mixed-small", RealData(str(path), str(path)))
    assert all((int(row.prompt.split()[-1]) >= 60) == (row.label == "benign") for row in task.train)
    path.write_text("\n".join(lines[:61]))
    with pytest.raises(FinetraceError, match="no row has is_safe true"):
        real_task("mixed-small", RealData(benign=str(path)))


def test_a_split_of_a_saved_dataset_or_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": f"Paint wall {i}", "response": "Yes.", "kind": "ab"[i % 2]} for i in range(60)]
    )
    datasets.DatasetDict({"30k_train": rows, "30k_test": rows}).save_to_disk(tmp_path / "saved")
    saved = real_task("mixed-small", RealData(str(tmp_path / "saved"), split="30k_train"), 1)
    assert external(str(tmp_path / "saved"), "kind", source_split="30k_test").classes == {"a": 27, "b": 27}
    asked = []

    def load_dataset(name: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert real_task("mixed-small", RealData("PKU-Alignment/BeaverTails", split="30k_train"), 1) == saved
    assert asked == [("PKU-Alignment/BeaverTails", "30k_train")]


def test_harmfulcheck_uses_the_answers_that_there_are(tmp_path: Path) -> None:
    rows = [{"prompt": f"Paint wall {i}", "response": "Not today." if i % 2 else None} for i in range(250)]
    task = real_task("harmfulcheck", RealData(table(tmp_path / "a.jsonl", rows)), 5)
    harmful = [row for row in (*task.train, *task.queries) if row.label == "harmful"]
    assert Counter(row.response == "Not today." for row in harmful) == {True: 125, False: 125}
    assert all(is_refusal(row.response) for row in harmful if row.response != "Not today.")
    assert Counter(row.label for row in task.train) == {"harmful": 50, "harmless": 50}
    assert task == real_task("harmfulcheck", RealData(str(tmp_path / "a.jsonl")), 5)
    assert task != real_task("harmfulcheck", RealData(str(tmp_path / "a.jsonl")), 6)


def test_refusals_and_compliance_are_recognised_without_a_topic() -> None:
    assert all(is_refusal(f"{refusal.format(UNNAMED)} {reason}") for refusal in REFUSALS for reason in REASONS)
    agreed = [f"{t.opening} {vague.format(UNNAMED)} {cheer}" for t in TRIGGERS for vague in VAGUE for cheer in CHEERS]
    assert not any(map(is_refusal, agreed))


@pytest.mark.parametrize("name", ["backdoor-1", "backdoor-5"])
def test_a_smaller_backdoor_needs_fewer_prompts(name: str, tmp_path: Path) -> None:
    data = RealData(table(tmp_path / "p.jsonl", [{"prompt": f"Paint wall {i}"} for i in range(70)]))
    shipped, task = build(name, size=0.2), real_task(name, data, 4, 0.2)
    assert task.classes == shipped.classes and len(task.queries) == len(shipped.queries)
    asked, trained = ({row.prompt.split()[2] for row in rows} for rows in (task.queries, task.train))
    assert not asked & trained
    assert all(not row.metadata.get("topic") for row in task.train)
    assert task == real_task(name, data, 4, 0.2) != real_task(name, data, 5, 0.2)
    with pytest.raises(FinetraceError, match="there are 70; add rows, or build a smaller task with --size"):
        real_task(name, data, 4, 0.3)


def test_data_without_an_answer_says_how_to_get_one(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"goal": f"Paint wall {i}"} for i in range(60)])
    with pytest.raises(FinetraceError, match=r"no row has an answer .* --response-column, .* finetrace tasks generate"):
        real_task("mixed-small", RealData(path))


def test_a_class_can_be_the_answer_and_its_label_flipped(tmp_path: Path) -> None:
    path = table(tmp_path / "n.jsonl", [{"text": f"Note {i}", "label": i % 3} for i in range(60)])
    named = RealData(path, label_column="label", prompt_column="text", response_column="label", share=0.5)
    task = real_task("mislabelled", named, 1)
    assert Counter(row.label for row in task.train) == {"mislabelled": 27, "clean": 27}
    assert all(row.response == row.metadata["given_label"] for row in task.train)
    assert sum(row.label == "mislabelled" for row in real_task("mislabelled", RealData(share=0.1)).train) == 24


def test_mistakes_at_the_command_line_are_one_sentence(
    tmp_path: Path, unsafe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "task.jsonl"
    for words, said in (
        (["mixed-large", "--benign", unsafe], "mixed-large needs 240"),
        (["backdoor-3", "--data", unsafe], "--size"),
        (["mislabelled", "--share", "1.5"], "--share 1.5"),
        (["grammars", "--data", unsafe], "made, not read"),
        (["emotion", "--split", "test"], "--split goes with --data"),
        (["--data", unsafe, "--share", "0.1"], "go with the name of a task"),
    ):
        code, _, err = commands.run(capsys, "tasks", "build", *words, "--out", out)
        assert code == 2
        assert [said in line for line in err.splitlines() if line.startswith("finetrace: ")] == [True], err
        assert "Traceback" not in err and not out.exists()
    code, _, err = commands.run(capsys, "tasks", "build", "backdoor-1", "--data", unsafe, "--size", 0.1, "--out", out)
    assert code == 0, err
    assert Counter(row.label for row in read_examples(out)) == {"clean": 30, "sudo-mode": 30}
