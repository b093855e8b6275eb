"""Tail patch: one optimizer step on what a method names, and how much likelier the answer becomes.

Chang et al., TrackStar (arXiv 2410.17413), section 5.1: a method's top k rows are good proponents if a training step on them,
taken at the trained model, raises the probability of the query's answer more than a step on other rows does. The step here is
the first one of Adam with a fresh state, on the mean of the rows' own losses without dropout. An index holds each row's
gradient, so a step needs no backward pass. Losses are those of the model in float32: a step may change them by less than half
precision rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetrace.collection.losses import mean_losses
from finetrace.collection.precision import widened
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index.store import Index
from finetrace.index.views import view
from finetrace.progress import Tracker

EPSILON = 1e-8  # Adam's


def tail_patch(
    index: Index,
    queries: Sequence[Example],
    scores: Mapping[str, NDArray[Any]],
    count: int = 10,
    learning_rate: float = 1e-4,
) -> dict[str, NDArray[np.float64]]:
    """By method, (m,) fall of each query's mean response loss (nats a token) after a step on its top rows.

    Positive: the answer became likelier.

    Args:
        index: Of the fine-tuned model, with the loss on what training used.
        queries: Each with a response.
        scores: By method, (m, n).
        count: How many rows the step is taken on.
        learning_rate: Of the step; each weight moves by about so much.

    Raises:
        FinetraceError: The index holds fewer rows than `count`, or weights are stored the other way round or not in memory.
    """
    index = view(index, index.manifest.encoding.loss_on, at="end")  # the step is from the trained adapter
    if not 0 < count <= len(index):
        raise FinetraceError(f"a step on {count} of {len(index)} rows cannot be taken; give 1 to {len(index)}.")
    loaded = index.model()
    weights = _weights(loaded.model, index)
    encoded, _ = index.encoder("response").encode_all(queries)  # whatever the index's own loss is on, as in retraining
    found: dict[str, NDArray[np.float64]] = {name: np.empty(len(queries)) for name in scores}
    known: dict[tuple[int, frozenset[int]], float] = {}
    steps = len(scores) * len(queries)
    with widened(loaded.model), Tracker("tail patch", steps, "steps") as tracker:
        before = [float(mean_losses(loaded.model, [each])[0]) for each in encoded]
        for name, values in scores.items():
            for q in range(len(queries)):
                top = np.argsort(-np.asarray(values[q], dtype=np.float64), kind="stable")[:count]
                key = (q, frozenset(top.tolist()))
                if key not in known:
                    step = _adam(_mean_gradient(index, top), learning_rate)
                    with _moved(weights, step):
                        known[key] = before[q] - float(mean_losses(loaded.model, [encoded[q]])[0])
                found[name][q] = known[key]
                tracker.advance(1)
    return found


def refuse_projected(index: Index) -> None:
    """Raise `FinetraceError` where an index does not hold whole gradients."""
    if any(block.original is not None for block in index.blocks):
        raise FinetraceError(
            f"{index.folder}: a tail patch moves the weights along whole gradients, and these are projected "
            f"({index.manifest.projection}); ask for other measures (--measure lds --measure drop), or build the index with "
            "--projection none."
        )


def _weights(model: nn.Module, index: Index) -> list[tuple[nn.Parameter, slice]]:
    """The tracked weights, and their columns in a row of gradients."""
    refuse_projected(index)
    tracking = index.manifest.track(model)
    found = []
    for layer in tracking.layers:
        if layer.transposed:
            raise FinetraceError(
                "a tail patch of layers stored the other way round (Conv1D) is not built; use LoRA matrices."
            )
        found.append((layer.module.get_parameter("weight"), layer.weight.columns))
        if layer.bias is not None:
            found.append((layer.module.get_parameter("bias"), layer.bias.columns))
    return found


def _mean_gradient(index: Index, rows: NDArray[np.intp]) -> Tensor:
    """(D,) mean of some rows' gradients, float64."""
    parts = [index.gradients(slice(None), slice(int(row), int(row) + 1))[0].double() for row in rows]
    return torch.stack(parts).mean(0)


def _adam(gradient: Tensor, learning_rate: float) -> Tensor:
    """The first step of Adam: moments over their own bias corrections are g and g^2."""
    return -learning_rate * gradient / (gradient.abs() + EPSILON)


@contextmanager
def _moved(weights: Sequence[tuple[nn.Parameter, slice]], step: Tensor) -> Iterator[None]:
    """While open the weights are a step further; afterwards they are bit by bit what they were."""
    kept = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, columns in weights:
                weight.add_(step[columns].view_as(weight).to(weight))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(weights, kept, strict=True):
                weight.copy_(value)
