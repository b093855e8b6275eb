"""The work with dattri's library for language models, dattri-llm (https://github.com/TRAIS-Lab/dattri-llm).

`TracInAttributor` and `EKFACAttributor` on an `AttributionTask`; the hooks find the adapter's matrices by themselves, since
nothing else is trainable. Its EK-FAC takes the labels of the data, so that the work with labels drawn from the model is none of
its own. Damping is relative, 0.1 of a block's mean eigenvalue.

As documented: rows padded to the longest of all (a data set's items are stacked as they are), batches of 8, its default, in
the order of the data. Gradients are written to disk by `cache` (collection) and scored by `attribute_from_cache` (scoring);
EK-FAC is the one call `attribute`, which runs the model in each of its passes (all of it scoring). In bfloat16 its argument
`bf16`, which is autocast over a float32 model.

Tuned: rows sorted by length and batches cut to their longest row inside the loss, batches of about 2,048 tokens, the vocabulary
projection at the positions of the loss alone (the loss is the user's to write), hooks that spare the gradient of the weights
(`invasive_linear_io`), gradients multiplied out (`capture_style`) and kept in memory, so that one pass over rows and queries
serves everything; in bfloat16 the base model is loaded in it and no autocast is used.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch
from common import DAMPING, Job, Meter, Row
from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig, TracInAttributor
from dattri_llm.utils.hashing import hash_sample
from losses import Batch, batch_rows, by_length, load, loss, padded
from torch import Tensor, nn

DOCUMENTED = ["batches of 8 in the order of the data", "padded to the longest row of all", "defaults"]
TUNED = [
    "rows sorted by length",
    "batches of about 2,048 tokens",
    "logits at the response alone",
    "invasive_linear_io",
    "gradients multiplied out and kept in memory",
]


def items(rows: list[Row]) -> list[Batch]:
    """A data set: rows padded to one length."""
    whole = padded(rows)
    return [{name: values[i] for name, values in whole.items()} for i in range(len(rows))]


def cut(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch without the padding that no row of it needs."""
    longest = int(batch["attention_mask"].sum(1).max())
    return loss(model, {name: values[:, :longest] for name, values in batch.items()}, gather=True)


def ordered(score: Any, rows: list[Row], queries: list[Row]) -> np.ndarray[Any, Any]:
    """(queries, rows) scores in the order of ours; dattri knows rows by a hash of their tokens."""
    train_ids, matrix = score.agnostic_matrix()
    places = [train_ids.index(hash_sample({"input_ids": row.input_ids})) for row in rows]
    columns = [score.test_ids.index(hash_sample({"input_ids": row.input_ids})) for row in queries]
    return matrix.float().numpy()[places][:, columns].T


def main() -> None:
    """One job."""
    job = Job.parse(__doc__)
    if job.work == "ekfac":
        job.cannot("its EK-FAC takes the labels of the data, never labels drawn from the model")
    autocast = job.dtype == "bfloat16" and not job.tuned
    model = load(job, job.dtype if job.tuned else "float32", trainable=True)
    rows = [job.rows[i] for i in by_length(job.rows)] if job.tuned else job.rows
    train, test = items(rows), items(job.queries)
    task = AttributionTask(loss_func=cut if job.tuned else partial(loss), model=model)
    hooks = HookManagerConfig(invasive_linear_io=[r"lora_[AB]\."], capture_style="materialized") if job.tuned else None
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        args = AttributionArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_rows(rows, 2048) if job.tuned else 8,
            per_device_eval_batch_size=len(test) if job.tuned else 8,
            use_cpu=True,
            bf16=autocast,
        )
        torch.manual_seed(0)
        score = (gradients if job.work == "gradients" else ekfac)(args, task, train, test, hooks, meter)
        job.save(
            meter,
            ordered(score, job.rows, job.queries),
            TUNED if job.tuned else DOCUMENTED,
            ("dattri", "dattri-llm"),
        )


def gradients(args: Any, task: Any, train: Any, test: Any, hooks: Any, meter: Meter) -> Any:
    """On disk and then scored, or, tuned, in memory by one call."""
    attributor = TracInAttributor(args, task=task)
    if hooks is not None:
        with meter.stage("scoring"):
            return attributor.attribute(train, test, hook_config=hooks, gradient_cache_residency="memory")
    with meter.stage("collection"):
        ((train_folder, test_folder),) = attributor.cache(train, test)
    with meter.stage("scoring"):
        return attributor.attribute_from_cache(train_folder, test_folder)


def ekfac(args: Any, task: Any, train: Any, test: Any, hooks: Any, meter: Meter) -> Any:
    """One call: the model run in each of three passes, or, tuned, in one whose gradients are kept in memory."""
    kept = None if hooks is None else "memory"
    with meter.stage("scoring"):
        return EKFACAttributor(args, task=task).attribute(
            train, test, hook_config=hooks, damping=DAMPING, relative_damping=True, gradient_cache_residency=kept
        )


if __name__ == "__main__":
    main()
