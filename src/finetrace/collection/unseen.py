"""Tracked layers whose gradient no hook sees: their weight is read without a call, or they do not multiply by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from finetrace.collection.modules import Tracked
from finetrace.collection.precision import Narrowing, wide
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, token_logits

# relative distance of two products beyond rounding, by the dtype of the weights; TF32 rounds float32 to 1e-3 on some GPUs
FAR = {torch.float64: 1e-9, torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Looked:
    """Whether a model's layers were looked at: the first pass does, and no pass after it.

    Attributes:
        done: They were.
    """

    done: bool = False


def refuse_other_products(layer: Tracked, inputs: Tensor, output: Any) -> None:
    """Stop where a layer of a kind of its own makes something else of its inputs than W x + b, as BitNet's do.

    Weights that are stored quantised are multiplied as what they stand for, and are not looked at.

    Raises:
        FinetraceError: It does, or returns more than a tensor.
    """
    module, why = layer.module, ""
    if not isinstance(output, Tensor):
        why = "returns more than its product (routers of experts do)"
    elif type(module).forward is not nn.Linear.forward and not layer.transposed:
        weight, bias = module.weight, module.bias
        if isinstance(weight, nn.Parameter) and weight.dtype in FAR and not weight.is_meta:
            with torch.no_grad(), wide(inputs.device):
                product = linear(inputs.to(weight.device, weight.dtype), weight, bias)  # type: ignore[arg-type]
                product = product.to(output.device)
                other = product.shape != output.shape or _apart(product, output) > FAR[weight.dtype]
            why = "makes something else of its inputs than their product with its weight" if other else ""
    if why:
        raise FinetraceError(
            f"{layer.weight.name}: this layer {why}, so its gradient cannot be seen; name other layers with --modules."
        )


def _apart(product: Tensor, output: Tensor) -> float:
    exact = product if product.dtype == torch.float64 else product.float()
    return float((exact - output).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))


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
