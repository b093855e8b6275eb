"""A line of the benchmark's tables: one method on one task under one protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetrace.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Row:
    """A method on a task under a protocol, over all seeds.

    Attributes:
        task, protocol: Where.
        spec, title, control: The method.
        metrics: Mean over seeds and queries with its interval over both; empty where there was nothing to trace.
        beats_lexical: Paired difference of AUPRC to the task's best lexical search, on the seeds that both have.
        seconds: Mean over seeds.
        hub, hub_share: The training example ranked first most often in most seeds, and its share of queries, mean over seeds.
        seeds, n_train: How many.
        n_queries: How many, or the least and the most where seeds differ: `18 to 20`.
    """

    task: str
    protocol: str
    spec: str
    title: str
    control: bool
    metrics: dict[str, Estimate]
    beats_lexical: Estimate | None
    seconds: float
    hub: str
    hub_share: float
    seeds: int
    n_train: int
    n_queries: str

    def record(self) -> dict[str, Any]:
        """Flat, for results.json."""
        values: dict[str, Any] = {}
        for name, estimate in self.metrics.items():
            values |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        gap = self.beats_lexical
        if gap is not None:
            values |= {"auprc_over_lexical": gap.value}
            values |= {"auprc_over_lexical_low": gap.low, "auprc_over_lexical_high": gap.high}
        about = ("task", "protocol", "spec", "title", "control", "hub", "hub_share", "seeds", "n_train", "n_queries")
        known = {key: value if value == value else None for key, value in values.items()}  # JSON has no NaN
        return {**{key: getattr(self, key) for key in about}, **known, "seconds": self.seconds}
