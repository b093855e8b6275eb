"""Which weight matrices are tracked, and how their gradients lie side by side in one row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetrace.errors import FinetraceError


@dataclass(frozen=True)
class Block:
    """One weight matrix (or bias) and its place in a row of gradients.

    Attributes:
        name: The parameter's name in the model, an adapter's name left out.
        shape: Shape of the parameter; its gradient is stored flattened in row-major order.
        offset: First column of a row that belongs to it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of entries d_b."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Its gradient as a matrix: a bias is one column."""
        return (self.shape[0], self.shape[1] if len(self.shape) > 1 else 1)

    @property
    def columns(self) -> slice:
        """Its columns in a row of gradients."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Tracked:
    """A linear map whose input and output gradient are watched, and the blocks of its weight and bias.

    Attributes:
        module: The layer that is called.
        weight: Block of its weight.
        bias: Block of its bias, or `None`.
        transposed: The weight is stored (in, out), as GPT-2's `Conv1D` does, not (out, in).
        is_head: The module is the projection onto the vocabulary, or within it, and sees gathered rows instead of
            (B, T, d).
    """

    module: nn.Module
    weight: Block
    bias: Block | None
    transposed: bool
    is_head: bool


@dataclass(frozen=True)
class Tracking:
    """The tracked layers of a model, their blocks in column order, and the trainable weights left out, with reasons."""

    layers: tuple[Tracked, ...]
    blocks: tuple[Block, ...]
    skipped: dict[str, str]

    @property
    def width(self) -> int:
        """Entries in a row: the sum of all d_b."""
        return sum(block.size for block in self.blocks)


def track(model: nn.Module, modules: Sequence[str] | None = None) -> Tracking:
    """Choose what to track.

    Args:
        model: A model with a LoRA adapter, or any model when `modules` names its layers.
        modules: Regular expressions searched in the names of linear layers; `None` tracks the A and B matrices of every
            LoRA layer.

    Raises:
        FinetraceError: Nothing fits, or a layer cannot be tracked exactly.
    """
    head = set(model.get_output_embeddings().modules())  # type: ignore[operator]
    chosen = _lora_layers(model) if modules is None else _named_layers(model, modules)
    tracked, blocks, offset = [], [], 0
    for name, module in chosen:
        _refuse_tied_head(name, module, model)
        weight, bias, transposed = _shapes(name, module)
        weight_block = Block(f"{name}.weight", weight, offset)
        blocks.append(weight_block)
        offset += weight_block.size
        bias_block = None
        if bias is not None:
            bias_block = Block(f"{name}.bias", bias, offset)
            blocks.append(bias_block)
            offset += bias_block.size
        tracked.append(Tracked(module, weight_block, bias_block, transposed, module in head))
    return Tracking(tuple(tracked), tuple(blocks), _untracked(model, tracked))


def _lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise FinetraceError(
            "the model has no LoRA adapter to take gradients of; give one with --adapter, or name linear layers with "
            "--modules (for instance --modules 'layers.29.mlp')."
        )
    layers: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        short = name.removeprefix("base_model.model.")
        for adapter in module.active_adapters:
            if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
                continue
            variant = getattr(module, "lora_variant", {})
            if (
                adapter in module.lora_embedding_A
                or not isinstance(module.lora_A[adapter], nn.Linear)
                or type(module).__name__ == "ParamWrapper"  # LoRA on a bare parameter never calls lora_A
                or adapter in variant
            ):
                kind = "embedding" if adapter in module.lora_embedding_A else type(module).__name__
                kind = type(variant[adapter]).__name__ if adapter in variant else kind
                raise FinetraceError(
                    f"{short}: a LoRA layer of kind {kind} has no exact per-example gradient here; only plain LoRA on "
                    "linear layers has."
                )
            suffix = "" if len(module.active_adapters) == 1 else f".{adapter}"
            layers.append((f"{short}.lora_A{suffix}", module.lora_A[adapter]))
            layers.append((f"{short}.lora_B{suffix}", module.lora_B[adapter]))
    if not layers:
        raise FinetraceError("the adapter has no LoRA layer on a linear layer; nothing can be tracked.")
    return layers


def _named_layers(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    linear = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    for pattern in patterns:
        try:
            found = [name for name, _ in linear if re.search(pattern, name)]
        except re.error as error:
            raise FinetraceError(f"--modules {pattern}: not a regular expression ({error}).") from error
        if not found:
            some = ", ".join(name for name, _ in linear[:4])
            raise FinetraceError(f"--modules {pattern}: no linear layer has such a name; there are {some}, ...")
    return [(name, module) for name, module in linear if any(re.search(pattern, name) for pattern in patterns)]


def _refuse_tied_head(name: str, module: nn.Module, model: nn.Module) -> None:
    if module.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise FinetraceError(
            f"{name}: this layer shares its weight with the input embedding, so its gradient is not that of a linear "
            "layer alone; leave it out of --modules."
        )


def _shapes(name: str, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...] | None, Literal[True, False]]:
    """Logical shapes of weight and bias (a quantised weight is stored in another shape) and whether it is (in, out)."""
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), None if bias is None else (module.out_features,), False
    weight = module.weight  # Conv1D: (in, out)
    return tuple(weight.shape), None if bias is None else tuple(bias.shape), True  # type: ignore[arg-type]


def _untracked(model: nn.Module, tracked: Sequence[Tracked]) -> dict[str, str]:
    """Weights that training moves and the index does not see, so that nobody takes the scores for theirs."""
    seen = {id(parameter) for layer in tracked for parameter in layer.module.parameters(recurse=False)}
    reasons = {}
    for name, parameter in model.named_parameters():
        saved = ".modules_to_save." in name  # frozen once loaded, but trained with the adapter all the same
        if (parameter.requires_grad or saved) and id(parameter) not in seen:
            reasons[name.removeprefix("base_model.model.")] = "trainable, but not a tracked linear layer"
    return reasons
