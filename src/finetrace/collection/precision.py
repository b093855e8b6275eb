"""Half-precision models with their residual stream in float32: matrix products stay fast, sums stay exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def wide_residual(model: nn.Module) -> Iterator[None]:
    """While open, a bfloat16 or float16 model multiplies in its own precision and adds in float32.

    The embedding's output is widened, so every residual sum and every norm is float32; autocast narrows the inputs of
    matrix products. Layers whose weights are float32, as PEFT's adapters are, multiply in float32. Gradients come out
    closer to those of float32 for a few percent of time. A model in float32 or wider is left as it is.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype in HALF), None)
    if dtype is None:
        yield
        return
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, output: output.float())
    patched: list[nn.Module] = []
    for module in model.modules():
        forward = _forward(module)
        if forward is not None and "forward" not in module.__dict__:
            module.forward = forward
            patched.append(module)
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, dtype):
            yield
    finally:
        handle.remove()
        for module in patched:
            del module.forward


def _forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """What a module computes in float32 throughout, or `None` if it is to be left alone."""
    if type(module) is nn.Linear and module.weight.dtype == torch.float32:

        def wide(inputs: Tensor, *args: Any) -> Tensor:
            with torch.autocast(inputs.device.type, enabled=False):
                return linear(inputs.float(), module.weight, module.bias)

        return wide
    if type(module) is nn.LayerNorm and module.weight is not None and module.weight.dtype in HALF:

        def normed(inputs: Tensor) -> Tensor:
            bias = module.bias.float() if module.bias is not None else None
            return layer_norm(inputs.float(), module.normalized_shape, module.weight.float(), bias, module.eps)

        return normed
    return None
