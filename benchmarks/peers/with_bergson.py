"""The work with bergson (https://github.com/EleutherAI/bergson), by the commands of its command line.

Gradients: `build` writes an index of the rows (collection); the queries get one too, and an `Attributor` over the first
searches for all of its rows (scoring). EK-FAC: `hessian` with eigenvalue correction (collection), then `build` of the queries
and `score`, which preconditions them and goes over the rows once more (scoring). Damping is its default, 0.1 of the mean
eigenvalue. Every command loads the model; that time is left out, as the other tools load it before the clock starts. Batches
are formed by length under a budget of tokens in both configurations, and every token goes through the vocabulary projection:
the forward pass is bergson's own.

As documented: its defaults (batches of 2,048 tokens). Tuned: batches of 1,024 tokens, whose logits are half as large, attention
without a fused kernel, and all queries preconditioned at once.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import bergson.build
import bergson.hessians.hessian_approximations
import bergson.score.score
import numpy as np
import torch
from bergson import Attributor, DataConfig, IndexConfig, PreprocessConfig, ScoreConfig, load_gradients
from bergson.cli.commands import Build, Hessian, Score
from bergson.config.config import HessianConfig, InversionConfig
from bergson.data import column_offsets, load_scores
from common import DAMPING, Job, Meter, Row
from datasets import Dataset, disable_progress_bars

DOCUMENTED = ["batches of 2,048 tokens", "defaults"]
TUNED = ["batches of 1,024 tokens", "eager attention", "queries preconditioned at once"]


def write(rows: list[Row], folder: Path) -> str:
    """The rows as a data set with token ids, which bergson takes as they are."""
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    Dataset.from_dict(columns).save_to_disk(str(folder))
    return str(folder)


def leave_out_loading(meter: Meter) -> None:
    """Take the loading of the model out of the measured time of each command."""
    for module in (bergson.build, bergson.hessians.hessian_approximations, bergson.score.score):
        original = module.setup_model_and_peft

        def load(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            with meter.aside():
                return original(*args, **kwargs)

        module.setup_model_and_peft = load


class Commands:
    """The configuration that the commands of one job share."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.rows, self.queries = write(job.rows, folder / "rows"), write(job.queries, folder / "queries")
        self.inversion = InversionConfig(
            damping_factor=DAMPING, apply_batch_size=len(job.queries) if job.tuned else InversionConfig.apply_batch_size
        )

    def index(self, name: str, data: str) -> IndexConfig:
        """Where a command writes, and what it reads."""
        tuned: dict[str, Any] = {"token_batch_size": 1024, "model_kwargs": "attn_implementation=eager"}
        return IndexConfig(
            run_path=str(self.folder / name),
            model=str(self.job.adapter),
            tokenizer=str(self.job.model),
            precision="bf16" if self.job.dtype == "bfloat16" else "fp32",
            data=DataConfig(dataset=data),
            loss_reduction="mean",
            **(tuned if self.job.tuned else {}),
        )

    def gradients(self, meter: Meter) -> np.ndarray[Any, Any]:
        """Two indexes and a search."""
        with meter.stage("collection"):
            Build(self.index("index", self.rows), PreprocessConfig()).execute()
        with meter.stage("scoring"):
            Build(self.index("query", self.queries), PreprocessConfig()).execute()
            stored = load_gradients(self.folder / "query")
            sizes = json.loads((self.folder / "query" / "info.json").read_text())["grad_sizes"]
            wide = torch.from_numpy(np.asarray(stored).astype(np.float32))
            queries = {name: wide[:, lo:hi] for name, (lo, hi) in column_offsets(sizes).items()}
            values, places = Attributor(self.folder / "index").search(queries, k=None)
            scores = torch.empty_like(values).scatter_(1, places, values)
        return scores.numpy()

    def ekfac(self, meter: Meter) -> np.ndarray[Any, Any]:
        """Factors, then queries and scores."""
        labels = self.job.work == "ekfac-data"
        with meter.stage("collection"):
            hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=labels)
            Hessian(hessian, self.index("hessian", self.rows)).execute()
        with meter.stage("scoring"):
            Build(self.index("query", self.queries), PreprocessConfig()).execute()
            applied = PreprocessConfig(
                hessian_path=str(self.folder / "hessian"), ev_correction=True, inversion_cfg=self.inversion
            )
            scoring = ScoreConfig(query_path=str(self.folder / "query"))
            Score(scoring, self.index("scores", self.rows), applied).execute()
            scores = np.asarray(load_scores(self.folder / "scores")[:])
        return scores.T


def main() -> None:
    """One job."""
    job = Job.parse(__doc__)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    disable_progress_bars()
    meter = Meter()
    leave_out_loading(meter)
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(job, Path(folder))
        scores = commands.gradients(meter) if job.work == "gradients" else commands.ekfac(meter)
    job.save(meter, scores, TUNED if job.tuned else DOCUMENTED, ("bergson",))


if __name__ == "__main__":
    main()
