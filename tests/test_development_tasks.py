"""The tasks that methods are chosen on: apart from those that the benchmark reports, and built as they say."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

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
