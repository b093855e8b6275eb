"""The work with kronfluence (https://github.com/pomonam/kronfluence).

Its Analyzer does all of it: `fit_all_factors` (collection), then `compute_pairwise_scores`, which takes the queries' gradients,
preconditions them and goes over the rows once more (scoring). Without a curvature (strategy `identity`) there is nothing to
collect: gradients are multiplied as they come and none is kept.

As documented: batches of 8 in the order of the data, as its language-model examples have it, the whole sequence through the
vocabulary projection, defaults otherwise; in bfloat16 its `all_low_precision` arguments, which is autocast over a float32
model. Damping is its heuristic for language models (0.1 of the mean eigenvalue). All queries are one batch, since a second
batch of them would be a second pass over the rows.

Tuned: rows sorted by length, batches of about 2,048 tokens, the vocabulary projection at the positions of the loss alone (the
task's loss is the user's to write), eigendecomposition in float32 in place of float64; in bfloat16 the base model is loaded in
it and no autocast is used, so what kronfluence computes itself stays in float32.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from common import Job, Meter
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from kronfluence.utils.dataset import DataLoaderKwargs
from losses import Batch, batch_rows, by_length, load, loss, padded
from torch import Tensor, nn

DOCUMENTED = ["batches of 8 in the order of the data", "defaults"]
TUNED = [
    "rows sorted by length",
    "batches of about 2,048 tokens",
    "logits at the response alone",
    "eigendecomposition in float32",
]


class Response(Task):
    """The mean loss of a row's response, for rows and queries alike."""

    def __init__(self, modules: list[str], gather: bool) -> None:
        self.modules = modules
        self.gather = gather

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """The training loss, or that of labels drawn from the model."""
        return loss(model, batch, sample=sample, gather=self.gather)

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """What is asked about: the query's loss."""
        return loss(model, batch, gather=self.gather)

    def get_influence_tracked_modules(self) -> list[str]:
        """The matrices A and B."""
        return self.modules

    def get_attention_mask(self, batch: Batch) -> Tensor:
        """Padding is in no covariance."""
        return batch["attention_mask"]


def arguments(job: Job) -> tuple[FactorArguments, ScoreArguments]:
    """Of the work in its precision."""
    strategy = "identity" if job.work == "gradients" else "ekfac"
    if job.dtype == "bfloat16" and not job.tuned:
        factors = all_low_precision_factor_arguments(strategy=strategy, dtype=torch.bfloat16)
        scores = all_low_precision_score_arguments(damping_factor=None, dtype=torch.bfloat16)
    else:
        factors, scores = FactorArguments(strategy=strategy), ScoreArguments(damping_factor=None)
    factors.use_empirical_fisher = job.work == "ekfac-data"
    if job.tuned:
        factors.eigendecomposition_dtype = torch.float32
    return factors, scores


def main() -> None:
    """One job."""
    job = Job.parse(__doc__)
    model = load(job, job.dtype if job.tuned else "float32")
    names = [name for name, _ in model.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]
    task = Response(names, job.tuned)
    model = prepare_model(model, task)
    order = by_length(job.rows) if job.tuned else list(range(len(job.rows)))
    rows: Any = [job.rows[i] for i in order]
    size = batch_rows(rows, 2048) if job.tuned else 8
    factor_args, score_args = arguments(job)
    torch.manual_seed(0)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
        with meter.stage("collection"):
            analyzer.fit_all_factors("factors", rows, per_device_batch_size=size, factor_args=factor_args)
        with meter.stage("scoring"):
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=job.queries,
                train_dataset=rows,
                per_device_query_batch_size=len(job.queries),
                per_device_train_batch_size=size,
                score_args=score_args,
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
    scores = np.empty_like(found)
    scores[:, order] = found
    job.save(meter, scores, TUNED if job.tuned else DOCUMENTED, ("kronfluence",))


if __name__ == "__main__":
    main()
