"""The page of a finished benchmark."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("embedded", "the embedded SmolLM2-135M-Instruct, one small model"),
        ("embedded-aligned", "the embedded SmolLM2-135M-Instruct, one small model"),
        ("org/other", "org/other"),
    ],
)
@pytest.mark.parametrize(
    ("resumed", "words"),
    [
        ([False, False], "2 seeds; 12 s, 12 s, everything included."),
        ([True, False], "2 seeds; resumed, 12 s, everything included."),
        ([True, True], "2 seeds; resumed, so no time is known."),
        (None, "2 seeds; times are left out, since the machine had other work."),
    ],
)
def test_the_page_says_how_long_it_took(tmp_path, monkeypatch, resumed, words, base, model):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = import_module("publish_benchmark")
    monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    folder = tmp_path / "bench"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "summary-corrected.md").write_text("| method |\n")
    (folder / "tables" / "emotion-corrected.md").write_text(
        "| method | hub \\| | sec |\n|---|---|---|\n| a | b | 0.12 |\n"
    )
    record = {"task": "emotion", "protocol": "corrected", "seeds": 2, "n_train": 15, "n_queries": "5"}
    (folder / "results.json").write_text(json.dumps({"records": [record]}))
    for seed, again in enumerate(resumed or [False, False]):
        cell = folder / "emotion" / "corrected" / f"seed-{seed}"
        cell.mkdir(parents=True)
        config = {"task": "emotion", "protocol": "corrected"}
        (cell / "records.json").write_text(
            json.dumps({"config": config, "base": base, "resumed": again, "seconds": 12.3})
        )
    options = ["--title", "A page", "--about", "What it shows.", "--command", "finetrace bench emotion"]
    asked = ["publish_benchmark.py", str(folder), "page", *options]
    monkeypatch.setattr(sys, "argv", [*asked, *(["--untimed"] if resumed is None else [])])
    script.main()
    lines = (tmp_path / "docs" / "page.md").read_text().splitlines()
    assert lines[:6] == ["# A page", "", "What it shows.", "", "```bash", "finetrace bench emotion"]
    assert f"Every number is of {model}." in lines
    assert f"15 rows, 5 queries, {words}" in lines
    timed = resumed is not None
    assert ("| method | hub \\| | sec |" in lines) is timed and ("| a | b | 0.12 |" in lines) is timed
    assert ("| method | hub \\| |" in lines and "|---|---|" in lines and "| a | b |" in lines) is not timed


@pytest.mark.parametrize(
    ("count", "words"), [(1, "1 query"), ("1", "1 query"), (15, "15 queries"), ("7 to 10", "7 to 10 queries")]
)
def test_queries_are_counted_in_words(monkeypatch, count, words):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    assert import_module("publish_benchmark")._queries(count) == words
