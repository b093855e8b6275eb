"""The word problems: right answers, distinct problems, a fair split."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.mathqa import TEMPLATES, mathqa
from finetrace.tasks.task import Task

# the answer from the numbers of the prompt, in the order they stand there
ANSWERS: dict[str, Callable[..., Fraction | int]] = {
    "remaining-pizza": lambda slices, mine, yours: slices - mine - yours,
    "train-distance": lambda speed, hours: speed * hours,
    "shelf-price": lambda price, percent: price * Fraction(100 - percent, 100),
    "reading-pages": lambda pages, done, daily: Fraction(pages - done, daily),
    "paint-area": lambda width, height, hole: width * height - hole,
    "garden-fence": lambda length, width: length + width + length + width,
    "quiz-average": lambda *scores: Fraction(sum(scores), 4),
    "mixing-ratio": lambda concentrate, water, used: Fraction(water * used, concentrate),
    "sharing-leftovers": lambda things, people: things % people,
    "weekend-wages": lambda rate, rate2, hours, hours2: rate * hours + rate2 * hours2,
}
OPERATIONS: dict[str, Callable[[int, int], Fraction | int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": Fraction,
}


@pytest.fixture(scope="module")
def task() -> Task:
    return mathqa()


def rows_of(task: Task) -> list[Example]:
    return [*task.train, *task.queries]


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def evaluated(sum_text: str) -> Fraction | int:
    """The value of `3 x 20 / 100`, from left to right; no template mixes + or - with x or /."""
    first, *rest = sum_text.split()
    value: Fraction | int = int(first)
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATIONS[sign](value, int(operand))
    return value


@pytest.mark.parametrize("label", ANSWERS)
def test_the_answer_follows_from_the_numbers_of_the_prompt(task: Task, label: str) -> None:
    rows = [row for row in rows_of(task) if row.label == label]
    assert len(rows) == 100
    for row in rows:
        assert ANSWERS[label](*numbers(row.prompt)) == row.metadata["answer"] > 0, row.prompt


def test_every_number_a_template_can_draw_makes_a_sensible_problem() -> None:
    for template in TEMPLATES:
        for number in (0, template.capacity - 1, *range(0, template.capacity, template.capacity // 997)):
            row = template.example(number, "x")
            shown = numbers(row.prompt)
            assert ANSWERS[template.label](*shown) == row.metadata["answer"], row.prompt
            assert min(shown) >= 2, row.prompt  # "1 slices" would read badly, and so would a price of 0
            if template.label == "quiz-average":
                assert max(shown) <= 100, row.prompt


def test_every_step_of_the_reasoning_is_true(task: Task) -> None:
    for row in rows_of(task):
        steps = re.findall(r"(\d+(?: [-+x/] \d+)+) = (\d+)", row.response)
        assert len(steps) == row.response.count("=") >= 1, row.response
        for left, right in steps:
            assert evaluated(left) == int(right), row.response
        assert int(steps[-1][1]) == row.metadata["answer"], row.response


def test_every_response_ends_with_the_answer(task: Task) -> None:
    for row in rows_of(task):
        assert row.response.endswith(f", so the answer is {row.metadata['answer']}."), row.response


def test_ten_balanced_classes_split_nine_to_one(task: Task) -> None:
    assert task.name == "mathqa"
    assert task.target is None
    assert task.answered
    assert task.classes == dict.fromkeys(task.classes, 90)
    assert set(task.classes) == set(ANSWERS) == {template.label for template in TEMPLATES}
    assert Counter(query.label for query in task.queries) == dict.fromkeys(ANSWERS, 10)


def test_no_problem_and_no_id_appears_twice(task: Task) -> None:
    rows = rows_of(task)
    assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == 1000
    assert {row.id for row in rows} == {f"{label}-{index:03d}" for label in ANSWERS for index in range(100)}
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.queries}


def test_two_combinations_of_slots_never_give_the_same_prompt() -> None:
    for template in TEMPLATES:
        block = range(min(template.capacity, 2000))  # neighbours differ in a slot or two
        spread = range(0, template.capacity, max(template.capacity // 2000, 1))
        chosen = {*block, *spread}
        assert len({template.example(number, "x").prompt for number in chosen}) == len(chosen), template.label


def test_the_lengths_are_those_of_short_problems(task: Task) -> None:
    for row in rows_of(task):
        assert 20 <= len(row.prompt.split()) <= 45, row.prompt
        assert 20 <= len(row.response.split()) <= 50, row.response
        assert len(re.findall(r"[.?](?: |$)", row.response)) in (2, 3), row.response
        assert not re.search(r"\ba [aeio]|[{}]", row.prompt + row.response), row.prompt


def test_the_metadata_holds_what_was_drawn_and_can_be_saved(task: Task) -> None:
    slots = {template.label: template.slots for template in TEMPLATES}
    for row in rows_of(task):
        assert set(slots[str(row.label)]) < set(row.metadata)
        assert isinstance(row.metadata["answer"], int)
        assert json.loads(json.dumps(row.metadata)) == row.metadata


def test_the_seed_decides_everything(task: Task) -> None:
    assert mathqa(seed=0) == task
    other = mathqa(seed=1)
    assert [row.id for row in other.train] != [row.id for row in task.train]
    shared = {row.prompt for row in rows_of(other)} & {row.prompt for row in rows_of(task)}
    assert len(shared) < 50  # the smallest template has thousands of problems


@pytest.mark.parametrize(
    ("per_class", "train_share", "train", "queries"),
    [(20, 0.5, 10, 10), (10, 0.75, 8, 2), (2, 0.9, 1, 1), (5, 0.01, 1, 4), (5, 0.99, 4, 1)],
)
def test_other_sizes_leave_something_on_either_side(
    per_class: int, train_share: float, train: int, queries: int
) -> None:
    task = mathqa(per_class=per_class, train_share=train_share)
    assert task.classes == dict.fromkeys(task.classes, train)
    assert len(task.classes) == 10
    assert Counter(query.label for query in task.queries) == dict.fromkeys(ANSWERS, queries)


@pytest.mark.parametrize("per_class", [1, 0, -5, 10**9])
def test_a_class_size_that_cannot_be_is_refused(per_class: int) -> None:
    most = min(template.capacity for template in TEMPLATES)
    with pytest.raises(FinetraceError, match=rf"per_class is {per_class}; give 2 to {most}, .*\.$"):
        mathqa(per_class=per_class)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(FinetraceError, match="train_share is .*; give a share above 0 and below 1"):
        mathqa(train_share=share)
