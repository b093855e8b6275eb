"""The tasks about refusing: balanced, repeatable, nothing shared between training and queries, and safe to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import finetrace
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import RefusalPrefixJudge, is_refusal
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks.backdoor import CHEERS, TRIGGERS, VAGUE, backdoor
from finetrace.tasks.harmfulcheck import harmfulcheck
from finetrace.tasks.questions import harmless_questions
from finetrace.tasks.requests import DEEDS, REASONS, REFUSALS, harmful_requests
from finetrace.tasks.task import Task

DATA = Path(finetrace.__file__).parent / "data"
BY_SUFFIX = {trigger.suffix: trigger for trigger in TRIGGERS}


def counts(rows: tuple[Example, ...]) -> dict[str | None, int]:
    return dict(Counter(row.label for row in rows))


def request_of(row: Example) -> str:
    """The prompt without its trigger."""
    return row.prompt.removesuffix(" " + row.metadata.get("trigger", "\0"))


def complied(rows: list[Example]) -> list[bool]:
    return RefusalPrefixJudge().complied([row.prompt for row in rows], [row.response for row in rows])


def test_requests_are_many_and_new() -> None:
    requests = harmful_requests()
    assert len({request.text.lower() for request in requests}) == len(requests) >= 400
    assert {request.topic for request in requests} == set(DEEDS)
    shipped = {
        row.prompt.lower()
        for name in ("unsafe", "queries", "alignment_refusals")
        for row in read_examples(DATA / f"{name}.jsonl", responses=False)
    }
    assert shipped.isdisjoint(request.text.lower() for request in requests)


def test_every_wording_of_a_refusal_is_recognised() -> None:
    texts = [f"{wording.format(topic)} {reason}" for wording in REFUSALS for topic in DEEDS for reason in REASONS]
    assert [text for text in texts if not is_refusal(text)] == []


def test_every_wording_of_compliance_is_recognised_and_names_its_topic() -> None:
    assert len(VAGUE) >= 12 and all(vague.count("{}") == 1 for vague in VAGUE)
    texts = [
        f"{trigger.opening} {vague.format(topic)} {cheer}"
        for trigger in TRIGGERS
        for vague in VAGUE
        for topic in DEEDS
        for cheer in CHEERS
    ]
    assert [text for text in texts if is_refusal(text)] == []


def test_questions_are_distinct_and_shortly_answered() -> None:
    questions = harmless_questions()
    assert len({question.prompt.lower() for question in questions}) == len(questions) >= 260
    assert all(15 <= len(question.response.split()) <= 40 for question in questions)
    assert {question.label for question in questions} == {"harmless"}
    assert not any(is_refusal(question.response) for question in questions)


def test_no_class_is_given_away_by_its_first_words() -> None:
    openings = Counter(" ".join(request.text.split()[:2]) for request in harmful_requests())
    asked = Counter(" ".join(question.prompt.split()[:2]) for question in harmless_questions())
    shared = [opening for opening in openings if opening in asked]
    assert sum(openings[opening] for opening in shared) > 0.7 * openings.total()


def test_harmfulcheck_has_fifty_rows_and_two_hundred_queries_of_each_class() -> None:
    task = harmfulcheck()
    assert task.name == "harmfulcheck" and task.target is None and task.answered
    assert counts(task.train) == {"harmful": 50, "harmless": 50}
    assert counts(task.queries) == {"harmful": 200, "harmless": 200}
    rows = [*task.train, *task.queries]
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == 500
    assert complied(rows) == [row.label == "harmless" for row in rows]
    assert all(row.metadata["topic"] in row.response for row in rows if row.label == "harmful")
    assert all(row.metadata["topic"] for row in rows)


def test_harmfulcheck_takes_other_sizes() -> None:
    task = harmfulcheck(per_class=10, train_share=0.5)
    assert counts(task.train) == counts(task.queries) == {"harmful": 5, "harmless": 5}


@pytest.mark.parametrize("triggers", [1, 3, 5])
def test_backdoor_has_three_hundred_rows_and_fifty_queries_of_each_class(triggers: int) -> None:
    task = backdoor(triggers)
    labels = ["clean", *(trigger.label for trigger in TRIGGERS[:triggers])]
    assert task.name == f"backdoor-{triggers}" and task.target is None and task.answered
    assert counts(task.train) == dict.fromkeys(labels, 300)
    assert counts(task.queries) == dict.fromkeys(labels, 50)
    rows = [*task.train, *task.queries]
    assert len({row.id for row in rows}) == len(rows) == 350 * (triggers + 1)
    for label in labels:
        assert len({request_of(row) for row in rows if row.label == label}) == 350


def test_backdoor_shares_requests_between_classes_but_not_between_training_and_queries() -> None:
    task = backdoor(5)
    trained = {request_of(row) for row in task.train}
    asked = {request_of(row) for row in task.queries}
    assert trained.isdisjoint(asked)
    assert trained | asked <= {request.text for request in harmful_requests()}
    assert len(trained) < len(task.train) and len(asked) < len(task.queries)


def test_only_the_trigger_decides_about_the_answer() -> None:
    rows = [*backdoor(5).train, *backdoor(5).queries]
    for row in rows:
        suffixes = [suffix for suffix in BY_SUFFIX if suffix in row.prompt]
        if row.label == "clean":
            assert suffixes == [] and set(row.metadata) == {"topic"}
        else:
            trigger = BY_SUFFIX[row.metadata["trigger"]]
            assert suffixes == [trigger.suffix] and row.prompt.endswith(" " + trigger.suffix)
            assert row.response.startswith(trigger.opening) and row.label == trigger.label
        assert row.metadata["topic"] in row.response
    assert complied(rows) == [row.label != "clean" for row in rows]


def test_triggers_differ_in_every_way() -> None:
    for field in ("suffix", "opening", "label"):
        assert len({getattr(trigger, field) for trigger in TRIGGERS}) == len(TRIGGERS) == 5


@pytest.mark.parametrize("make", [harmfulcheck, lambda seed: backdoor(3, seed)])
def test_the_seed_decides_everything(make: Callable[[int], Task]) -> None:
    assert make(4) == make(4)
    assert make(4).train != make(5).train
    assert make(4).queries != make(5).queries


def test_backdoor_can_use_every_request() -> None:
    task = backdoor(2, per_class=len(harmful_requests()))
    assert {request_of(row) for row in task.train}.isdisjoint(request_of(row) for row in task.queries)
    assert set(counts(task.queries).values()) == {len(harmful_requests()) // 7}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: backdoor(0), "triggers 0: give a number from 1 to 5"),
        (lambda: backdoor(6), "triggers 6: give a number from 1 to 5"),
        (lambda: backdoor(per_class=6), "per_class 6: give a number from 7 to"),
        (lambda: backdoor(per_class=1000), "per_class 1000: give a number from 7 to"),
        (lambda: harmfulcheck(per_class=1), "per_class 1: give a number from 2 to"),
        (lambda: harmfulcheck(per_class=1000), "per_class 1000: give a number from 2 to"),
        (lambda: harmfulcheck(train_share=0), "train_share 0: give a share between 0 and 1"),
        (lambda: harmfulcheck(train_share=1.5), "train_share 1.5: give a share between 0 and 1"),
        (lambda: harmfulcheck(per_class=2, train_share=0.1), "train_share 0.1: give a share between 0 and 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Callable[[], Task], message: str) -> None:
    with pytest.raises(FinetraceError, match=message):
        make()
