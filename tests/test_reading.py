"""Reading and writing examples: every format, every guess, every error by file and row."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message, content_id
from finetrace.reading import Columns, examples_from_rows, read_examples, write_examples

datasets.disable_progress_bars()

GUESS = Columns()
AWKWARD = 'a "quote", <script>alert(1)</script>\nnext\r\nline\u2028\u2029\x85\ttab \U0001f600 é ;'
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Who?", "response": AWKWARD, "label": "good", "source": "web"},
    {"id": "b", "prompt": AWKWARD, "response": "Yes.", "label": None, "source": None},
]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CHAT = (Message("user", "hi"), Message("assistant", "hello"))


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return path


def delimited(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


def parquet(path: Path, rows: Sequence[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved(path: Path, rows: Sequence[Any]) -> Path:
    datasets.Dataset.from_list(list(rows)).save_to_disk(path)
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.JSONL": jsonl,
    "a.json": as_json,
    "lines.json": jsonl,
    "object.json": lambda path, rows: as_json(path, {"version": 1, "notes": [], "data": rows}),
    "a.csv": delimited,
    "a.tsv": delimited,
    "a.parquet": parquet,
    "saved": saved,
}


def error(data: Any, columns: Columns = GUESS, **options: Any) -> str:
    """The sentence that reading ends with; `data` is a path, or rows."""
    read = read_examples if isinstance(data, str | Path) else examples_from_rows
    with pytest.raises(FinetraceError) as caught:
        read(data, columns, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def one(row: Mapping[str, Any], columns: Columns = GUESS, *, responses: bool = True) -> Example:
    (example,) = examples_from_rows([row], columns, responses=responses)
    return example


# Formats


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    examples = read_examples(WRITERS[name](tmp_path / name, ROWS))
    assert [e.id for e in examples] == ["a", "b"]
    assert [(e.prompt, e.response) for e in examples] == [("Who?", AWKWARD), (AWKWARD, "Yes.")]
    assert [e.label for e in examples] == ["good", None]
    assert [e.metadata for e in examples] == [{"source": "web"}, {"source": None}]
    assert read_examples(str(tmp_path / name)) == examples


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_holds_conversations(tmp_path: Path, name: str) -> None:
    as_text = name.endswith((".csv", ".tsv"))
    path = WRITERS[name](tmp_path / name, [{"messages": json.dumps(TURNS) if as_text else TURNS}])
    assert [e.messages for e in read_examples(path)] == [CHAT]


def test_lines_are_counted_with_blank_ones_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "response": "r"}\r\n\r\n  \n{"prompt": "p"}\r\n')
    assert "train.jsonl, row 4: the response is empty" in error(path)
    path.write_bytes(b"\xef\xbb\xbfprompt,response\r\np,r\r\n\r\n")
    assert one({"prompt": "p", "response": "r"}) == read_examples(path.rename(tmp_path / "train.csv"))[0]


def test_csv_takes_texts_longer_than_the_modules_limit_and_leaves_that_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = delimited(tmp_path / "a.csv", [{"prompt": "p", "response": "x" * 300_000}])
    assert len(read_examples(path)[0].response) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b'{"prompt": "p", "response": "r"}\n{"prompt": \n', "a.jsonl, row 2: the line is not valid JSON"),
        ("a.jsonl", b'["p", "r"]\n', "a.jsonl, row 1: expected an object with named columns and found a list"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, row 1: the line is not valid JSON"),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": "r", "prompt": "q"}\n',
            "a.jsonl, row 2: the line is not valid JSON (the key 'prompt' stands twice in one object)",
        ),
        (
            "a.json",
            b'[{"prompt": "p", "response": "r", "source": {"a": 1, "a": 2}}]',
            "a.json is not valid JSON (the key 'a' stands twice in one object)",
        ),
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "a.jsonl is compressed with gzip; unpack it"),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n{"messages": [{"role": "user", "content": "p"}]}\n',
            "a.jsonl, row 1: there is no conversation in column 'messages', which other rows have, and a prompt in column "
            "'prompt'; write all rows in one of the two ways",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r", "weight": 0}]}\n',
            "a.jsonl, row 1: turn 2 in column 'messages' has the weight 0, and turns have none of their own; leave 'weight' "
            "out and, if only the last answer counts, take --loss-on last-turn",
        ),
        ("a.jsonl", b'{"prompt": "p",\n"x": "\xff"}', "a.jsonl, line 2: byte 22 is not valid UTF-8"),
        (
            "a.csv",
            "prompt,response\n".encode("utf-16"),
            "a.csv, line 1: byte 0 is not valid UTF-8 (it looks like UTF-16)",
        ),
        ("a.json", b'[{"prompt": "p"},\n {"prompt" 1}]', "a.json is not valid JSON (Expecting ':' delimiter: line 2"),
        ("a.json", b'{"prompt": "p"}\n{"prompt" 1}', "a.json, row 2: the line is not valid JSON"),
        ("a.json", b'[{"prompt": "p", "response": "r"}, 7]', "a.json, row 2: expected an object with named columns"),
        (
            "a.json",
            b'{"a": 1,\n"b": {"0": 2}}',
            "a.json holds an object without a list of rows (its keys are 'a', 'b')",
        ),
        ("a.json", b'"text"', "a.json holds a text where a list of objects is expected"),
        ("a.json", b'{"x": [{}], "y": [{}]}', "a.json has several splits and none is called 'train'"),
        ("a.json", b'{"data": []}', "a.json holds no rows"),
        (
            "a.json",
            b'{\n"messages": [{"role": "user", "content": "p"}]}',
            "a.json holds an object without a list of rows",
        ),
        ("a.csv", b"prompt,response\n", "a.csv holds no rows"),
        ("a.csv", b"", "a.csv holds no rows"),
        ("a.csv", b"prompt,response\np,r\np,r,s\n", "a.csv, row 2: 3 cells where the header has 2"),
        ("a.csv", b"prompt,response\np\n", "a.csv, row 1: 1 cells where the header has 2"),
        ("a.csv", b"prompt;response\np, q;r\n", "a.csv: the header is the one column 'prompt;response'"),
        ("a.tsv", b"prompt,response\np,r\n", "a.tsv: the header is the one column 'prompt,response'"),
        ("a.csv", b'prompt,response\np,r\n"p"p,r\n', "a.csv, row 2: the quoting is broken"),
        ("a.csv", b'prompt,response\np,"r\n', "a.csv, row 1: the quoting is broken"),
        ("a.csv", b"prompt,response,prompt\np,r,p\n", "a.csv names the column 'prompt' twice"),
        ("a.csv", b"prompt,response\np,\n", "a.csv, row 1: the response is empty (column 'response'); give it a text"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a Parquet file that can be read"),
        ("a.txt", b"text", "a.txt has no suffix that finetrace reads; save it as one of .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert sentence in error(path)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    assert "there is no file" in error(tmp_path / "nothing_like_it.csv")
    assert "did you mean train.jsonl?" in error(tmp_path / "trian.jsonl")
    assert "its folder" in error(tmp_path / "nowhere" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in (
        "trian.jsonl",
        "./train",
        "data/x/train",
        "notes.txt",
        "with space",
        "~nobody-here/a.jsonl",
        "x" * 5000,
    ):
        sentence = error(name)
        assert "Hub" not in sentence and name in sentence
    assert "empty" in error("")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_a_split_or_subset_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, ROWS)
    assert "without splits; leave out the split 'test'" in error(path, split="test")
    assert "only a dataset of the Hub has subsets; leave out 'en'" in error(path, subset="en")


# Datasets


def test_saved_splits(tmp_path: Path) -> None:
    def part(prompt: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": prompt, "response": "r"}])

    datasets.DatasetDict(train=part("one"), test=part("two")).save_to_disk(tmp_path / "both")
    assert read_examples(tmp_path / "both")[0].prompt == "one"
    assert read_examples(tmp_path / "both", split="test")[0].prompt == "two"
    assert "both has no split 'dev'; choose one of 'train', 'test'" in error(tmp_path / "both", split="dev")
    datasets.DatasetDict(a=part("one"), b=part("two")).save_to_disk(tmp_path / "odd")
    assert "none is called 'train'; choose one of 'a', 'b'" in error(tmp_path / "odd")
    datasets.DatasetDict(a=part("one")).save_to_disk(tmp_path / "single")
    assert read_examples(tmp_path / "single")[0].prompt == "one"
    as_json(tmp_path / "splits.json", {"train": [{"prompt": "one", "response": "r"}], "test": [{}]})
    assert read_examples(tmp_path / "splits.json")[0].prompt == "one"


def test_folders_that_are_no_saved_dataset(tmp_path: Path) -> None:
    assert "it holds no file that can be read" in error(tmp_path)
    jsonl(tmp_path / "train.jsonl", ROWS)
    assert "was not saved by datasets.save_to_disk; name one of its files: train.jsonl" in error(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert "the saved dataset" in error(tmp_path)


def test_class_labels_become_their_names(tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["good", "bad"])
    features = {"prompt": datasets.Value("string"), "response": datasets.Value("string"), "label": kinds, "kind": kinds}
    columns = {"prompt": ["a", "b", "c"], "response": ["r"] * 3, "label": [1, 0, -1], "kind": [0, 1, None]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    for examples in (
        examples_from_rows(data),
        examples_from_rows(data.with_format("numpy")),
        examples_from_rows(data.to_iterable_dataset()),
        read_examples(tmp_path / "saved"),
        read_examples(tmp_path / "a.parquet"),
    ):
        assert [e.label for e in examples] == ["bad", "good", None]
        assert [e.metadata for e in examples] == [{"kind": "good"}, {"kind": "bad"}, {"kind": None}]


def test_a_dataset_is_read_as_selected() -> None:
    data = datasets.Dataset.from_list(ROWS).select([1])
    assert [e.id for e in examples_from_rows(data)] == ["b"]
    assert "rows is one object with the keys 'train'" in error(datasets.DatasetDict(train=data))


def test_hub_names_reach_load_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None = None, *, split: str) -> datasets.Dataset:
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert len(read_examples("owner/name-v1.5")) == 2
    assert len(read_examples("squad", split="test[:10]", subset="en")) == 2
    assert calls == [("owner/name-v1.5", None, "train"), ("squad", "en", "test[:10]")]
    assert "owner/name has no column 'x' for the prompt" in error("owner/name", Columns(prompt="x"))
    assert "there is no file" in error(Path("owner/name"))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Not there."),
            "no dataset of that name open to you on the Hugging Face",
        ),
        (ConnectionError("Couldn't reach it\nat all"), "the Hugging Face Hub cannot be reached (Couldn't reach it)"),
        (ValueError("Unknown split"), "the dataset 'trains' (split 'train', subset 'en') cannot be loaded"),
        (RuntimeError(), "from the Hugging Face Hub (RuntimeError)"),
    ],
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: Exception, sentence: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "train.jsonl", ROWS)
    said = error("trains", subset="en")
    assert sentence in said
    assert ("there is no file" in said) == ("did you mean train.jsonl?" in said)


# Columns


@pytest.mark.parametrize("prompt", ["prompt", "prompts", "instruction", "question", "query", "input", "user", "GOAL "])
@pytest.mark.parametrize(
    "response", ["response", "responses", "completion", "output", "answer", "target", "Assistant", "chosen"]
)
def test_pairs_are_guessed(prompt: str, response: str) -> None:
    example = one({prompt: "p", response: "r", "other": 1})
    assert (example.prompt, example.response, example.metadata) == ("p", "r", {"other": 1})


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "Chat"])
def test_conversations_are_guessed_before_pairs(column: str) -> None:
    example = one({"prompt": "p", "response": "r", column: TURNS})
    assert (example.messages, example.metadata) == (CHAT, {"prompt": "p", "response": "r"})
    named = one({"prompt": "p", "response": "r", column: TURNS}, Columns(prompt="prompt"))
    assert (named.prompt, named.response, named.metadata) == ("p", "r", {column: TURNS})


def test_candidates_are_taken_in_order_and_the_rest_is_kept() -> None:
    row = {"question": "q", "prompt": "p", "answer": "a", "output": "o", "class": "c", "variation": "v", "uid": 7}
    example = one(row)
    assert (example.prompt, example.response, example.label, example.id) == ("p", "o", "v", "7")
    assert example.metadata == {"question": "q", "answer": "a", "class": "c"}
    example = one(row, Columns(prompt="answer", response="question", label="uid", id="class"))
    assert (example.prompt, example.response, example.label, example.id) == ("a", "q", "7", "c")


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert (one(row).prompt, one(row).metadata) == ("Add.\n\n1 2", {})
    assert one(row | {"input": ""}).prompt == one(row | {"input": None}).prompt == "Add."
    assert one(row | {"question": "q"}, Columns(prompt="question")).metadata == {"instruction": "Add.", "input": "1 2"}


def test_sharegpt_and_old_style_columns_of_turns() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "GPT", "value": "hello"}]
    expected = (Message("system", "s"), *CHAT)
    assert one({"conversations": turns}).messages == expected
    assert one({"conversations": turns[1:], "system": "s"}).messages == expected
    assert one({"conversations": turns, "system": "other"}).metadata == {"system": "other"}
    by_column = {key: [turn[key] for turn in turns] for key in ("from", "value")}
    assert one({"conversations": by_column}).messages == expected


def test_trl_conversational_pairs() -> None:
    assert one({"prompt": TURNS[:1], "completion": TURNS[1:]}).messages == CHAT
    assert one({"prompt": "hi", "completion": TURNS[1:]}).messages == CHAT
    assert one({"prompt": TURNS[:1], "completion": "hello"}).messages == CHAT
    assert one({"prompt": "hi", "chosen": TURNS, "rejected": "no"}).messages == CHAT


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert one({"messages": [TURNS[0], {"role": "assistant", "content": parts}]}).messages == CHAT


@pytest.mark.parametrize(
    ("label", "text"),
    [("x", "x"), (0, "0"), (True, "True"), (0.5, "0.5"), (None, None), ("", None), (float("nan"), None)],
)
def test_labels_are_text(label: Any, text: str | None) -> None:
    assert one({"prompt": "p", "response": "r", "label": label}).label == text


def test_metadata_is_what_json_can_say() -> None:
    class Opaque:
        pass

    values = {
        "date": datetime.date(2024, 1, 2),
        "time": datetime.datetime(2024, 1, 2, 3, 4),
        "bytes": b"\x00\xff",
        "nan": float("nan"),
        "inf": float("inf"),
        "decimal": decimal.Decimal("1.50"),
        "pair": (1, {2: None}),
        "opaque": Opaque(),
    }
    metadata = one({"prompt": "p", "response": "r", **values}).metadata
    assert json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    assert metadata["pair"] == [1, {"2": None}]
    assert metadata["opaque"] == "<Opaque>"
    assert list(metadata.values())[:6] == ["2024-01-02", "2024-01-02T03:04:00", "AP8=", None, "inf", "1.50"]


def test_columns_that_do_not_exist_or_are_not_found() -> None:
    row = {"text": "p", "reply": "r"}
    assert "rows has no column 'txt' for the prompt; its columns are 'text', 'reply'" in error(
        [row], Columns(prompt="txt")
    )
    assert "rows has no column 'x' for the label" in error([row], Columns(label="x"))
    sentence = error([row])
    assert "rows has no column known to hold the prompt; its columns are 'text', 'reply'" in sentence
    for flag in ("prompt", "response", "messages", "label", "id"):
        assert f"--{flag}-column" in sentence
    assert "no column known to hold the response" in error([row], Columns(prompt="text"))
    assert "not both" in error([row], Columns(messages="text", prompt="text"))
    assert one(row, Columns(prompt="text", response="reply")).response == "r"
    assert one(row, Columns(prompt="text"), responses=False).messages == (Message("user", "p"),)


# Rows


def said(turns: Any) -> dict[str, Any]:
    return {"messages": turns}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": "p", "response": " "},
            "the response is empty (column 'response'); give it a text or remove the row",
        ),
        ({"prompt": "p", "response": None}, "the response is empty (column 'response')"),
        ({"prompt": "p", "response": []}, "the response is empty (column 'response')"),
        ({"prompt": "", "response": "r"}, "the prompt is empty (column 'prompt')"),
        ({"response": "r"}, "the prompt is empty (column 'prompt')"),
        ({"prompt": "p", "response": 3}, "column 'response' holds a number where text is expected"),
        ({"prompt": True, "response": "r"}, "column 'prompt' holds true or false where text is expected"),
        ({"prompt": {"a": 1}, "response": "r"}, "column 'prompt' holds an object where text is expected"),
        ({"prompt": ["a"], "response": "r"}, "turn 1 in column 'prompt' is not a message"),
        (
            {"prompt": "p", "response": TURNS[:1]},
            "the conversation in column 'response' ends with a turn of the user, not of the assistant",
        ),
        ({"prompt": "p", "response": "r", "label": [1]}, "column 'label' holds a list or an object"),
        ({"prompt": "p", "response": "\ud83d"}, "column 'response': character 1 is half of a surrogate pair"),
        ({"prompt": "p", "response": "r", "x": {"y": ["\ud83d"]}}, "column 'x': character 1 is half of a surrogate"),
    ],
)
def test_rows_that_say_too_little(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"prompt": "p", "response": "r", "label": 1}, row]))
    assert f"train.jsonl, row 2: {sentence}" in error(path)


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        (TURNS[:1], "the conversation in column 'messages' ends with a turn of the user, not of the assistant"),
        (TURNS[1:], "the prompt is empty (column 'messages')"),
        ([], "the prompt is empty (column 'messages')"),
        (None, "the prompt is empty (column 'messages')"),
        ([*TURNS[:1], {"role": "assistant", "content": " "}], "the response is empty (column 'messages')"),
        ([{"role": "wizard", "content": "x"}], "turn 1 in column 'messages' has the unknown role 'wizard'"),
        ([TURNS[0], {"role": "assistant", "content": None}], "turn 2 in column 'messages' has no 'content'"),
        ([{"role": "user", "content": 5}], "turn 1 in column 'messages' holds a number where text is expected"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "holds a part of the kind 'image_url', and only text"),
        ([{"role": "user", "content": ["x"]}], "holds a part of the kind 'str', and only text"),
        ([TURNS[0], TURNS[1] | {"tool_calls": [{}]}], "turn 2 in column 'messages' holds 'tool_calls', and only plain"),
        (["hi"], "turn 1 in column 'messages' is not a message"),
        ("['hi']", "column 'messages' holds text that is not the JSON of a list of messages"),
        ({"role": "user"}, "column 'messages' does not hold a list of messages"),
        ('["\\ud83d"]', "column 'messages' holds text that is not the JSON"),
    ],
)
def test_conversations_that_cannot_be_read(tmp_path: Path, turns: Any, sentence: str) -> None:
    path = jsonl(tmp_path / "train.jsonl", [said(TURNS), said(TURNS), said(turns)])
    assert "train.jsonl, row 3: " in (text := error(path))
    assert sentence in text


def test_queries_need_no_response() -> None:
    assert one({"prompt": "p"}, responses=False).messages == (Message("user", "p"),)
    assert one({"prompt": "p", "response": ""}, responses=False).messages == (Message("user", "p"),)
    assert one({"prompt": "p", "response": "r"}, responses=False).response == "r"
    assert one(said(TURNS[:1]), responses=False).messages == CHAT[:1]
    assert one(said(TURNS), responses=False).messages == CHAT
    assert "row 1: the prompt is empty" in error([{"prompt": ""}], responses=False)


def test_rows_nested_too_deeply() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert "rows, row 1: column 'y' is nested too deeply" in error([{"prompt": "p", "response": "r", "y": deep}])


# Ids


def test_given_ids_have_to_differ(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r"}
    path = jsonl(tmp_path / "train.jsonl", [row | {"id": 1}, row | {"id": 2}, row | {"id": "1"}])
    assert "train.jsonl, row 3: the id '1' is already that of row 1" in error(path)
    example = Example.from_prompt("p", "r", id="x")
    assert "rows, row 2: the id 'x' is already that of row 1" in error([example, example])


def test_derived_ids_are_made_unique_in_order() -> None:
    row = {"prompt": "p", "response": "r"}
    base = content_id((Message("user", "p"), Message("assistant", "r")))
    assert [e.id for e in examples_from_rows([row] * 3)] == [base, f"{base}-2", f"{base}-3"]
    taken = [row, row | {"id": f"{base}-2"}, row, row | {"id": ""}]
    assert [e.id for e in examples_from_rows(taken)] == [base, f"{base}-2", f"{base}-3", f"{base}-4"]
    assert [e.id for e in examples_from_rows([row | {"id": base}, row])] == [base, f"{base}-2"]
    assert [e.id for e in examples_from_rows([Example.from_prompt("p", "r")] * 2)] == [base, f"{base}-2"]


def test_examples_pass_through() -> None:
    examples = [Example.from_prompt("p", "r", id="x", label="l", metadata={"k": 1}), Example.from_prompt("p", "s")]
    assert examples_from_rows(examples) == examples
    assert examples_from_rows(iter(examples)) == examples
    assert "rows, row 1: the response is empty" in error([Example.from_prompt("p")])
    assert examples_from_rows([Example.from_prompt("p")], responses=False) == [Example.from_prompt("p")]
    assert "mine, row 2: expected an object" in error([{"prompt": "p"}, examples[0]], source="mine")
    assert "rows holds no rows" in error([])


# Writing


def test_pairs_are_written_as_such_and_conversations_whole(tmp_path: Path) -> None:
    write_examples(tmp_path / "new" / "a.jsonl", [Example.from_prompt("p", "r", id="x", label="l", metadata={"k": 1})])
    text = (tmp_path / "new" / "a.jsonl").read_text()
    assert text == '{"id": "x", "prompt": "p", "response": "r", "label": "l", "k": 1}\n'
    write_examples(tmp_path / "b.jsonl", [Example("x", (Message("system", "s"), *CHAT))])
    assert json.loads((tmp_path / "b.jsonl").read_text())["messages"][0] == {"role": "system", "content": "s"}


def test_writing_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, example = tmp_path / "a.jsonl", Example.from_prompt("p", "r")
    path.write_text("mine")
    with pytest.raises(FinetraceError, match=r"a\.jsonl exists already"):
        write_examples(path, [example])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(FinetraceError, match="cannot be written"):
        write_examples(path, [example], overwrite=True)
    assert path.read_text() == "mine"
    monkeypatch.undo()
    write_examples(path, [example], overwrite=True)
    assert read_examples(path) == [example]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ([Example.from_prompt("p", "r", id="x")] * 2, "row 2: the id 'x' is already that of row 1"),
        ([Example(" ", CHAT)], "row 1: the example has an empty id"),
        (
            [Example("x", (Message("user", "p"), Message("assistant", "\ud83d")))],
            "row 1: character 1 is half of a surrogate pair",
        ),
    ],
)
def test_examples_that_cannot_be_kept(tmp_path: Path, examples: list[Example], sentence: str) -> None:
    with pytest.raises(FinetraceError, match=sentence):
        write_examples(tmp_path / "a.jsonl", examples)
    with pytest.raises(FinetraceError, match="suffix"):
        write_examples(tmp_path / "a.csv", [])
    assert not list(tmp_path.iterdir())


TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from([AWKWARD, "\u2028", "[]", "null"])
SAID = TEXT.filter(lambda text: bool(text.strip()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
# Names that reading gives a meaning to, as metadata: the hard case.
KEYS = TEXT | st.sampled_from(
    ["id", "ID", "prompt", "Prompt", "response", "messages", "Chat", "label", "class", "system", "input", "metadata"]
)
PAIR = st.tuples(SAID, SAID).map(lambda pair: (Message("user", pair[0]), Message("assistant", pair[1])))
QUERY = SAID.map(lambda text: (Message("user", text),))
TURN = st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT)
TALK = st.tuples(st.lists(TURN, max_size=3), SAID, TEXT).map(
    lambda parts: (*parts[0], Message("user", parts[1]), Message("assistant", parts[2]))
)


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    talks = draw(st.sampled_from([PAIR, PAIR | QUERY, PAIR | QUERY | TALK]))
    labels = draw(st.sampled_from([st.none(), st.none() | SAID]))
    ids = draw(st.lists(SAID, min_size=1, max_size=4, unique=True))
    return [Example(id, draw(talks), draw(labels), draw(st.dictionaries(KEYS, JSON, max_size=3))) for id in ids]


@settings(max_examples=150, deadline=None)
@given(examples=example_lists())
def test_what_is_written_is_read_back(examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "identity.jsonl"
    write_examples(path, examples, overwrite=True)
    assert read_examples(path, responses=False) == examples
    if all(example.has_response for example in examples):
        assert read_examples(path) == examples


def test_importing_is_cheap() -> None:
    code = (
        "import sys, finetrace.reading; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_guessed_column_of_objects_is_no_label(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {n}", "response": "r", "category": {"x": n == 0}} for n in range(2)]
    path = tmp_path / "beavertails.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    read = read_examples(path)
    assert [row.label for row in read] == [None, None]
    assert read[0].metadata == {"category": {"x": True}}
    with pytest.raises(FinetraceError, match="column 'category' holds a list or an object"):
        read_examples(path, Columns(label="category"))


def test_a_frame_is_not_taken_for_rows() -> None:
    with pytest.raises(FinetraceError, match=r"rows is a DataFrame .* pass frame\.to_dict\('records'\)"):
        examples_from_rows(pandas.DataFrame([{"prompt": "p", "response": "r"}]))


def test_a_weight_of_one_says_nothing_new() -> None:
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r", "weight": 1}]
    assert one({"messages": turns}).response == "r"
