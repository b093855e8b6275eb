"""What decides one run of the benchmark, and the files it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from finetrace.models import DType

DONE, QUERIES, SCORES = "records.json", "queries.parquet", "scores.safetensors"


@dataclass(frozen=True)
class Cell:
    """What decides one run of the benchmark; kept beside its results, and compared before they are used again."""

    task: str
    protocol: str
    seed: int
    size: float
    task_seed: int
    methods: tuple[str, ...]
    model: str | None = None
    epochs: int | None = None
    dtype: DType = "auto"
    device: str = "auto"
    chat_template: str | None = None
    target_modules: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Its place in the benchmark's folder."""
        return f"{self.task}/{self.protocol}/seed-{self.seed}"

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task}, {self.protocol}, seed {self.seed}"
