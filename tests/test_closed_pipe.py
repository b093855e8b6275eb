"""A reader that goes, as `head` does, ends a command quietly; what was to be written is written before."""

from __future__ import annotations

import subprocess
import sys

import pytest

from commands import tuned_index
from finetrace.reading import write_examples
from tiny import make_examples


def closed(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command whose standard output nobody reads."""
    command = [sys.executable, "-m", "finetrace", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        return process.wait(), said


@pytest.mark.parametrize("format", ["table", "csv"])
def test_trace_writes_its_files_though_nobody_reads_its_tables(tmp_path, format):
    data = tmp_path / "train.jsonl"
    write_examples(data, make_examples(6))
    index = tuned_index(tmp_path, data, epochs=1) / "idx"
    paths = [tmp_path / "ranked.json", tmp_path / "scores.csv", tmp_path / "page.html"]
    files = [word for pair in zip(("--out", "--scores", "--report"), paths, strict=True) for word in pair]
    code, said = closed("trace", "--index", index, "--queries", data, "--method", "bm25", "--format", format, *files)
    assert code == 1
    assert said.splitlines() == [f"ranked rows: {paths[0]}", f"report: {paths[2]}"]
    assert all(path.exists() for path in paths)


def test_short_output_that_nobody_reads_is_no_error_message():
    assert closed("methods", "bm25") == (1, "")
