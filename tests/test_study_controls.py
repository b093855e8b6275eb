"""Controls of the studies: the same numbers as through an index, over the queries that a study asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetrace.attribution import Problem, make
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.runner import task_of
from finetrace.encoding import Encoder
from finetrace.evaluation.metrics import evaluate, relevance
from finetrace.index import build_index
from finetrace.studies.cells import Prepared, scored
from finetrace.studies.controls import BOTH, PROMPTS, control_line, controls, table
from finetrace.studies.plots import panels


def cell(task: str, protocol: str = "corrected", size: float = 0.05, seed: int = 0) -> Cell:
    return Cell(task, protocol, seed, size, 0, (), None, None, "float64", "cpu")


def asked(of: Cell, count: int) -> pd.DataFrame:
    """A study's frame that has the first queries alone, some of them twice."""
    ids = [query.id for query in task_of(of, None)[0].queries[:count]]
    return pd.DataFrame({"task": of.task, "protocol": of.protocol, "seed": of.seed, "query": ids * 2})


def test_they_are_what_the_methods_say_through_an_index(tiny_loaded: Any, tmp_path: Path) -> None:
    of = cell("emotion")
    task, _ = task_of(of, None)
    queries = task.queries[:3]
    index, _ = build_index(tiny_loaded, task.train, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    problem = Problem(index, queries)
    found = {r["spec"]: r for r in controls([of], asked(of, 3))}
    assert set(found) == {make(spec).label for spec in (*PROMPTS, *BOTH)}
    relevant = relevance(index.rows.labels, [query.label for query in queries])
    for spec, record in found.items():
        whole = evaluate(make(spec).score(problem).values, relevant)
        assert record["n_queries"] == 3
        for metric in ("accuracy", "coverage", "auprc"):
            assert record[metric] == pytest.approx(whole[metric].value)


def test_random_scores_are_others_in_every_seed(tiny_loaded: Any, tmp_path: Path) -> None:
    cells = [cell("emotion", seed=seed) for seed in range(3)]
    frame = pd.concat([asked(of, 3) for of in cells])
    found = next(r for r in controls(cells, frame) if r["spec"] == "random")
    task, _ = task_of(cells[0], None)
    index, _ = build_index(tiny_loaded, task.train, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    problem = Problem(index, task.queries[:3])
    relevant = relevance(index.rows.labels, [query.label for query in problem.queries])
    prepared = [Prepared(of, tmp_path, problem, relevant) for of in cells]
    means = [float(scored(each, ["random"])["auprc"].mean()) for each in prepared]
    assert len(set(means)) == 3
    assert found["auprc"] == pytest.approx(sum(means) / 3)
    chosen = [scored(each, ["random:seed=9"])["auprc"].tolist() for each in prepared]
    assert chosen[0] == chosen[1] == chosen[2]


def test_words_of_an_answer_that_the_model_gives_are_not_looked_at() -> None:
    of = cell("mixed-small", size=0.5)
    found = controls([of], asked(of, 4))
    assert [r["spec"] for r in found] == [make(spec).label for spec in PROMPTS]
    heads, lines = table(found)
    assert {len(line) for line in lines} == {len(heads)}
    assert {line[3] for line in lines} == {"4"}
    assert controls([of], asked(of, 0)) == []


def test_a_figure_has_the_strongest_words_that_are_known() -> None:
    both = [
        {"task": "t", "protocol": "p", "spec": spec, "coverage": value}
        for spec, value in (("bm25:text=prompt", 0.2), ("bm25", 0.7))
    ]
    for records, height in ((both, 70), (both[:1], 20)):
        _, [axis] = panels(1)
        control_line(axis, records, "t", "p", "coverage")
        [drawn] = axis.get_lines()
        assert list(drawn.get_ydata()) == pytest.approx([height, height])
        control_line(axis, records, "t", "p", "spearman")  # a metric that controls do not have
        control_line(axis, records, "other", "p", "coverage")
        assert len(axis.get_lines()) == 1
