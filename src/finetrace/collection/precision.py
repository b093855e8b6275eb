"""Half-precision models with their residual stream in float32: matrix products stay fast, sums stay exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from finetrace.attention import HALF as HALF
from finetrace.errors import FinetraceError
from finetrace.prefix import Prefix, frozen_prefix

Narrowing = Callable[[], AbstractContextManager[Any]]


def wide(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: products in the precision of their factors."""
    return torch.autocast(device.type, enabled=False)


def wide_prefix(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Prefix | None:
    """The frozen prefix of passes under `wide_residual`, shared by all that want gradients or losses of one model."""
    return frozen_prefix(model, wanted, f"wide {next(model.parameters()).dtype}", singly=False)


@contextmanager
def wide_residual(model: nn.Module) -> Iterator[Narrowing]:
    """While open, a bfloat16 or float16 model multiplies in its own precision and adds in float32.

    The embedding's output is widened, so every residual sum and every norm is float32; autocast narrows the inputs of
    matrix products. Layers whose weights are float32, as PEFT's adapters are, multiply in float32. Gradients come out
    closer to those of float32 for a few percent of time. A model in float32 or wider is left as it is.

    What is yielded opens autocast and belongs around each forward pass alone: what hooks and backward passes multiply is
    to stay in float32.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype in HALF), None)
    if dtype is None:
        yield nullcontext
        return
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, output: output.float())
    patched: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        # accelerate moves inputs to the layer's device and then calls what it found there
        name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        forward = _forward(module)
        if forward is not None and (name == "_old_forward" or "forward" not in module.__dict__):
            patched.append((module, name, module.__dict__.get(name)))
            setattr(module, name, forward)
    device = next(model.parameters()).device.type
    try:
        yield lambda: torch.autocast(device, dtype)
    finally:
        handle.remove()
        for module, name, own in patched:
            if own is None:
                delattr(module, name)
            else:
                setattr(module, name, own)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """While open, a bfloat16 or float16 model is the same one in float32; afterwards it is bit by bit what it was.

    For differences of losses that are smaller than what half precision adds to each.

    Raises:
        FinetraceError: Some weights are not in memory, as those that a device map leaves on disk.
    """
    narrow = [each for each in (*model.parameters(), *model.buffers()) if each.dtype in HALF]
    if any(each.device.type == "meta" for each in narrow):
        raise FinetraceError(
            "some of the model's weights are not in memory, so it cannot be taken in float32; load it without --device-map."
        )
    kept = [each.data for each in narrow]
    try:
        for each in narrow:
            each.data = each.data.float()
        yield
    finally:
        for each, data in zip(narrow, kept, strict=True):
            each.data = data


def _forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """What a module computes in float32 throughout, or `None` if it is to be left alone."""
    if type(module) is nn.Linear and module.weight.dtype == torch.float32:

        def whole(inputs: Tensor, *args: Any) -> Tensor:
            with wide(inputs.device):
                return linear(inputs.float(), module.weight, module.bias)

        return whole
    if type(module) is nn.LayerNorm and module.weight is not None and module.weight.dtype in HALF:

        def normed(inputs: Tensor) -> Tensor:
            bias = module.bias.float() if module.bias is not None else None
            return layer_norm(inputs.float(), module.normalized_shape, module.weight.float(), bias, module.eps)

        return normed
    if isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dtype in HALF:
        own = type(module).forward  # of a kind of its own, which multiplies in the precision of its weights

        def narrowed(inputs: Tensor) -> Tensor:
            with wide(inputs.device):
                return own(module, inputs.to(module.weight.dtype)).float()

        return narrowed
    return None
