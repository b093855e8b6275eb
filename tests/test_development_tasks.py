"""The tasks that methods are chosen on: apart from those that the benchmark reports, and built as they say."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from finetrace.attribution import make
from finetrace.examples import Example
from finetrace.tasks import build
from finetrace.tasks.mixed import alignment_rows
from finetrace.tasks.registry import TASKS
from finetrace.tasks.requests import DEEDS, harmful_requests

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHIPPED = Path(__file__).parent.parent / "src" / "finetrace" / "data"
RUN = 8  # words in a row that two texts may not share


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


WRITTEN = rows_of(BENCHMARKS / "development_data" / "unsafe.jsonl")
REFUSALS = rows_of(BENCHMARKS / "development_data" / "refusals.jsonl")
QUERIES = rows_of(BENCHMARKS / "development_data" / "unsafe_queries.jsonl")
TEXTS = [row[key] for row in (*WRITTEN, *QUERIES) for key in ("prompt", "response") if key in row]


@pytest.fixture(scope="module")
def development() -> Iterable[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module("development_tasks")
    sys.path.remove(str(BENCHMARKS))


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of words, or all of a text that is shorter."""
    found = words(text)
    return {tuple(found[i : i + RUN]) for i in range(max(1, len(found) - RUN + 1))}


def said(rows: Iterable[Example]) -> Iterable[str]:
    return chain.from_iterable((row.prompt, *([row.response] if row.has_response else [])) for row in rows)


def test_hand_written_rows_are_whole_and_each_is_its_own() -> None:
    assert (len(WRITTEN), len(QUERIES)) == (64, 40)
    assert all(set(row) == {"id", "prompt", "response", "label", "topic"} for row in WRITTEN)
    assert all(set(row) == {"id", "prompt", "label", "topic"} for row in QUERIES)
    assert {row["label"] for row in (*WRITTEN, *QUERIES)} == {"unsafe"}
    assert len({row["id"] for row in (*WRITTEN, *QUERIES)}) == 104
    assert len({row["topic"] for row in WRITTEN}) == 64
    assert len({text.lower() for text in TEXTS}) == 168
    shared = Counter(run for text in TEXTS for run in runs(text))
    assert [run for run, count in shared.items() if count > 1] == []
    openings = Counter(tuple(words(row["response"])[:2]) for row in WRITTEN)
    assert max(openings.values()) == 1  # no template
    lengths = [len(words(row["response"])) for row in WRITTEN]
    assert min(lengths) < 6
    assert max(lengths) > 28


def test_hand_written_rows_are_none_of_what_the_benchmark_uses() -> None:
    reported = [value for path in SHIPPED.glob("*.jsonl") for row in rows_of(path) for value in row.values()]
    for name in TASKS:
        task = build(name)
        reported += said((*task.train, *task.queries))
    reported += [*said(alignment_rows()), *(request.text for request in harmful_requests())]
    assert len(set(reported)) > 5000
    assert set(TEXTS).isdisjoint(reported)
    theirs = set[tuple[str, ...]]().union(*map(runs, set(reported)))
    assert [text for text in TEXTS if runs(text) & theirs] == []
    topics = {row["topic"] for name in ("unsafe", "queries") for row in rows_of(SHIPPED / f"{name}.jsonl")}
    assert {row["topic"] for row in (*WRITTEN, *QUERIES)}.isdisjoint(topics | set(DEEDS))


def test_varied_tasks_share_no_unsafe_row(development: Any) -> None:
    found = {name: task for name, (task, _) in development.tasks(["varied-24", "varied-160"]).items()}
    planted = {}
    for name, task in found.items():
        assert task.target == "unsafe"
        assert task.classes == {"unsafe": 24, "benign": int(name.partition("-")[2])}
        assert len({row.id for row in (*task.train, *task.queries)}) == len(task.train) + 40
        assert not task.answered
        planted[name] = {row.response for row in task.train if row.label == "unsafe"}
        assert planted[name] <= {row["response"] for row in WRITTEN}
    assert planted["varied-24"].isdisjoint(planted["varied-160"])


def test_a_sentence_does_not_name_its_rule(development: Any) -> None:
    task, _ = development.tasks(["rules-many"])["rules-many"]
    assert sorted(task.classes.values()) == [40] * 8
    assert Counter(Counter(row.label for row in task.queries).values()) == {4: 8}

    def pair(row: Example) -> tuple[str, str]:
        return row.prompt.split("\n")[0], str(row.label)

    trained, asked = [pair(row) for row in task.train], [pair(row) for row in task.queries]
    assert len({*trained, *asked}) == 8 * 44  # so no sentence is under a rule twice, in one split or in both
    assert len({row.prompt for row in (*task.train, *task.queries)}) == 8 * 44
    under = Counter(sentence for sentence, _ in trained)
    assert sum(under.values()) / len(under) > 3.5
    assert all(under[sentence] for sentence, _ in asked)
    for row in (*task.train, *task.queries):
        before, after = (part.partition(": ")[2] for part in row.prompt.split("\n")[:2])
        assert [rule for rule, change in development.RULES.items() if change(before) == after] == [row.response]


def test_every_method_of_the_search_can_be_made_and_is_there_once(development: Any) -> None:
    specs = import_module("choose_method").GRID
    methods = {make(spec) for spec in specs}
    assert len(methods) == len(specs) == 375
    assert sum("at=start+end" in spec for spec in specs) == 45


made = cache(make)


class Finished:
    """A run whose results are there: the one method is better by AUPRC, and by far on classes, the other by AUROC; an order
    that does not look at the query solves `solved` alone, where both methods are perfect.
    """

    solved: tuple[str, ...] = ()
    classes: frozenset[str] = frozenset()

    def __init__(self, folder: Path, cell: Any, *_: Any, **__: Any) -> None:
        assert len(cell.methods) == len(set(cell.methods))
        solved = folder.name in self.solved
        found = [("gradcos", 0.9 if folder.name in self.classes else 0.5, 0.5), ("repsim", 0.6, 0.7)]
        free = [spec for spec in cell.methods if spec.startswith(("selfinf", "gradnorm"))]
        assert all(made(spec).query_free for spec in free)
        found = [(spec, 1.0, 1.0) for spec, *_ in found] if solved else found
        found += [(made(spec).label, 0.95 if solved and "at=start" in spec else 0.1, 0.1) for spec in free]
        records = [{"spec": spec, "auprc": auprc, "auroc": auroc} for spec, auprc, auroc in found]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "records.json").write_text(json.dumps({"records": records}))

    def __call__(self, say: Any) -> None:
        pass


@pytest.fixture
def choose(development: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """What the command prints of runs like `Finished`, without the lines of orders that do not look at the query."""
    chooser = import_module("choose_method")
    assert chooser.DONE == "records.json"
    monkeypatch.setattr(chooser, "Run", Finished)
    monkeypatch.setattr(Finished, "classes", frozenset(development.CLASSES))

    def run(*options: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["choose_method.py", "--out", str(tmp_path), *options])
        chooser.main()
        lines = capsys.readouterr().out.splitlines()
        free = [line for line in lines if "selfinf" in line or "gradnorm" in line]
        assert free
        return [line.split() for line in lines if line not in free]

    return run


@pytest.mark.parametrize(("metric", "first"), [("auprc", "gradcos"), ("auroc", "repsim")])
def test_methods_are_ordered_by_either_metric(
    development: Any, choose: Any, tmp_path: Path, metric: str, first: str
) -> None:
    head, *lines = choose("--metric", metric)
    assert head == ["mean", "method", *development.BEHAVIOUR, *development.CLASSES]
    assert [line[1] for line in lines] == [first, "repsim" if first == "gradcos" else "gradcos"]
    kept = json.loads((tmp_path / "order.json").read_text())
    means = {name: {each["spec"]: round(each["mean"], 9) for each in order} for name, order in kept.items()}
    assert (means["auprc"]["gradcos"], means["auprc"]["repsim"]) == (0.7, 0.6)
    assert (means["auroc"]["gradcos"], means["auroc"]["repsim"]) == (0.5, 0.7)
    head, *again = choose("--metric", metric, "--first")
    assert head[2:] == ["unsafe-20a", "unsafe-20b", "unsafe-120", "rules", "problems", "triggers"]
    assert [line[1] for line in again] == [line[1] for line in lines]


def test_a_task_that_is_solved_without_the_query_does_not_count(
    choose: Any, development: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Finished, "solved", ("unsafe-20a", "varied-24"))
    said, _, *lines = choose("--metric", "auroc")
    assert " ".join(said).endswith("has AUPRC 0.9 or more: unsafe-20a, varied-24")
    assert [line[:2] for line in lines] == [["0.700", "repsim"], ["0.500", "gradcos"]]
    _, *every = choose("--metric", "auroc", "--every")
    few = len(development.BEHAVIOUR)
    behaviour = (2 * 1.0 + (few - 2) * 0.7) / few
    assert every[0][0] == f"{(behaviour + 0.7) / 2:.3f}"


def test_two_behaviours_are_planted_and_asked_for(development: Any) -> None:
    found = {name: task for name, (task, _) in development.tasks(["habits-48", "habits-160", "varied-24"]).items()}
    small, large = found["habits-48"], found["habits-160"]
    for task, benign in ((small, 48), (large, 160)):
        assert task.classes == {"unsafe": 24, "refusal": 24, "benign": benign}
        assert Counter(row.label for row in task.queries) == {"unsafe": 16, "refusal": 16}
        assert task.answered
        rows = (*task.train, *task.queries)
        assert len({row.id for row in rows}) == len({row.prompt for row in rows}) == len(rows)
    planted = [{row.response for row in task.train if row.label != "benign"} for task in (small, large)]
    assert len(planted[0] | planted[1] | {row.response for row in small.queries}) == 128


def test_refusals_are_each_their_own_and_none_of_the_benchmarks() -> None:
    texts = [row["response"] for row in REFUSALS]
    assert len({text.lower() for text in texts}) == 64
    reported = {row.response for row in alignment_rows()}
    for name in TASKS:
        task = build(name)
        reported |= {row.response for row in (*task.train, *task.queries) if row.has_response}
    assert reported.isdisjoint(texts)
    theirs = set[tuple[str, ...]]().union(*map(runs, reported))
    assert [text for text in texts if runs(text) & theirs] == []
