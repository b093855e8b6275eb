"""How long retrainings will take, from a few steps that are timed before them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoded
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import new_adapter
from finetrace.models import Loaded
from finetrace.training import fit

STEPS = 2  # timed, after as many to warm up


def forecast(
    loaded: Loaded,
    rows: Sequence[Encoded],
    measured: Mapping[str, Sequence[Encoded]],
    config: FinetuneConfig,
    sizes: Sequence[int],
) -> float:
    """Seconds of training on so many rows each and measuring the losses of the queries, one after another in this process.

    Rows from all over the training set are trained on for `STEPS` steps; a row is taken to cost the same in every epoch. The
    model is left as it was.

    Args:
        loaded: The base, without an adapter.
        rows: The training set, encoded.
        measured: What losses are measured of, by name.
        config: How it is fine-tuned.
        sizes: Rows of each retraining.
    """
    count = min(len(rows), STEPS * config.batch_size)
    some = [rows[len(rows) * k // count] for k in range(count)]
    short = config.model_copy(update={"epochs": 1, "validation": 0.0})
    model = new_adapter(loaded, short)
    try:
        fit(model, some, short)
        learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
        began = time.perf_counter()
        fit(model, some, short)
        trained = time.perf_counter()
        for items in measured.values():
            mean_losses(model, items, learnt=learnt).tolist()
        done = time.perf_counter()
    finally:
        loaded.model = model.unload()
    return sum(sizes) * config.epochs * (trained - began) / count + len(sizes) * (done - trained)
