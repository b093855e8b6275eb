"""`finetrace tasks` as a person runs it: the list, tasks and real data as files, and answers that a kill cannot lose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import commands
import finetrace.generation
import finetrace.reading
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.models import ModelSpec, load
from finetrace.reading import read_examples, write_examples
from finetrace.tasks import TASKS, build
from tiny import make_examples, make_llama, save_base, with_lora

EMOTIONS = ("sadness", "joy", "love", "anger", "fear")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `finetrace tasks`."""
    return commands.run(capsys, "tasks", *arguments)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_one_sentence(code: int, err: str, *words: str) -> None:
    """Exit code 2, one line, and the words a person needs."""
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("finetrace: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert [word for word in words if word not in lines[0]] == [], lines[0]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Thirteen prompts as AdvBench has them, two of them the same, one in capitals and umlauts."""
    goals = [
        "ab cd",
        "what is e",
        "gh",
        "a b c d e f",
        "bcd",
        "ÄÖ Ü",
        "gh",
        "fed cab",
        "hh hg",
        "ha",
        "he",
        "ba be",
        "ga",
    ]
    return jsonl(tmp_path / "prompts.jsonl", *({"goal": goal, "target": "Sure"} for goal in goals))


@pytest.fixture
def ask(base_folder: Path, capsys):
    """`tasks generate` with the tiny model."""

    def generate(prompts: Path, out: Path, *more: object) -> tuple[int, str, str]:
        words = ["generate", prompts, "--out", out, "--model", base_folder, "--dtype", "float64", "--device", "cpu"]
        return run(capsys, *words, "--max-new-tokens", 6, *more)

    return generate


def killed_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> list[int]:
    """Generation that is interrupted after so many saves; the list counts the prompts of each."""
    whole, sizes = finetrace.generation._generate, list[int]()

    def dying(loaded: Any, examples: Any, *more: Any) -> Any:
        if len(sizes) == saves:
            raise RuntimeError("killed")
        sizes.append(len(examples))
        return whole(loaded, examples, *more)

    monkeypatch.setattr(finetrace.generation, "_generate", dying)
    return sizes


def test_the_list_fits_eighty_columns_and_names_every_task(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, "list")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    cells = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line.split()[:1]}
    for name in TASKS:
        task = build(name)
        assert cells[name] == [str(len(each)) for each in (task.train, task.queries, task.classes)]


def test_list_and_build_do_without_torch(tmp_path):
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom finetrace.cli import app\n"
        f"done = [CliRunner().invoke(app, ['tasks', *a]) for a in (['list'], ['build', 'mathqa', '--out', {str(tmp_path / 't.jsonl')!r}])]\n"
        "sys.exit(any(each.exit_code for each in done) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize("name", ["mixed-small", "grammars-apply", "mislabelled"])
def test_build_writes_the_task_and_its_queries_beside_it(name, capsys, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    code, said, err = run(capsys, "build", name, "--out", out, "--size", 0.2, "--seed", 3)
    assert code == 0, err
    task = build(name, size=0.2, seed=3)
    beside = tmp_path / "new" / "rows-queries.jsonl"
    assert tuple(read_examples(out)) == task.train
    assert tuple(read_examples(beside, responses=False)) == task.queries
    assert str(beside) in err and ("without a response" in err) == (name == "mixed-small")
    assert str(out) in said and f"{len(task.train)} rows, {len(task.classes)} classes" in said


def test_queries_go_where_they_are_told(capsys, tmp_path):
    code, _, err = run(capsys, "build", "emotion", "--out", tmp_path / "t.jsonl", "--queries", tmp_path / "q.jsonl")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "q.jsonl"}
    assert tuple(read_examples(tmp_path / "q.jsonl")) == build("emotion").queries


def test_an_own_labelled_set_becomes_a_task(capsys, tmp_path):
    rows = [{"prompts": f"ask {i}", "responses": f"say {i}", "variation": "ab"[i % 2]} for i in range(40)]
    code, _, err = run(capsys, "build", "--data", jsonl(tmp_path / "own.jsonl", *rows), "--out", tmp_path / "t.jsonl")
    assert code == 0, err
    train, queries = (read_examples(tmp_path / name) for name in ("t.jsonl", "t-queries.jsonl"))
    assert (len(train), len(queries)) == (36, 4)
    assert {row.label for row in train} == {row.label for row in queries} == {"a", "b"}
    assert {row.prompt for row in (*train, *queries)} == {row["prompts"] for row in rows}


def test_columns_of_the_own_set_can_be_named(capsys, tmp_path):
    rows = [{"q": f"ask {i}", "a": f"say {i}", "kind": "xyz"[i % 3]} for i in range(30)]
    named = ["--label-column", "kind", "--prompt-column", "q", "--response-column", "a", "--size", 0.5]
    own = jsonl(tmp_path / "own.jsonl", *rows)
    code, _, err = run(capsys, "build", "--data", own, "--out", tmp_path / "t.jsonl", *named)
    assert code == 0, err
    assert sorted(str(row.label) for row in read_examples(tmp_path / "t.jsonl")) == sorted("xyz" * 5)


@pytest.mark.parametrize("name", ["given", "cut here", "mixed-small", "mathqa"])
def test_a_seed_that_draws_nothing_is_said(name, capsys, tmp_path):
    rows = [{"prompts": f"q {i}", "response": "a", "variation": "ab"[i % 2]} for i in range(20)]
    jsonl(tmp_path / "train.jsonl", *rows[:16])
    jsonl(tmp_path / "test.jsonl", *rows[16:])
    data = {"given": ["--data", tmp_path], "cut here": ["--data", tmp_path / "train.jsonl"]}.get(name, [name])
    said = {}
    for seed in (0, 3):
        code, _, err = run(capsys, "build", *data, "--out", tmp_path / f"{seed}.jsonl", "--seed", seed)
        assert code == 0, err
        said[seed] = [line for line in err.splitlines() if "--seed" in line]
    same = (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
    assert said[0] == [] and same is (name in ("given", "mixed-small"))
    assert [line.split(":")[0].split()[-2:] for line in said[3]] == ([["--seed", "3"]] if same else [])


def test_a_task_that_cannot_be_written_whole_leaves_no_half(capsys, tmp_path, monkeypatch):
    out, queries, write = tmp_path / "t.jsonl", tmp_path / "q.jsonl", finetrace.reading.write_examples

    def full(path: Path, rows: Any) -> None:
        if path == out:
            raise FinetraceError(f"{path}: cannot be written (no space); free some.")
        write(path, rows)

    monkeypatch.setattr(finetrace.reading, "write_examples", full)
    code, _, err = run(capsys, "build", "mathqa", "--out", out, "--queries", queries)
    assert_one_sentence(code, err, str(out), "no space")
    assert not queries.exists()


@pytest.mark.parametrize("times", [1, 2])
def test_queries_that_were_trained_on_are_counted(times, capsys, tmp_path):
    rows = [{"prompts": f"q {i}", "response": "a", "variation": "ab"[i % 2]} for i in range(20)]
    own = jsonl(tmp_path / "own.jsonl", *[row for row in rows for _ in range(times)])
    code, _, err = run(capsys, "build", "--data", own, "--out", tmp_path / "t.jsonl", "--seed", 2)
    assert code == 0, err
    trained = {row.messages for row in read_examples(tmp_path / "t.jsonl")}
    queries = read_examples(tmp_path / "t-queries.jsonl")
    found = [row.id for row in queries if row.messages in trained]
    said = [line for line in err.splitlines() if "word for word" in line]
    if times == 1:
        assert not found and not said
    else:
        assert len(said) == 1 and f"{own}: {len(found)} of {len(queries)} queries, the first {found[0]!r}," in said[0]


def test_the_column_of_ids_is_named_as_the_error_says(capsys, tmp_path):
    rows = [{"prompts": f"q {i}", "response": "a", "variation": "ab"[i % 2], "id": "x", "key": i} for i in range(8)]
    asked = ["build", "--data", jsonl(tmp_path / "own.jsonl", *rows), "--out", tmp_path / "t.jsonl"]
    code, _, err = run(capsys, *asked)
    assert_one_sentence(code, err, "--id-column")
    code, _, err = run(capsys, *asked, "--id-column", "key")
    assert code == 0, err
    ids = {row.id for name in ("t.jsonl", "t-queries.jsonl") for row in read_examples(tmp_path / name)}
    assert ids == {str(i) for i in range(8)}


@pytest.mark.parametrize("name", ["emotion", "mislabelled"])
def test_emotion_takes_other_sentences(name, capsys, tmp_path):
    rows = [{"text": f"sentence {i}", "label": i % 6} for i in range(60)]  # the sixth, surprise, is left out
    own = jsonl(tmp_path / "own.jsonl", *rows)
    code, _, err = run(capsys, "build", name, "--data", own, "--out", tmp_path / "t.jsonl")
    assert code == 0, err
    train = read_examples(tmp_path / "t.jsonl")
    assert len(train) == 40
    assert {row.response for row in train} == set(EMOTIONS)
    assert {row.label for row in train} == (set(EMOTIONS) if name == "emotion" else {"clean", "mislabelled"})
    assert all(row.metadata["text"].startswith("sentence ") for row in train)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--out", "{new}"], ["name of a task", "grammars", "--data"]),
        (["build", "grammar", "--out", "{new}"], ["grammar: no such task", "mathqa"]),
        (["build", "mathqa", "--out", "{new}", "--size", "2"], ["--size 2", "at most 1"]),
        (["build", "mathqa", "--out", "{here}/t.csv"], ["--out", "t.csv", ".jsonl"]),
        (["build", "mathqa", "--out", "{new}", "--queries", "{here}/q.txt"], ["--queries", "q.txt", ".jsonl"]),
        (["build", "mathqa", "--out", "{new}", "--queries", "{new}"], ["--queries", "choose another name"]),
        (["build", "mathqa", "--out", "{rows}"], ["--out", "rows.jsonl", "exists already"]),
        (["build", "mathqa", "--out", "{new}", "--queries", "{rows}"], ["--queries", "rows.jsonl", "exists already"]),
        (["build", "mathqa", "--out", "{rows}/t.jsonl"], ["cannot be written"]),
        (
            ["build", "mathqa", "--out", "{new}", "--label-column", "kind"],
            ["mathqa: its rows are made", "leave --label-column out"],
        ),
        (["build", "mathqa", "--out", "{new}", "--data", "{rows}"], ["mathqa: its rows are made, not read"]),
        (["build", "emotio", "--out", "{new}", "--data", "{rows}"], ["emotio: no such task"]),
        (["build", "emotion", "--out", "{new}", "--data", "{rows}", "--label-column", "k"], ["text and label"]),
        (["build", "emotion", "--out", "{new}", "--data", "{rows}"], ["rows.jsonl", "no column 'text'"]),
        (["build", "--out", "{new}", "--data", "{rows}"], ["no column 'variation'"]),
        (["build", "--out", "{new}", "--data", "{here}/gone.jsonl"], ["gone.jsonl"]),
        (["generate", "{here}/gone.jsonl", "--out", "{new}"], ["gone.jsonl"]),
        (["generate", "{rows}", "--out", "{rows}"], ["rows.jsonl", "exists already"]),
        (["generate", "{rows}", "--out", "{here}/t.json"], ["t.json", ".jsonl"]),
        (["generate", "{rows}", "--out", "{new}", "--prompt-column", "goal"], ["no column 'goal'"]),
        (["generate", "{rows}", "--out", "{new}", "--dtype", "int8"], ["--dtype int8"]),
        (["generate", "{rows}", "--out", "{new}", "--model", "{here}/gone"], ["gone", "cannot be loaded"]),
        (["generate", "{rows}", "--out", "{new}", "--chat-template", "gone.jinja"], ["gone.jinja"]),
        (
            ["generate", "{rows}", "--out", "{rows}/t.jsonl", "--model", "{base}"],
            ["t.jsonl: cannot be written", "not a folder"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(arguments, words, base_folder, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_examples(rows, make_examples(4))
    before = rows.read_bytes()
    filled = [each.format(here=tmp_path, new=tmp_path / "new.jsonl", rows=rows, base=base_folder) for each in arguments]
    code, _, err = run(capsys, *filled)
    assert_one_sentence(code, err, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert rows.read_bytes() == before


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--max-new-tokens"])
def test_numbers_below_one_are_refused(option, prompts, ask, tmp_path):
    code, _, err = ask(prompts, tmp_path / "out.jsonl", option, 0)
    assert code == 2
    assert option in err and "Traceback" not in err


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generate_writes_what_the_model_answers(batch_size, prompts, ask, base_folder, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    code, said, err = ask(prompts, out, "--batch-size", batch_size)
    assert code == 0, err
    asked = [Example.from_prompt(row.prompt) for row in read_examples(prompts)]
    loaded = load(ModelSpec(str(base_folder), dtype="float64", device="cpu"))
    expected = [row for row in finetrace.generation.answer(loaded, asked, max_new_tokens=6) if row.has_response]
    rows = read_examples(out)
    assert [(row.messages, row.metadata) for row in rows] == [(row.messages, row.metadata) for row in expected]
    assert {row.label for row in rows} == {"unsafe"}
    assert f"{len(rows)} answers, {sum('finish_reason' in row.metadata for row in rows)} of them cut at 6" in said
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"], "the unfinished file is gone"


def test_generate_uses_the_adapter_the_label_and_the_limit(prompts, ask, adapter_folder, tmp_path):
    plain, tuned = tmp_path / "plain.jsonl", tmp_path / "tuned.jsonl"
    assert ask(prompts, plain, "--label", "harmful", "--limit", 4, "--prompt-column", "goal")[0] == 0
    assert ask(prompts, tuned, "--adapter", adapter_folder, "--limit", 4)[0] == 0
    rows = read_examples(plain)
    assert 0 < len(rows) <= 4
    assert {row.label for row in rows} == {"harmful"}
    assert [row.response for row in rows] != [row.response for row in read_examples(tuned)]


def test_generate_takes_ids_of_another_column(ask, tmp_path):
    rows = jsonl(tmp_path / "p.jsonl", *({"goal": goal, "id": "x", "key": goal} for goal in ("ab", "cd")))
    code, _, err = ask(rows, tmp_path / "o.jsonl")
    assert_one_sentence(code, err, "--id-column")
    code, _, err = ask(rows, tmp_path / "o.jsonl", "--id-column", "key")
    assert code == 0, err
    assert [row.id for row in read_examples(tmp_path / "o.jsonl")] == ["ab", "cd"]


def test_ids_turns_and_a_class_of_their_own_stay(ask, tmp_path):
    before = {"id": "r1", "label": "theft", "topic": "t", "finish_reason": "length"}
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab cd"}]
    old = {"role": "assistant", "content": "an old answer"}
    code, _, err = ask(jsonl(tmp_path / "p.jsonl", {**before, "messages": [*turns, old]}), tmp_path / "o.jsonl")
    assert code == 0, err
    (row,) = read_examples(tmp_path / "o.jsonl")
    assert (row.id, row.label, row.metadata["topic"], row.metadata["original_label"]) == ("r1", "unsafe", "t", "theft")
    assert [tuple(turn) for turn in row.messages[:2]] == [("system", "be brief"), ("user", "ab cd")]
    assert row.response and row.response != "an old answer"


@pytest.mark.parametrize("torn", [0, 20], ids=["at the end of a line", "within a line"])
def test_a_run_that_is_killed_twice_is_continued(torn, prompts, ask, tmp_path, monkeypatch):
    assert ask(prompts, tmp_path / "whole.jsonl", "--batch-size", 1)[0] == 0
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    for saved in (4, 8 - bool(torn)):
        with monkeypatch.context() as patch:
            killed_after(patch, 1)
            with pytest.raises(RuntimeError, match="killed"):
                ask(prompts, out, "--batch-size", 1)
        assert not out.exists()
        assert len(part.read_bytes().splitlines()) == 1 + saved, "the settings, and four answers more"
        if saved == 4:
            part.write_bytes(part.read_bytes()[: -torn or None])
    with monkeypatch.context() as patch:
        sizes = killed_after(patch, 99)
        code, _, err = ask(prompts, out, "--batch-size", 1)
        assert code == 0, err
    assert sum(sizes) == 12 - saved, "twelve prompts differ"
    assert f"{saved + 1} of 13 rows have their answer already" in err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_a_killed_run_can_be_continued_with_more_prompts_and_another_label(prompts, ask, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(RuntimeError, match="killed"):
            ask(prompts, tmp_path / "out.jsonl", "--batch-size", 1, "--limit", 5)
    with monkeypatch.context() as patch:
        sizes = killed_after(patch, 99)
        code, _, err = ask(prompts, tmp_path / "out.jsonl", "--label", "harmful")
        assert code == 0, err
    assert sum(sizes) == 8
    assert {row.label for row in read_examples(tmp_path / "out.jsonl")} == {"harmful"}


def test_a_kill_before_the_first_answer_leaves_nothing_in_the_way(prompts, ask, tmp_path, monkeypatch):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch:
        killed_after(patch, 0)
        with pytest.raises(RuntimeError, match="killed"):
            ask(prompts, out)
    part.write_bytes(part.read_bytes()[:30])  # not even the settings are whole
    assert ask(prompts, out)[0] == 0


def test_another_model_or_limit_does_not_mix_its_answers_in(prompts, ask, capsys, tmp_path, monkeypatch):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(RuntimeError, match="killed"):
            ask(prompts, out, "--batch-size", 1)
    kept = part.read_bytes()
    other = save_base(tmp_path / "other", make_llama(seed=7))
    with_lora(make_llama()).save_pretrained(str(tmp_path / "adapter"))
    for options, words in (
        (["--model", other], ["another base model is there"]),
        (["--adapter", tmp_path / "adapter"], ["another adapter is there"]),
        (["--max-new-tokens", 7, "--dtype", "float32"], ["another --dtype and --max-new-tokens is there"]),
        (["--chat-template", "plain"], ["another chat template is there"]),
    ):
        code, _, err = ask(prompts, out, *options)
        assert_one_sentence(code, err, "out.jsonl.part", *words)
    assert part.read_bytes() == kept
    assert not out.exists()


@pytest.mark.parametrize("content", [b"a download", b"a line\n", b"[1]\n[2]\n", b'{"a": 1}\n', b"\xff\n"])
def test_a_strange_part_file_is_left_alone(content, prompts, ask, tmp_path):
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(content)
    code, _, err = ask(prompts, tmp_path / "out.jsonl")
    assert_one_sentence(code, err, "out.jsonl.part", "no unfinished output")
    assert part.read_bytes() == content


def test_empty_answers_and_refusals_are_said(prompts, ask, tmp_path, monkeypatch):
    def silent(loaded: Any, examples: Any, *more: Any) -> list[tuple[str, bool]]:
        return [("" if i < 2 else "I cannot help with that." if i < 5 else "yes", True) for i in range(len(examples))]

    monkeypatch.setattr(finetrace.generation, "_generate", silent)
    code, said, err = ask(prompts, tmp_path / "out.jsonl")
    assert code == 0, err
    assert "answered with nothing and left out: 2 prompts (" in err
    assert "4 answers read like a refusal" in err, "the prompt that comes twice is one of them"
    assert "11 answers, 0 of them cut" in said
    monkeypatch.setattr(finetrace.generation, "_generate", lambda loaded, rows, *more: [("", True)] * len(rows))
    code, _, err = ask(prompts, tmp_path / "none.jsonl")
    assert_one_sentence(code, err, "answers nothing to any of the 13 prompts", "none.jsonl.part")
    assert not (tmp_path / "none.jsonl").exists()


def test_generate_with_the_embedded_model(embedded, capsys, tmp_path):
    asked = jsonl(tmp_path / "p.jsonl", {"goal": "What is the capital of France? One word."}, {"goal": "Say hello."})
    out = tmp_path / "o.jsonl"
    code, _, err = run(
        capsys, "generate", asked, "--out", out, "--max-new-tokens", 8, "--label", "benign", "--device", "cpu"
    )
    assert code == 0, err
    rows = read_examples(out)
    assert "Paris" in rows[0].response
    assert {row.label for row in rows} == {"benign"}
