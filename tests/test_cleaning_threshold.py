"""How many rows the threshold of `finetrace clean` takes out where no row had to do with the answers, and where some had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetrace.cleaning.threshold import calibrated, spread, standardised


def drawn(rng: Any, n: int, answers: int, alike: float, planted: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Standardised dot products of gaussian gradients: of the rows with each other, and of answers that share a part.

    Args:
        rng: Random numbers.
        n: Rows.
        answers: Of unit variance, of which `alike` is the same for all.
        alike: 0 to 1.
        planted: The first rows have what the answers share.
    """
    rows, shared = rng.normal(size=(n, 60)), rng.normal(size=60)
    asked = np.sqrt(alike) * shared + np.sqrt(1 - alike) * rng.normal(size=(answers, 60))
    rows[:planted] += 2 * shared
    return standardised(rows @ rows.T), standardised(asked @ rows.T)


@pytest.mark.parametrize("answers", [1, 20])
@pytest.mark.parametrize(
    "alike", [0.0, pytest.param(0.2, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow), 0.9]
)
def test_as_many_rows_pass_by_chance_as_expected_however_alike_the_answers_are(answers: int, alike: float) -> None:
    """Groups of as many random rows as there are answers would let a fifth of all pass where the answers are alike."""
    rng, passed = np.random.default_rng(0), []
    for trial in range(40):
        own, scores = drawn(rng, 150, answers, alike, planted=0)
        passed.append([(scores.mean(axis=0) > calibrated(own, scores, e, trial)).sum() for e in (1.0, 6.0)])
    one, six = np.mean(passed, axis=0)
    assert 0.4 < one < 1.8
    assert 4 < six < 8.5


def test_answers_that_are_unlike_are_compared_with_as_many_rows() -> None:
    """Scores have long tails, and means of twenty have not: next to single rows none would ever pass."""
    rng, passed = np.random.default_rng(2), []
    for trial in range(30):
        own, scores = (standardised(rng.standard_t(3, size=(count, 150))) for count in (150, 20))
        passed.append((scores.mean(axis=0) > calibrated(own, scores, 1.0, trial)).sum())
    assert 0.5 < np.mean(passed) < 1.6


@pytest.mark.parametrize("rows", [12, 60])
def test_more_answers_than_rows(rows: int) -> None:
    """As many unlike rows as there are answers would leave none to compare with."""
    rng, passed = np.random.default_rng(3), []
    for trial in range(30):
        own, scores = drawn(rng, rows, 2 * rows, 0.0, planted=0)
        passed.append((scores.mean(axis=0) > calibrated(own, scores, 1.0, trial)).sum())
    assert 0.3 < np.mean(passed) < 1.8


def words(rng: Any, texts: int, shared: float) -> NDArray[Any]:
    """(texts, 600) which words each has, 8 drawn of rare and common ones, and of the same 8 with the chance `shared`."""
    chances = 1 / np.arange(1, 601) ** 0.7
    mine = rng.multinomial(8, chances / chances.sum())
    mixed = (1 - shared) * chances / chances.sum() + shared * mine / 8
    return (rng.multinomial(8, mixed, size=texts) > 0) * (np.arange(600) >= 10) * 1.0


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_words_that_answers_share_let_few_rows_pass(shared: float) -> None:
    """Most scores are 0, and means of those of fifty answers hardly spread by their median."""
    rng, passed = np.random.default_rng(5), []
    for trial in range(25):
        rows, asked = words(rng, 150, 0.0), words(rng, 50, shared)
        rarity = np.log(150 / (1 + rows.sum(axis=0)))
        own, scores = standardised(rows * rarity @ rows.T), standardised(asked * rarity @ rows.T)
        passed.append((scores.mean(axis=0) > calibrated(own, scores, 1.0, trial)).sum())
    assert np.mean(passed) < 2.5


@pytest.mark.parametrize(("planted", "answers"), [(8, 10), (30, 5), (40, 20)])
def test_rows_behind_answers_that_are_alike_pass_and_few_others(planted: int, answers: int) -> None:
    """Also where so many are that the groups which say what chance does have some of them."""
    rng = np.random.default_rng(1)
    for trial in range(6):
        own, scores = drawn(rng, 150, answers, 0.7, planted)
        found = np.flatnonzero(scores.mean(axis=0) > calibrated(own, scores, 1.0, trial))
        assert len(set(found) & set(range(planted))) >= 0.8 * planted
        assert len(set(found) - set(range(planted))) <= 3


def test_differences_of_rounding_are_none() -> None:
    """More than half of the scores are equal but for the last digit: the others' distance is not read in units of that digit."""
    rng = np.random.default_rng(2)
    scores = 0.3 + rng.uniform(-3e-9, 3e-9, 12)
    assert np.isinf(spread(scores)[1])
    scores[[2, 5]] += 0.4
    middle, deviation = spread(scores)
    assert deviation.item() == pytest.approx(1.2533 * 0.8 / 12, rel=1e-6)
    assert np.argsort(-(scores - middle) / deviation)[:2].tolist() in ([2, 5], [5, 2])
    assert spread(rng.normal(size=2000))[1].item() == pytest.approx(1, abs=0.1)
