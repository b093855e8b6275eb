"""What tables in the terminal show of data: nothing that moves the cursor, and ids that tell rows apart."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from commands import run, tuned_index
from finetrace.attribution import available
from finetrace.attribution.scores import Top
from finetrace.examples import Example
from finetrace.reading import write_examples
from finetrace.reporting.cells import names
from finetrace.reporting.tables import print_top
from tiny import make_examples

RED = "\x1b[31m"


def shown(ids: list[str], width: int, labels: list[str] | None = None) -> list[str]:
    """The lines of a table of examples with these ids."""
    examples = [
        Example.from_prompt("a long prompt " * 9, "a long response " * 9, id=id_, label=label)
        for id_, label in zip(ids, labels or [None] * len(ids), strict=True)
    ]
    n = len(ids)
    scores: Any = SimpleNamespace(train=examples)
    top = Top(scores, np.arange(n)[None], np.linspace(12.5, 1.5e-5, n)[None], "proponent")
    console = Console(file=io.StringIO(), width=width)
    print_top(top, 0, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("label", ["", "harmful-instructions-of-another-kind"])
@pytest.mark.parametrize("length", [3, 17, 36, 70])
def test_rows_have_ids_that_tell_them_apart_within_the_terminal(width: int, label: str, length: int) -> None:
    ids = ["x" * (length - 3) + f"{i:03d}" for i in range(12)]
    lines = shown(ids, width, [label] * 12 if label else None)
    assert max(map(len, lines)) <= width
    assert all(any(id_[-3:] in line for line in lines) for id_ in ids)
    if length <= 17:
        assert all(any(f" {id_} " in line for line in lines) for id_ in ids)


def test_texts_take_what_the_other_columns_leave() -> None:
    lines = shown(["e0", "e1"], 80, ["benign", "mislabelled"])
    assert sum(line.rstrip().endswith("…") and len(line.rstrip()) == 79 for line in lines) == 4
    assert any("label" in line for line in lines)


def test_ids_that_differ_where_they_would_be_cut_are_whole() -> None:
    ids = ["x" * 40 + f"{i}" + "y" * 40 for i in range(3)]
    assert names(ids, 20) == ids
    text = "".join("".join(shown(ids, 80)).split())
    assert all(f"x{i}y" in text for i in range(3))


@pytest.mark.parametrize("width", [60, 80])
def test_a_method_is_explained_within_the_terminal(width: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in available():
        code, out, err = run(capsys, "methods", name)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= width
        assert "".join((inspect.getdoc(available()[name]) or "").split()) in "".join(out.split())


def test_control_characters_of_data_stay_out_of_the_terminal(tmp_path: Path, capsys: Any) -> None:
    rows = [
        Example.from_prompt(f"{RED}{e.prompt}", f"{e.response}\x07", id=f"r{i}{RED}\nrow", label=f"l{RED}\nx")
        for i, e in enumerate(make_examples(6))
    ]
    write_examples(tmp_path / "train.jsonl", rows)
    index = tuned_index(tmp_path, tmp_path / "train.jsonl", epochs=1) / "idx"
    asked = ["--index", index, "--method", "gradcos"]
    code, out, err = run(capsys, "trace", "--queries", tmp_path / "train.jsonl", *asked, "--top", 2)
    assert code == 0, err
    assert "asked: " in out
    assert not {"\x1b", "\x07"} & {*out, *err}
    files = ["--kept", tmp_path / "kept.jsonl", "--removed", tmp_path / "removed.jsonl"]
    code, out, err = run(capsys, "clean", "--bad", tmp_path / "train.jsonl", *asked, "--top", 2, *files)
    assert code == 0, err
    assert not {"\x1b", "\x07"} & {*out, *err}
