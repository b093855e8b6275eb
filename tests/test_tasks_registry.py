"""Every registered task: balanced, repeatable, and nothing shared between training rows and queries."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.reading import read_examples, write_examples
from finetrace.tasks import TASKS, Task, build, recipe

SIZES = (1, 0.2)
FIXED = {"mixed-small", "mixed-large"}  # what ships, whatever the seed
UNEVEN = {  # planted rows are fewer than the others, by design
    "mixed-large": {"unsafe": 20, "benign": 240},
    "mislabelled": {"mislabelled": 48, "clean": 192},
}
EVERY = [pytest.param(name, size, id=f"{name} at {size}") for name in TASKS for size in SIZES]

DIGESTS = """
import hashlib
from finetrace.tasks import TASKS, build
for name in TASKS:
    print(name, hashlib.sha256(repr(build(name, size=0.2, seed=3)).encode()).hexdigest())
"""


def counts(rows: Sequence[Example]) -> dict[str | None, int]:
    return dict(Counter(row.label for row in rows))


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_training_rows_have_all_they_need(name: str, size: float) -> None:
    task = build(name, size=size)
    assert task.train and task.queries
    assert all(row.has_response and row.label and row.prompt.strip() for row in task.train)
    assert all(query.label and query.prompt.strip() for query in task.queries)
    assert task.answered == (name not in FIXED)
    assert task.target is None or task.target in task.classes


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_every_query_asks_for_a_class_that_is_trained_on(name: str, size: float) -> None:
    task = build(name, size=size)
    assert {query.label for query in task.queries} <= {row.label for row in task.train}
    if task.target is None:
        assert {query.label for query in task.queries} == {row.label for row in task.train}
    elif name in FIXED:
        assert {query.label for query in task.queries} == {task.target}


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_ids_and_prompts_occur_once(name: str, size: float) -> None:
    task = build(name, size=size)
    rows = [*task.train, *task.queries]
    assert len({row.id for row in rows}) == len(rows)
    assert len({row.prompt for row in rows}) == len(rows)
    assert len({" ".join(row.prompt.lower().split()) for row in rows}) == len(rows)


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_balanced(name: str) -> None:
    task = build(name)
    assert name in UNEVEN or len(set(counts(task.train).values())) == 1
    assert len(set(counts(task.queries).values())) == 1
    assert counts(task.train) == UNEVEN.get(name, counts(task.train))


@pytest.mark.parametrize("size", [0.2, 0.5, 1e-9])
@pytest.mark.parametrize("name", TASKS)
def test_a_smaller_task_keeps_the_same_share_of_every_class(name: str, size: float) -> None:
    whole, small = build(name), build(name, size=size)
    assert (small.name, small.target) == (whole.name, whole.target)
    for before, after in ((whole.train, small.train), (whole.queries, small.queries)):
        assert counts(after) == {label: math.ceil(size * n - 1e-9) or 1 for label, n in counts(before).items()}
        assert [row for row in before if row in after] == list(after), "the rows kept are the same, in the same order"


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_the_same_seed_gives_the_same_task(name: str, size: float) -> None:
    assert build(name, size=size, seed=3) == build(name, size=size, seed=3)
    other: Task = build(name, size=size, seed=4)
    assert (other == build(name, size=size, seed=3)) == (name in FIXED)


def test_another_process_builds_the_same_tasks() -> None:
    """Nothing hangs on the order of a set."""
    digests = [f"{name} {hashlib.sha256(repr(build(name, size=0.2, seed=3)).encode()).hexdigest()}" for name in TASKS]
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    there = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, check=True, capture_output=True, text=True)
    assert there.stdout.splitlines() == digests


@pytest.mark.parametrize("name", TASKS)
def test_a_file_gives_back_what_was_built(name: str, tmp_path) -> None:
    task = build(name, size=0.2)
    write_examples(tmp_path / "train.jsonl", task.train)
    write_examples(tmp_path / "queries.jsonl", task.queries)
    assert tuple(read_examples(tmp_path / "train.jsonl")) == task.train
    assert tuple(read_examples(tmp_path / "queries.jsonl", responses=False)) == task.queries


@pytest.mark.parametrize("name", TASKS)
def test_the_line_of_a_task_says_its_sizes(name: str) -> None:
    made = recipe(name)
    assert made.what and len(made.what.splitlines()) == 1
    if said := re.search(r"(\d+) \+ (\d+)$", made.what):
        task = build(name)
        assert (len(task.train), len(task.queries)) == (int(said[1]), int(said[2]))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    for look in (recipe, build):
        with pytest.raises(FinetraceError, match="grammar: no such task; there are mixed-small, .*mislabelled"):
            look("grammar")


@pytest.mark.parametrize("size", [0, -0.1, 1.01, 20, math.nan, math.inf])
def test_a_size_that_is_no_share_is_refused(size: float) -> None:
    with pytest.raises(FinetraceError, match="--size .*: give a share above 0 and at most 1"):
        build("emotion", size=size)
