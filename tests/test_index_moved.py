"""What an index says where its base model was moved or its adapter damaged, and that it mends the index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commands import run, tuned_index
from finetrace.reading import write_examples
from tiny import make_examples

AGAIN = "run finetrace index on {} again, with the same data and"


def test_a_moved_base_and_a_cut_adapter_are_mended_by_what_is_said(tmp_path: Path, capsys: Any) -> None:
    write_examples(tmp_path / "train.jsonl", make_examples(6))
    tuned_index(tmp_path, tmp_path / "train.jsonl", epochs=1)
    index = tmp_path / "idx"
    trace = ["trace", "--index", index, "--ask", "q", "--answer", "a", "--method", "gradcos"]
    build = ["index", tmp_path / "train.jsonl", "--adapter", tmp_path / "adapter", "--out", index, "--model"]
    assert run(capsys, *trace)[0] == 0

    collected = [path.stat().st_mtime_ns for path in (index / "shards").iterdir()]
    (tmp_path / "base").rename(tmp_path / "moved")
    code, _, err = run(capsys, *trace)
    assert code == 2
    assert f"{AGAIN.format(index)} adapter and the new place as --model" in err
    assert run(capsys, *build, tmp_path / "moved")[0] == 0
    assert run(capsys, *trace)[0] == 0

    weights = index / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run(capsys, *trace)
    assert code == 2
    assert f"{AGAIN.format(index)} the adapter" in err
    assert "--model" not in err
    assert run(capsys, *build, tmp_path / "moved")[0] == 0
    assert run(capsys, *trace)[0] == 0
    assert [path.stat().st_mtime_ns for path in (index / "shards").iterdir()] == collected  # nothing anew
