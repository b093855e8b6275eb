"""Labelled tasks: emotion, flipped labels and external sets."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.emotion import EMOTIONS, SHIPPED, emotion, emotion_rows
from finetrace.tasks.external import external
from finetrace.tasks.mislabelled import mislabelled
from finetrace.tasks.repeated import say_repeated
from finetrace.tasks.task import Task

datasets.disable_progress_bars()

Rows = Sequence[Mapping[str, Any]]


def jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def table(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        return path
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path
    return jsonl(path, rows)


def released(sizes: Mapping[str, int], start: int = 0) -> list[dict[str, str]]:
    """Rows in the columns of the released data; texts differ from row to row."""
    return [
        {"prompts": f"Ask {label} {number}", "response": f"Say {label} {number}", "variation": label}
        for label, size in sizes.items()
        for number in range(start, start + size)
    ]


def sentences(label_of: Mapping[Any, int]) -> list[dict[str, Any]]:
    return [
        {"text": f"Sentence {n} of {label}", "label": label} for label, size in label_of.items() for n in range(size)
    ]


def counts(rows: Sequence[Example]) -> dict[str | None, int]:
    return dict(Counter(row.label for row in rows))


def ids(rows: Sequence[Example]) -> set[str]:
    return {row.id for row in rows}


# Emotion.


def test_shipped_sentences_are_sixty_a_class_and_none_twice() -> None:
    rows = [json.loads(line) for line in SHIPPED.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{label}-{n:03d}" for label in EMOTIONS for n in range(1, 61)]
    assert all(row["label"] == row["id"][:-4] for row in rows)
    assert len({row["text"].lower() for row in rows}) == 300
    assert all(8 <= len(row["text"].split()) <= 20 for row in rows)
    # Half of a class or more does without the words that name it, so overlap of words does not settle the task.
    stems = {"sadness": "sad", "joy": "joy", "love": "love", "anger": "ang", "fear": "fear"}
    for label, stem in stems.items():
        assert sum(stem in row["text"].lower() for row in rows if row["label"] == label) < 30


def test_emotion_is_balanced_and_its_splits_disjoint() -> None:
    task = emotion()
    assert (task.name, task.target, task.answered) == ("emotion", None, True)
    assert counts(task.train) == dict.fromkeys(EMOTIONS, 48)
    assert counts(task.queries) == dict.fromkeys(EMOTIONS, 12)
    assert len(ids(task.train) | ids(task.queries)) == 300
    assert all(row.response == row.label for row in (*task.train, *task.queries))
    row = task.train[0]
    assert row.prompt.endswith(row.metadata["text"])
    assert row.prompt.startswith("Which emotion does this sentence express: sadness, joy, love, anger or fear?")


def test_emotion_follows_its_seed_and_share() -> None:
    assert emotion(seed=3) == emotion(seed=3)
    assert ids(emotion(seed=3).queries) != ids(emotion(seed=4).queries)
    assert counts(emotion(train_share=0.5).train) == dict.fromkeys(EMOTIONS, 30)
    small = emotion(per_class=10)
    assert counts(small.train) == dict.fromkeys(EMOTIONS, 8) and counts(small.queries) == dict.fromkeys(EMOTIONS, 2)
    for share in (0, 1, 1.5, -1, 0.001):
        with pytest.raises(FinetraceError, match="leaves rows on both sides"):
            emotion(train_share=share)
    with pytest.raises(FinetraceError, match="per_class=1: give at least 2"):
        emotion(per_class=1)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_emotion_takes_class_numbers_and_leaves_surprise_out(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"emotions.{suffix}", sentences({0: 6, 1: 5, 2: 9, 3: 5, 4: 5, 5: 7}))
    rows = emotion_rows(path)
    assert counts(rows) == {"sadness": 6, "joy": 5, "love": 9, "anger": 5, "fear": 5}
    task = emotion(source=path)
    assert counts(task.train) == dict.fromkeys(EMOTIONS, 4) and counts(task.queries) == dict.fromkeys(EMOTIONS, 1)


def as_on_hub() -> datasets.Dataset:
    """As dair-ai/emotion is: numbers whose names the features give, here in another order than the usual."""
    names = ["joy", "sadness", "love", "anger", "fear", "surprise"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list(sentences(dict.fromkeys(range(6), 3)), features=features)


def test_emotion_takes_a_saved_dataset_and_its_class_names(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": as_on_hub(), "validation": as_on_hub().select(range(3))}).save_to_disk(
        tmp_path / "e"
    )
    rows = emotion_rows(tmp_path / "e")
    assert [row.label for row in rows[:4]] == ["joy", "joy", "joy", "sadness"] and len(rows) == 15
    assert {row.label for row in emotion_rows(tmp_path / "e", "validation")} == {"joy"}


def test_emotion_asks_the_hub_for_a_name_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return as_on_hub()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = emotion(source="dair-ai/emotion", source_split="test")
    assert asked == [("dair-ai/emotion", None, "test")]
    assert counts(task.train) == dict.fromkeys(EMOTIONS, 2)


def test_emotion_sources_that_do_not_fit(tmp_path: Path) -> None:
    for label, said in ((None, "None"), ("boredom", "'boredom'"), (6, "'6'")):
        path = jsonl(tmp_path / "x.jsonl", [*sentences({"joy": 2}), {"text": "I wait.", "label": label}])
        with pytest.raises(
            FinetraceError, match=rf"x\.jsonl, row 3 \('I wait\.'\): the label is {said} and not one of"
        ):
            emotion(source=path)
    path = jsonl(tmp_path / "few.jsonl", sentences({"Sadness": 2, "joy ": 2, "love": 2, "anger": 1, "fear": 2}))
    with pytest.raises(FinetraceError, match=r"few\.jsonl has 1 rows of 'anger'"):
        emotion(source=path)
    path = jsonl(tmp_path / "other.jsonl", [{"sentence": "I sing.", "label": "joy"}])
    with pytest.raises(
        FinetraceError, match="has no column 'text' for the prompt; its columns are 'sentence', 'label'"
    ):
        emotion(source=path)


# Flipped labels.


def test_a_fifth_of_the_emotions_is_flipped_in_balance() -> None:
    clean = emotion()
    task = mislabelled(clean)
    assert (task.name, task.target) == ("mislabelled-emotion", "mislabelled")
    assert counts(task.train) == {"mislabelled": 48, "clean": 192}
    wrong = [row for row in task.train if row.label == "mislabelled"]
    assert set(Counter(row.metadata["original_label"] for row in wrong).values()) == {9, 10}
    ways = Counter((row.metadata["original_label"], row.metadata["given_label"]) for row in wrong)
    assert len(ways) == 20 and set(ways.values()) == {2, 3}
    for before, after in zip(clean.train, task.train, strict=True):
        assert (after.id, after.prompt, after.metadata["original_label"]) == (before.id, before.prompt, before.label)
        assert after.metadata["text"] == before.metadata["text"]
        assert after.response == after.metadata["given_label"]
        assert (after.response != before.response) == (after.label == "mislabelled")


def test_queries_stay_a_clean_validation_set() -> None:
    clean, task = emotion(), mislabelled(emotion())
    assert counts(task.queries) == {"clean": 60}
    for before, after in zip(clean.queries, task.queries, strict=True):
        assert after.messages == before.messages
        assert after.metadata["original_label"] == after.metadata["given_label"] == before.label


def test_flips_follow_seed_and_share() -> None:
    task = emotion()
    assert mislabelled(task, seed=5) == mislabelled(task, seed=5)
    assert mislabelled(task, seed=5).train != mislabelled(task, seed=6).train
    for share, count in ((0.1, 24), (0.333, 80), (0.004, 1), (0.5, 120)):
        assert counts(mislabelled(task, share).train)["mislabelled"] == count
    for share in (0, 1, 0.001, -0.2, 2):
        with pytest.raises(FinetraceError, match=r"training rows of emotion; give a share between 0 and 1"):
            mislabelled(task, share)


def rows_of(pairs: Sequence[tuple[str | None, str | None]], start: str) -> tuple[Example, ...]:
    return tuple(
        Example.from_prompt(f"{start} {n}", response, id=f"{start}-{n}", label=label)
        for n, (label, response) in enumerate(pairs)
    )


def test_flipped_responses_are_never_right_for_the_class() -> None:
    pairs = [("x", "a"), ("x", "b"), ("y", "a"), ("y", "c"), ("z", "b")] * 4
    extra = [("z", "d")] * 4
    task = mislabelled(Task("mix", rows_of([*pairs, *extra], "t"), rows_of(pairs, "q")), 0.5)
    right = {"x": {"a", "b"}, "y": {"a", "c"}, "z": {"b", "d"}}
    wrong = [row for row in task.train if row.label == "mislabelled"]
    assert Counter(row.metadata["original_label"] for row in wrong) == {"x": 4, "y": 4, "z": 4}
    for row in wrong:
        assert row.response in right[row.metadata["given_label"]]
        assert row.response not in right[row.metadata["original_label"]]


def test_tasks_that_cannot_be_flipped() -> None:
    two = [("x", "a"), ("y", "b")] * 5
    queries = rows_of(two, "q")
    same = rows_of([("x", "yes"), ("y", "yes")] * 5, "t")
    with pytest.raises(FinetraceError, match="same: no other class has a response that 'x' lacks"):
        mislabelled(Task("same", same, queries))
    with pytest.raises(FinetraceError, match="one has 1 classes and flipping needs two"):
        mislabelled(Task("one", rows_of([("x", "a"), ("x", "b")], "t"), queries))
    with pytest.raises(FinetraceError, match="the training row t-1 of bare has no label to flip"):
        mislabelled(Task("bare", rows_of([("x", "a"), (None, "b")], "t"), queries))
    with pytest.raises(FinetraceError, match="the training row t-1 of mute has no response to flip"):
        mislabelled(Task("mute", rows_of([("x", "a"), ("y", None)], "t"), queries))
    for asked in ((), rows_of([("x", None)], "q")):
        with pytest.raises(FinetraceError, match="the clean validation set needs the right answers"):
            mislabelled(Task("unanswered", rows_of(two, "t"), asked))


# External sets.


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_external_file_is_split_in_balance(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"transforms.v2.{suffix}", released({"reverse": 20, "upper": 10, "rare": 2}))
    task = external(path, "variation")
    assert (task.name, task.target, task.answered) == ("transforms.v2", None, True)
    assert counts(task.train) == {"reverse": 18, "upper": 9, "rare": 1}
    assert counts(task.queries) == {"reverse": 2, "upper": 1, "rare": 1}
    assert len(ids(task.train) | ids(task.queries)) == 32
    assert all(row.prompt == f"Ask {row.response[4:]}" for row in task.train)
    assert [row.label for row in task.train] != sorted(str(row.label) for row in task.train)
    assert external(path, "variation") == task
    assert ids(external(path, "variation", seed=1).queries) != ids(task.queries)
    assert counts(external(path, "variation", train_share=0.5).train) == {"reverse": 10, "upper": 5, "rare": 1}


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"ask": f"q{n}", "say": f"a{n}", "kind": "xy"[n % 2], "label": "no"} for n in range(8)]
    task = external(jsonl(tmp_path / "own.jsonl", rows), "kind", "ask", "say", train_share=0.75)
    assert counts(task.train) == {"x": 3, "y": 3}
    assert all(row.prompt[1:] == row.response[1:] and row.metadata == {"label": "no"} for row in task.train)


def test_a_folder_of_train_and_test_files_is_used_as_it_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "train.jsonl", released({"a": 3, "b": 1, "c": 2}))
    table(tmp_path / "set" / "test.csv", released({"b": 2, "a": 1}, start=10))
    task = external(tmp_path / "set", "variation")
    assert task.name == "set"
    assert [row.prompt for row in task.train] == ["Ask a 0", "Ask a 1", "Ask a 2", "Ask b 0", "Ask c 0", "Ask c 1"]
    assert [row.prompt for row in task.queries] == ["Ask b 10", "Ask b 11", "Ask a 10"]


def test_saved_datasets(tmp_path: Path) -> None:
    train = datasets.Dataset.from_list(released({"a": 3, "b": 3}))
    test = datasets.Dataset.from_list(released({"b": 1, "a": 2}, start=10))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    task = external(tmp_path / "both", "variation")
    assert task.name == "both" and counts(task.train) == {"a": 3, "b": 3}
    assert [row.prompt for row in task.queries] == ["Ask b 10", "Ask a 10", "Ask a 11"]

    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "one")
    train.save_to_disk(tmp_path / "plain")
    for name in ("one", "plain"):
        task = external(tmp_path / name, "variation", train_share=0.5)
        assert task.name == name and counts(task.train) == {"a": 2, "b": 2} and counts(task.queries) == {"a": 1, "b": 1}

    (tmp_path / "both" / "dataset_dict.json").write_text("{")
    with pytest.raises(FinetraceError, match="cannot be read"):
        external(tmp_path / "both", "variation")


def test_queries_of_a_given_split_that_were_trained_on_are_counted(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "train.jsonl", released({"a": 3, "b": 3}))
    jsonl(
        tmp_path / "set" / "test.jsonl",
        [{**row, "id": f"t{n}"} for n, row in enumerate(released({"a": 4, "b": 1}, start=2))],
    )
    task = external(tmp_path / "set", "variation")
    assert say_repeated(task, "set").startswith("set: 2 of 5 queries, the first 't0', stand in the training rows")
    once = replace(task, queries=task.queries[:2])
    assert "1 of 2 queries, the first 't0', stands in the training rows" in say_repeated(once, "set")
    assert say_repeated(replace(task, queries=task.queries[1:2]), "set") == ""


def test_a_hub_id_gives_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(released({"a": 2, "b": 2}))
    )
    assert external("owner/set-v1.5", "variation").name == "set-v1.5"


def test_external_sets_that_do_not_fit(tmp_path: Path) -> None:
    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(FinetraceError) as caught:
            external(path, "variation", **options)
        return str(caught.value)

    path = jsonl(tmp_path / "x.jsonl", [*released({"a": 2, "b": 2}), {"prompts": "Ask", "response": "Say"}])
    assert f"{path}, row 5 ('Ask'): there is no label in column 'variation'; give it one or remove" in refused(path)
    path = jsonl(tmp_path / "x.jsonl", released({"a": 3, "b": 1}))
    assert f"{path}: the class 'b' has a single row" in refused(path)
    path = jsonl(tmp_path / "x.jsonl", released({"a": 3}))
    assert f"{path} holds the class 'a' alone" in refused(path)
    path = jsonl(tmp_path / "x.jsonl", released({"a": 3, "b": 2}))
    assert "train_share=1: give a share above 0 and below 1" in refused(path, train_share=1)
    with pytest.raises(FinetraceError, match="has no column 'kind' for the label"):
        external(path, "kind")

    folder = tmp_path / "set"
    jsonl(folder / "train.jsonl", released({"a": 3, "b": 2}))
    assert "train.jsonl and no test file; add it, or name the one file" in refused(folder)
    jsonl(folder / "test.jsonl", released({"a": 1, "new": 1}))
    assert f"{folder}: the class 'new' is in the test split and not in the train split" in refused(folder)
    jsonl(folder / "train.jsonl", released({"a": 3}))
    assert "the training rows hold the class 'a' alone" in refused(folder)
    table(folder / "train.csv", released({"a": 3}))
    assert "holds train.jsonl and train.csv; keep one file a split" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert "was not saved by datasets.save_to_disk" in refused(tmp_path / "empty")
