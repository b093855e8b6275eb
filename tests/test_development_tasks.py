"""The tasks that methods are chosen on: apart from those that the benchmark reports, and built as they say."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
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


@pytest.mark.parametrize(("metric", "first"), [("auprc", "gradcos"), ("auroc", "repsim")])
def test_methods_are_ordered_by_either_metric(
    development: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    first: str,
) -> None:
    chooser = import_module("choose_method")

    class Finished:
        """A run whose results are there: the one method is better by AUPRC, and by far on classes, the other by AUROC."""

        def __init__(self, folder: Path, *_: Any, **__: Any) -> None:
            classes = folder.name in development.CLASSES
            found = [("gradcos", 0.9 if classes else 0.5, 0.5), ("repsim", 0.6, 0.7)]
            found += [(make(spec).label, 0.1, 0.1) for spec in chooser.QUERY_FREE]
            records = [{"spec": spec, "auprc": auprc, "auroc": auroc} for spec, auprc, auroc in found]
            folder.mkdir(parents=True)
            (folder / chooser.DONE).write_text(json.dumps({"records": records}))

        def __call__(self, say: Any) -> None:
            pass

    monkeypatch.setattr(chooser, "Run", Finished)
    monkeypatch.setattr(sys, "argv", ["choose_method.py", "--out", str(tmp_path), "--metric", metric])
    chooser.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["mean", *development.BEHAVIOUR, *development.CLASSES]
    assert [line.split()[-1] for line in lines] == [first, "repsim" if first == "gradcos" else "gradcos"]
    kept = json.loads((tmp_path / "order.json").read_text())
    assert {name: [round(each["mean"], 9) for each in order] for name, order in kept.items()} == {
        "auprc": [0.7, 0.6],
        "auroc": [0.7, 0.5],
    }
    monkeypatch.setattr(
        sys, "argv", ["choose_method.py", "--out", str(tmp_path / "first"), "--metric", metric, "--first"]
    )
    chooser.main()
    head, *again = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == ["unsafe-20a", "unsafe-20b", "unsafe-120", "rules", "problems", "triggers"]
    assert [line.split()[-1] for line in again] == [line.split()[-1] for line in lines]
