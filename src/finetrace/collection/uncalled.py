"""Tracked layers that a pass never calls: no hook hears what their weights do, if the model reads them all the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from finetrace.collection.modules import Tracked
from finetrace.collection.precision import Narrowing
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, token_logits


def refuse_read(model: nn.Module, layers: Sequence[Tracked], batch: Batch, narrowing: Narrowing) -> None:
    """Stop where a pass depends on the weight of one of `layers`, none of which it calls, as Mamba's does on its `dt_proj`.

    An expert that no token is routed to is called as little, and its gradient is zero indeed.

    Raises:
        FinetraceError: The gradient of a layer would be taken for zero and is not.
    """
    found = [(each.weight.name.removesuffix(".weight"), each.module.weight) for each in layers]
    known = {
        name: weight
        for name, weight in found
        if isinstance(weight, nn.Parameter) and weight.is_floating_point() and not weight.is_meta
    }
    weights = list(known.values())
    if not weights:
        return
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad(), narrowing():
            logits, _ = token_logits(model, batch)
        if not logits.requires_grad:
            return
        grads = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    read = [name for name, grad in zip(known, grads, strict=True) if grad is not None]
    if read:
        others = f", and that of {len(read) - 1} more" if len(read) > 1 else ""
        raise FinetraceError(
            f"{read[0]}: the model reads this layer's weight without calling the layer{others}, so its gradient cannot be "
            "seen; name other layers with --modules."
        )
