"""`finetrace clean` on a tiny model, and its ranking on known scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from commands import run, tuned_index
from finetrace.attribution import Problem, make
from finetrace.cleaning import rank as cleaning
from finetrace.cleaning import threshold
from finetrace.cleaning.files import Rows, write_files
from finetrace.cleaning.rank import Cut, Outcome, rank
from finetrace.cli.clean import _interval, _record
from finetrace.errors import FinetraceError
from finetrace.evaluation import retraining
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.generation import answer
from finetrace.index import open_index
from finetrace.index.store import Index
from finetrace.reading import read_examples, write_examples
from finetrace.tracing import unasked_method
from tiny import make_examples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    rows = make_examples(12)
    frame = pd.DataFrame(
        {
            "question": [e.prompt for e in rows],
            "answer": [e.response for e in rows],
            "note": [f"n{i}" for i in range(12)],
        }
    )
    frame.to_csv(folder / "train.csv", index=False)
    write_examples(folder / "bad.jsonl", make_examples(3, seed=5))
    tuned_index(folder, folder / "train.csv")
    return folder


def command(place: Path, tmp_path: Path, *more: object) -> list[object]:
    files = ["--kept", tmp_path / "kept.csv", "--removed", tmp_path / "removed.jsonl"]
    return ["clean", "--index", place / "idx", "--bad", place / "bad.jsonl", *files, "--method", "gradcos", *more]


def test_rows_are_split_in_the_format_they_came_in(place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, *command(place, tmp_path, "--data", place / "train.csv", "--top", 4))
    assert code == 0, err
    assert max(len(line) for line in out.splitlines() if not line.startswith("kept")) <= 80
    train, kept = pd.read_csv(place / "train.csv"), pd.read_csv(tmp_path / "kept.csv")
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    assert list(kept.columns) == list(train.columns)
    assert len(kept) == 8
    assert len(removed) == 4
    assert set(kept["note"]) | {row["note"] for row in removed} == set(train["note"])
    assert [row["finetrace_rank"] for row in removed] == [1, 2, 3, 4]
    values = [row["finetrace_value"] for row in removed]
    assert values == sorted(values, reverse=True)
    assert "number 1 of 12 behind 3 bad answers by gradcos" in removed[0]["finetrace_reason"]
    index = open_index(place / "idx")
    expected = rank(Problem(index, read_examples(place / "bad.jsonl")), Cut(top=4), ["gradcos"])
    assert [row["note"] for row in removed] == [f"n{i}" for i in expected.gone]
    again = run(capsys, *command(place, tmp_path, "--top", 4))
    assert again[0] == 2
    assert "exists already" in again[2]


def test_without_the_data_the_indexs_own_rows_are_written(place: Path, tmp_path: Path, capsys: Any) -> None:
    files = ["--kept", tmp_path / "k.jsonl", "--removed", tmp_path / "r.parquet", "--share", 0.25]
    code, _, err = run(
        capsys, "clean", "--index", place / "idx", "--bad", place / "bad.jsonl", "--method", "repsim", *files
    )
    assert code == 0, err
    kept = read_examples(tmp_path / "k.jsonl")
    originals = {e.id: e for e in open_index(place / "idx").rows.examples}
    assert len(kept) == 9
    assert all(originals[each.id].messages == each.messages for each in kept)
    assert set(pd.read_parquet(tmp_path / "r.parquet")["id"]) == set(originals) - {each.id for each in kept}


def test_values_are_means_of_robust_standard_deviations_and_methods_vote(place: Path) -> None:
    index, bad = open_index(place / "idx"), read_examples(place / "bad.jsonl")
    problem, found = Problem(index, bad), {}
    for spec in ("gradcos", "repsim"):
        scores = make(spec).score(problem).values
        middle = np.median(scores, axis=1, keepdims=True)
        mad = np.median(np.abs(scores - middle), axis=1, keepdims=True)
        found[spec] = ((scores - middle) / (1.4826 * mad)).mean(0)
        np.testing.assert_allclose(rank(Problem(index, bad), Cut(top=2), [spec]).values, found[spec])
    both = rank(Problem(index, bad), Cut(top=2), ["gradcos", "repsim"])
    np.testing.assert_allclose(both.values, (found["gradcos"] + found["repsim"]) / 2)
    assert both.order[0] == both.values.argmax()
    assert sorted([*both.kept, *both.gone]) == list(range(12))


def test_rows_that_few_words_single_out_are_found_though_most_scores_are_equal(place: Path, monkeypatch: Any) -> None:
    """A lexical search gives most rows 0: the median absolute deviation is 0, and the others stand out all the same."""
    index, bad = open_index(place / "idx"), read_examples(place / "bad.jsonl")
    scores = np.zeros((len(bad), 12))
    scores[:, 7], scores[:, 9] = 6.0, 3.0

    class Sparse:
        title = "sparse"

        def score(self, problem: Problem) -> Any:
            return SimpleNamespace(values=scores)

    monkeypatch.setattr(cleaning, "make", lambda spec: make(spec) if spec != "bm25" else Sparse())
    monkeypatch.setattr(threshold, "prepare", lambda problem, methods: None)
    monkeypatch.setattr(Sparse, "label", "bm25", raising=False)
    found = rank(Problem(index, bad), Cut(top=2), ["bm25"])
    assert found.gone == (7, 9)
    assert found.values[7] == pytest.approx(6 / (1.2533 * 9 / 12))
    scores[:] = 1.0
    with pytest.raises(FinetraceError, match="all 12 have the same value by sparse"):
        rank(Problem(index, bad), Cut(top=2), ["bm25"])


def test_a_threshold_takes_out_what_chance_rarely_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted rows stand out by five deviations; the groups that calibrate are of rows among which nothing stands out."""
    index, bad = open_index(place / "idx"), read_examples(place / "bad.jsonl")

    def planted(problem: Problem, methods: Any) -> Any:
        rng = np.random.default_rng(problem.m)
        values = rng.normal(size=(problem.m, problem.n))
        if problem.m == len(bad):
            values[:, [2, 7]] += 5
        return values

    for module in (cleaning, threshold):
        monkeypatch.setattr(module, "standard", planted)
    found = rank(Problem(index, bad), Cut(), ["gradcos"])
    assert set(found.gone[:2]) == {2, 7}
    assert found.removed <= 4  # and what chance takes out
    assert found.threshold is not None
    assert 0.5 < found.threshold < 3
    assert rank(Problem(index, bad), Cut(expected=6), ["gradcos"]).threshold < found.threshold
    monkeypatch.setattr(cleaning, "standard", lambda problem, methods: np.zeros((problem.m, problem.n)))
    with pytest.raises(FinetraceError, match="no row stands out"):
        rank(Problem(index, bad), Cut(), ["gradcos"])


def test_retraining_shows_the_answers_before_and_after(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        "--top",
        5,
        "--retrain",
        "--out",
        tmp_path / "again",
        "--draws",
        2,
        "--max-new-tokens",
        3,
        "--trust-remote-code",
    )
    asked: list[int] = []
    monkeypatch.setattr(RefusalPrefixJudge, "name", "m[a]")
    monkeypatch.setattr(retraining, "answer", lambda *a, **k: asked.append(k["max_new_tokens"]) or answer(*a, **k))
    code, out, err = run(capsys, *command(place, tmp_path, *more, "--ranking", tmp_path / "ranking.csv"))
    assert code == 0, err
    assert set(asked) == {3}
    assert all(spec.trust_remote_code for spec in retraining._bases)
    assert "asked again (judge: m[a])" in out
    order = pd.read_csv(tmp_path / "ranking.csv")
    assert order["finetrace_rank"].tolist() == list(range(1, 13))
    assert order["finetrace_value"].is_monotonic_decreasing
    assert order["removed"].tolist() == [True] * 5 + [False] * 7
    removed = pd.read_json(tmp_path / "removed.jsonl", lines=True)
    assert order["id"][:5].tolist() == removed["id"].tolist()
    assert set(order["id"]) == {each.id for each in open_index(place / "idx").rows.examples}
    records = json.loads((tmp_path / "again" / "results.json").read_text())["records"]
    assert [(r["trained_on"], r["rows"]) for r in records] == [
        ("all rows", 12),
        ("cleaned", 7),
        ("random rows removed", 7),
        ("self-influential removed", 7),
    ]
    assert all(0 <= r["rate"] <= 1 and r["loss"] > 0 for r in records)
    assert "self-influential removed" in out
    loss = next(r["loss"] for r in records if r["trained_on"] == "all rows")
    assert f"and {loss:.2f} after retraining on all rows" in " ".join(out.split())
    index, bad = open_index(place / "idx"), read_examples(place / "bad.jsonl")
    trained = {
        tuple(json.loads(path.read_text())["rows"]) for path in (tmp_path / "again" / "retrainings").glob("*.json")
    }
    influence = make(unasked_method(index)).score(index, bad).values
    assert (influence == influence[0]).all()
    unlike = tuple(sorted(np.argsort(influence[0])[: 12 - 5].tolist()))  # without the five largest
    cleaned = rank(Problem(index, bad), Cut(top=5), ["gradcos"]).kept
    assert {tuple(range(12)), cleaned, unlike} <= trained
    assert all(len(rows) == 7 for rows in trained - {tuple(range(12))})
    assert len(trained) <= 5  # the two random draws may be of rows that are there
    for name in ("kept.csv", "removed.jsonl"):
        (tmp_path / name).unlink()
    results = tmp_path / "again" / "results.json"
    results.write_text(json.dumps({"config": {"seeds": 2}}))
    code, _, err = run(capsys, *command(place, tmp_path, *more))
    assert code == 0, err
    assert "results.json and its tables are of 2 seeds and will be of 1" in err
    for name in ("kept.csv", "removed.jsonl"):
        (tmp_path / name).unlink()
    write_examples(tmp_path / "bad.jsonl", make_examples(3, seed=6))
    code, _, err = run(capsys, *command(place, tmp_path, *more, "--bad", tmp_path / "bad.jsonl"))
    assert code == 2
    assert "a cleaning with other settings is there" in err


def test_a_cleaning_that_finds_nothing_bad_leaves_its_folder_to_others(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeverBad(RefusalPrefixJudge):
        def complied(self, prompts: Any, responses: Any) -> list[bool]:
            return [False] * len(prompts)

    monkeypatch.setattr("finetrace.evaluation.judging.make_judge", lambda *_: NeverBad())
    lines = [json.dumps({"prompt": each.prompt}) + "\n" for each in make_examples(2, seed=5)]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    asked = ("--bad", tmp_path / "asked.jsonl", "--top", 2, "--retrain", "--out", tmp_path / "r", "--max-new-tokens", 2)
    code, _, err = run(capsys, *command(place, tmp_path, *asked))
    assert (code, "so there is nothing to clean" in err) == (2, True), err
    assert list((tmp_path / "r").iterdir()) == []
    monkeypatch.setattr(cleaning, "standard", lambda problem, methods: np.zeros((3, 12)))
    code, _, err = run(capsys, *command(place, tmp_path, "--top", 2, "--retrain", "--out", tmp_path / "r"))
    assert (code, "no row stands out" in err) == (2, True), err
    assert list((tmp_path / "r").iterdir()) == []


def test_an_index_of_a_model_without_an_adapter_is_not_retrained(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Its model has learnt the rows already: adapters trained on top of it say nothing of training without them."""
    model = ("--model", place / "base")
    assert run(capsys, "index", place / "train.csv", "--out", tmp_path / "idx", *model)[0] == 0
    config = ("--config", place / "adapter" / "finetune.yaml")
    again = ("--index", tmp_path / "idx", "--top", 2, "--retrain", "--out", tmp_path / "r")
    for told in (config, ()):
        code, _, err = run(capsys, *command(place, tmp_path, *again, *told))
        assert (code, "retraining needs a LoRA fine-tuning" in err) == (2, True), err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--top", 4, "--share", 0.5), ("--top and --share",)),
        (("--top", 12), ("removing 12 of 12",)),
        (("--share", 0.0), ("--share 0: give a share of the rows between 0 and 1",)),
        (("--share", 2), ("--share 2: give a share of the rows between 0 and 1",)),
        (("--share", 0.01), ("removing 0 of 12",)),
        (("--expected", -1), ("--expected -1: give a number of rows above 0",)),
        (("--top", 2, "--expected", 3), ("--expected: --top or --share says how many rows go",)),
        (("--share", 0.5, "--expected", 3), ("--expected: --top or --share says how many rows go",)),
        (("--top", 2, "--retrain", "--config", "c", "--adapter", "a"), ("--adapter a: --config says",)),
        (("--top", 2, "--judge", "org/judge"), ("--judge: ", "bad.jsonl holds all answers", "add --retrain")),
        (("--top", 2, "--judge", "refusal-prefix"), ("--judge: ", "holds all answers")),
        (("--top", 2, "--max-new-tokens", 7), ("--max-new-tokens: ", "holds all answers")),
        (("--top", 2, "--removed", "removed.txt"), ("removed.txt: rows are written as .jsonl",)),
        (("--top", 2, "--removed", "kept"), ("give them different names",)),
        (("--top", 2, "--data", "bad"), ("holds 3 rows and the index 12",)),
        (("--top", 2, "--method", "nosuch"), ("nosuch: no such method",)),
        (("--top", 2, "--removed", "under a file"), ("is a file, so no rows can be written there",)),
        (("--top", 2, "--ranking", "kept"), ("--kept and --ranking", "give them different names")),
        (("--top", 2, "--retrain", "--out", "a file"), ("there is something else already; choose another --out",)),
        (("--top", 2, "--retrain", "--out", "index"), ("there is something else already; choose another --out",)),
    ],
)
def test_mistakes_are_one_sentence(
    more: Any, words: Any, place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words_for = {
        "bad": place / "bad.jsonl",
        "kept": tmp_path / "kept.csv",
        "a file": place / "bad.jsonl",
        "index": place / "idx",
        "under a file": place / "bad.jsonl" / "rows.jsonl",
    }
    monkeypatch.setattr(Index, "model", lambda *_, **__: pytest.fail("the model was loaded first"))
    code, _, err = run(capsys, *command(place, tmp_path, *[words_for.get(each, each) for each in more]))
    assert code == 2
    assert "Traceback" not in err
    assert all(word in err for word in words), err
    assert not (tmp_path / "kept.csv").exists()


def test_too_many_rows_for_a_threshold_are_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "MOST", 11)
    monkeypatch.setattr(Index, "model", lambda *_, **__: pytest.fail("the model was loaded first"))
    code, _, err = run(capsys, *command(place, tmp_path, "--retrain", "--out", tmp_path / "r"))
    assert (code, "and 12 rows are many; give --top or --share" in err) == (2, True), err
    assert not (tmp_path / "r").exists()


def test_columns_of_the_bad_answers_may_be_named(place: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"ask": e.prompt, "reply": e.response} for e in make_examples(2, seed=5)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["--bad", tmp_path / "bad.jsonl", "--prompt-column", "ask", "--response-column", "reply"]
    code, _, err = run(capsys, *command(place, tmp_path, *named, "--top", 3))
    assert code == 0, err
    assert "against 2 bad answers" in err


def test_it_is_said_where_the_order_of_the_data_decides(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    found = cleaning.Ranked(np.array([3.0, 2, 2, 2, 0]), np.arange(5), 2, None, np.zeros(5, dtype=int), ("bm25",))
    assert found.tied == 2
    assert replace(found, removed=1).tied == 0
    assert replace(found, removed=4).tied == 0
    monkeypatch.setattr(cleaning, "standard", lambda problem, methods: np.repeat([[3.0, 2, 2, 0]], 3, axis=1))
    code, out, err = run(capsys, *command(place, tmp_path, "--top", 4))
    assert code == 0, err
    assert "5 kept rows with the same value as the last that goes" in " ".join(out.split())


def test_one_answer_of_one_training_has_no_interval() -> None:
    alone, many = Estimate(1.0, float("nan"), float("nan"), 1), Estimate(0.5, 0.25, 0.75, 4)
    assert _interval(alone, 100, ".0f") == "100"
    assert _interval(many, 100, ".0f") == "50 [25, 75]"
    record = _record(Outcome("cleaned", 7, alone, many))
    assert record["loss"] == 1.0
    assert record["loss_low"] is record["loss_high"] is None
    assert record["rate_low"] == 0.25


def test_rows_keep_their_values_in_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": 'a "b", c', "n": 1, "tags": ["x", "y"]}, {"prompt": "ü\nz", "n": 2, "tags": []}]
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        path = tmp_path / f"rows{suffix}"
        write_files({path: Rows(rows)})
        if suffix == ".jsonl":
            found = [json.loads(line) for line in path.read_text().splitlines()]
        elif suffix == ".json":
            found = json.loads(path.read_text())
        elif suffix == ".parquet":
            found = [{**row, "tags": list(row["tags"])} for row in pd.read_parquet(path).to_dict("records")]
        else:
            table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
            found = [{**row, "tags": json.loads(row["tags"])} for row in table.to_dict("records")]
        assert found == rows
    with pytest.raises(FinetraceError, match="written as"):
        write_files({tmp_path / "rows.txt": Rows(rows)})
