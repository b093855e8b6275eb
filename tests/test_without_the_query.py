"""`benchmarks/without_the_query.py` and `by_opening.py`: what is left of a result without the query, and by the answers' openings."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetrace.examples import Example
from finetrace.reading import write_examples

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterable[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("without_the_query")
    sys.path.remove(str(BENCHMARKS))


def test_others_is_the_mean_of_all_queries_but_one(script: Any) -> None:
    scores = np.random.default_rng(0).normal(size=(5, 7)) * np.arange(1, 6)[:, None]
    z = np.stack([(row - row.mean()) / row.std() for row in scores])
    expected = np.stack([np.delete(z, q, axis=0).mean(axis=0) for q in range(5)])
    assert np.allclose(script.others(scores), expected, atol=1e-12)
    assert np.isfinite(script.others(np.ones((3, 4)))).all()


def test_the_rule_looks_at_the_first_sentence_alone(script: Any) -> None:
    answers = {"Sure! It is easy.": 1, "It is easy. Sure!": 0, "Wow!": 1, "No? Yes!": 0, "Fine": 0}
    rows = [Example.from_prompt("p", answer, id=str(i)) for i, answer in enumerate(answers)]
    assert script.exclaims(rows).tolist() == list(answers.values())


def test_a_method_that_looks_at_the_query_loses_its_scores_where_queries_differ(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`repsim` ranks the rows of each query's class first, `gradnorm:at=start` those of one class whatever is asked."""
    labels = ["a"] * 3 + ["b"] * 3
    for task, asked in (("classes", "abab"), ("planted", "aaaa")):
        folder = tmp_path / task / "corrected" / "seed-0"
        folder.mkdir(parents=True)
        rows = [Example.from_prompt(f"p{i}", "r", id=f"r{i}", label=label) for i, label in enumerate(labels)]
        queries = [Example.from_prompt(f"q{i}", "r", id=f"q{i}", label=label) for i, label in enumerate(asked)]
        write_examples(folder / "train.jsonl", rows)
        write_examples(folder / "queries.jsonl", queries)
        same = np.array([[float(label == of) for label in labels] for of in asked], dtype=np.float32)
        size = np.tile(np.array([3, 2, 1, 0, 0, 0], dtype=np.float32), (4, 1))
        save_file({"repsim": same, "gradnorm:at=start": size}, folder / "scores.safetensors")
    monkeypatch.setattr(sys, "argv", ["without_the_query.py", str(tmp_path)])
    script.main()
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("classes", "planted")):
            task = line.split(",")[0]
        elif line.strip().startswith(("repsim", "gradnorm")):
            name, *values = line.replace("|", " ").split()
            found[task, name] = [float(value) for value in values]
    assert found["classes", "repsim"][:4] == [1, 1, 1, 1]
    assert found["classes", "repsim"][6] == 0  # AUROC by the others: two of three ask for the other class
    assert found["planted", "repsim"] == [1] * 8
    assert found["planted", "gradnorm:at=start"] == [1] * 8
    assert found["classes", "gradnorm:at=start"][2] == 0.5


def test_answers_open_alike_where_a_row_of_their_own_class_does(script: Any) -> None:
    opening = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    relevant = np.array([[True, False, False]] * 3)
    assert import_module("by_opening").alike(opening, relevant).tolist() == [True, False, False]
