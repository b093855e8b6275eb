"""How many rows the threshold of `finetrace clean` takes out: python benchmarks/clean_threshold.py.

150 rows and 1, 5 or 20 answers that share half of what they are, made up: gradients of 60 normal entries; their cosines where
all have a direction in common, each as much as it likes; rows of two equal kinds; words. None of the rows is behind the
answers, or those are that have what the answers share. Answers without a word that counts are drawn again.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.cleaning.threshold import calibrated, standardised

ROWS, ENTRIES, ALIKE = 150, 60, 0.5
Scores = tuple[NDArray[Any], NDArray[Any]]


def normal(rng: Any, answers: int, behind: int, kinds: float = 0.0, common: float = 0.0) -> Scores:
    """Inner products, or with something in common cosines, of the rows with each other and with the answers."""
    shared = rng.normal(size=ENTRIES)
    rows = rng.normal(size=(ROWS, ENTRIES))
    rows += kinds * rng.normal(size=(2, ENTRIES))[rng.integers(0, 2, ROWS)]
    rows[:behind] += shared
    asked = np.sqrt(ALIKE) * shared + np.sqrt(1 - ALIKE) * rng.normal(size=(answers, ENTRIES))
    asked = asked + kinds * rng.normal(size=ENTRIES)
    if common:
        direction = common * rng.normal(size=ENTRIES)
        rows, asked = (each + direction * rng.gamma(1, 1, size=(len(each), 1)) for each in (rows, asked))
        rows, asked = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, asked))
    return rows @ rows.T, asked @ rows.T


def words(rng: Any, answers: int, behind: int) -> Scores:
    """Of each text which of 600 words it has, eight of them drawn, rarer ones counting more; without the ten most common."""
    chances = 1 / np.arange(1, 601) ** 0.7
    chances /= chances.sum()
    mine = (1 - ALIKE) * chances + ALIKE * rng.multinomial(8, chances) / 8
    texts = [rng.multinomial(8, mine if row < behind else chances) for row in range(ROWS)]
    rows, asked = (
        (np.array(each) > 0) * (np.arange(600) >= 10) for each in (texts, rng.multinomial(8, mine, size=answers))
    )
    rarity = np.log(ROWS / (1 + rows.sum(axis=0)))
    return rows * rarity @ rows.T, asked * rarity @ rows.T


KINDS: dict[str, Any] = {
    "nothing in common": normal,
    "a direction in common, cosines": partial(normal, common=1.5),
    "two equal kinds of rows": partial(normal, kinds=0.7),
    "words": words,
}


def main() -> None:
    """A line a kind and number of answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    runs = parser.parse_args().runs
    for kind, make in KINDS.items():
        for answers in (1, 5, 20):
            said = []
            for behind in (0, 8, 30):
                rng, found = np.random.default_rng(0), []
                for run in range(runs):
                    own, scores = map(standardised, make(rng, answers, behind))
                    while not scores.any():
                        own, scores = map(standardised, make(rng, answers, behind))
                    passed = scores.mean(axis=0) > calibrated(own, scores, 1.0, run)
                    found.append((passed[:behind].sum(), passed[behind:].sum()))
                right, wrong = np.mean(found, axis=0)
                said.append(f"{right:.1f} of {behind} and {wrong:.1f} others" if behind else f"{wrong:.1f} by chance")
            print(f"{kind}; answers: {answers}; " + "; ".join(said))


if __name__ == "__main__":
    main()
