"""How often a 95% interval over seeds and queries covers the truth: python benchmarks/interval_coverage.py.

Values are a mean, plus a normal deviation of each seed, of each query and of each pair of them; the truth is the mean.
"""

from __future__ import annotations

import argparse

import numpy as np

from finetrace.evaluation.seeds import bootstrap_crossed


def covered(seeds: int, queries: int, seed_sd: float, runs: int) -> float:
    """The share of runs whose interval holds the truth; queries and pairs have a deviation of 1."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(runs):
        values = (
            seed_sd * rng.normal(size=(seeds, 1)) + rng.normal(size=(1, queries)) + rng.normal(size=(seeds, queries))
        )
        found = bootstrap_crossed(values, resamples=1000)
        hits += found.low <= 0 <= found.high
    return hits / runs


def main() -> None:
    """Print a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    for seeds, queries, seed_sd in ((3, 30, 0.0), (3, 30, 0.1), (3, 30, 1.0), (3, 1, 1.0), (10, 30, 1.0)):
        share = covered(seeds, queries, seed_sd, args.runs)
        print(
            f"{seeds:2d} seeds, {queries:2d} queries, a seed deviates {seed_sd:.1f} as a query: {100 * share:.0f}% covered"
        )


if __name__ == "__main__":
    main()
