"""How many rows the threshold of `finetrace clean` takes out where no row had to do with the answers, and where some had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetrace.cleaning.threshold import calibrated, spread


def z(scores: NDArray[Any]) -> NDArray[Any]:
    middle, deviation = spread(scores)
    return np.asarray((scores - middle) / deviation)


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
    return z(rows @ rows.T), z(asked @ rows.T)


@pytest.mark.parametrize("answers", [1, 20])
@pytest.mark.parametrize("alike", [0.0, 0.2, 0.5, 0.9])
def test_as_many_rows_pass_by_chance_as_expected_however_alike_the_answers_are(answers: int, alike: float) -> None:
    """Groups of random rows alone would let 20% of all pass where the answers are alike."""
    rng, passed = np.random.default_rng(0), []
    for trial in range(40):
        own, scores = drawn(rng, 150, answers, alike, planted=0)
        passed.append([(scores.mean(axis=0) > calibrated(own, scores, e, trial)).sum() for e in (1.0, 6.0)])
    one, six = np.mean(passed, axis=0)
    assert 0.4 < one < 1.8
    assert 4 < six < 8.5


def test_rows_behind_answers_that_are_alike_pass_and_few_others() -> None:
    rng = np.random.default_rng(1)
    for trial in range(10):
        own, scores = drawn(rng, 150, 10, 0.7, planted=8)
        found = np.flatnonzero(scores.mean(axis=0) > calibrated(own, scores, 1.0, trial))
        assert set(range(8)) <= set(found)
        assert len(found) <= 12


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
