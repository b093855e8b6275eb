"""How often a 95% interval over seeds and queries covers the truth: python benchmarks/interval_coverage.py.

Values are a mean, plus a normal deviation of each seed, of each query and of each pair of them; the truth is the mean. Where
seeds are alike, as of words alone, there is none of seeds and pairs.
Then how often one of two methods that are alike is called better over a few queries, which 2.5% is meant to be.
"""

from __future__ import annotations

import argparse

import numpy as np

from finetrace.evaluation.intervals import paired_difference
from finetrace.evaluation.seeds import bootstrap_crossed


def covered(seeds: int, queries: int, seed_sd: float, runs: int, pair_sd: float = 1.0) -> float:
    """The share of runs whose interval holds the truth; queries have a deviation of 1."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(runs):
        values = (
            seed_sd * rng.normal(size=(seeds, 1))
            + rng.normal(size=(1, queries))
            + pair_sd * rng.normal(size=(seeds, queries))
        )
        found = bootstrap_crossed(values, resamples=1000)
        hits += found.low <= 0 <= found.high
    return hits / runs


def called_better(queries: int, runs: int) -> float:
    """The share of paired comparisons that favour the first of two methods whose metric is drawn alike, crowded at 1."""
    rng = np.random.default_rng(0)
    pairs = (rng.beta(3, 0.5, size=(2, queries)) for _ in range(runs))
    return sum(paired_difference(*pair, resamples=1000).low > 0 for pair in pairs) / runs


def main() -> None:
    """Print a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    twos = [(2, 30, 0.0), (2, 30, 0.1), (2, 30, 1.0), (2, 1, 1.0)]
    for seeds, queries, seed_sd in (*twos, (3, 30, 0.0), (3, 30, 0.1), (3, 30, 1.0), (3, 1, 1.0), (10, 30, 1.0)):
        share = covered(seeds, queries, seed_sd, args.runs)
        print(
            f"{seeds:2d} seeds, {queries:2d} queries, a seed deviates {seed_sd:.1f} as a query: {100 * share:.0f}% covered"
        )
    for queries in (5, 10, 30):
        share = covered(3, queries, 0.0, args.runs, pair_sd=0.0)
        print(f" 3 seeds, {queries:2d} queries, all seeds alike: {100 * share:.0f}% covered")
    for queries in (6, 10, 30):
        share = called_better(queries, args.runs)
        print(
            f"{queries:2d} queries, two methods that are alike: the first is called better {100 * share:.1f}% of the time"
        )


if __name__ == "__main__":
    main()
