"""Which weight matrices are tracked, and how their gradients lie side by side in one row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from finetrace.collection.projection import KEPT, Flat, Projection, Sides
from finetrace.errors import FinetraceError

ALL_LINEAR = "all-linear"  # among the patterns of modules: every linear layer of a model without an adapter


@dataclass(frozen=True)
class Block:
    """One weight matrix (or bias) and its place in a row of gradients.

    Attributes:
        name: The parameter's name in the model, an adapter's name left out.
        shape: Shape of the parameter, or what a projection makes of it; its gradient is stored flattened in row-major order.
        offset: First column of a row that belongs to it.
        original: Shape of the parameter where the gradient is projected.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    original: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of entries d_b."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """Number of entries of the parameter's gradient, before any projection."""
        return math.prod(self.original or self.shape)

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
    """The tracked layers of a model, their blocks in column order, and the trainable weights left out, with reasons.

    `sides` project by the name of a layer's weight, `flat` by the name of a block; what is in neither is kept whole.
    """

    layers: tuple[Tracked, ...]
    blocks: tuple[Block, ...]
    skipped: dict[str, str]
    sides: Mapping[str, Sides] = field(default_factory=dict)
    flat: Mapping[str, Flat] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Entries in a row: the sum of all d_b."""
        return sum(block.size for block in self.blocks)


def track(model: nn.Module, modules: Sequence[str] | None = None, projection: Projection = Projection()) -> Tracking:
    """Choose what to track.

    Args:
        model: A model with a LoRA adapter, or any model when `modules` names its layers.
        modules: Regular expressions searched in the names of linear layers, or `all-linear`; `None` tracks the A and B
            matrices of every LoRA layer.
        projection: What is done to gradients that it makes smaller.

    Raises:
        FinetraceError: Nothing fits, or a layer cannot be tracked exactly.
    """
    head = set(model.get_output_embeddings().modules())  # type: ignore[operator]
    chosen = _lora_layers(model) if modules is None else _named_layers(model, modules)
    tracked: list[Tracked] = []
    blocks: list[Block] = []
    all_sides: dict[str, Sides] = {}
    flat: dict[str, Flat] = {}

    def place(name: str, shape: tuple[int, ...], smaller: tuple[int, ...]) -> Block:
        whole = math.prod(shape)
        offset = blocks[-1].columns.stop if blocks else 0
        flattened = projection.flattened(name, whole)
        if flattened is not None:
            flat[name], smaller = flattened, (flattened.kept,)
        blocks.append(Block(name, smaller, offset, None if smaller == shape else shape))
        return blocks[-1]

    for name, module in chosen:
        _refuse_tied_head(name, module, model)
        weight, bias, transposed = _shapes(name, module)
        outputs, inputs = reversed(weight) if transposed else weight
        sides = projection.sides(f"{name}.weight", outputs, inputs)
        if sides is not None:
            all_sides[sides.name] = sides
            outputs, inputs = sides.outputs[1], sides.inputs[1]
        weight_block = place(f"{name}.weight", weight, (inputs, outputs) if transposed else (outputs, inputs))
        bias_block = place(f"{name}.bias", bias, (outputs,)) if bias is not None else None
        tracked.append(Tracked(module, weight_block, bias_block, transposed, module in head))
    for each in flat.values():
        each.keep_bytes = KEPT // len(flat)
    return Tracking(tuple(tracked), tuple(blocks), _untracked(model, tracked), all_sides, flat)


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
        if module.merged or module.disable_adapters:
            state, remedy = (
                ("merged", "take it apart with unmerge_adapter()")
                if module.merged
                else ("disabled", "leave disable_adapter(), or call enable_adapter_layers()")
            )
            raise FinetraceError(
                f"{short}: its adapter is {state}, so nothing flows through it and it would have no gradient; {remedy} first."
            )
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

    if ALL_LINEAR in patterns:
        return _every_linear(model)
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


def _every_linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer that has its weight for itself: all but a vocabulary projection tied to the embedding."""
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    if isinstance(model, PeftModel):
        raise FinetraceError(
            f"--modules {ALL_LINEAR}: the model has an adapter, and it is the adapter that was trained; leave out --modules."
        )
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight is not embedding
    ]
    if not found:
        raise FinetraceError(f"--modules {ALL_LINEAR}: the model has no linear layer; nothing can be tracked.")
    return found


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
            owner = model.get_submodule(name.rpartition(".")[0])
            kind = "not a tracked linear layer"
            if isinstance(owner, nn.Embedding):
                tied = parameter is model.get_output_embeddings().weight  # type: ignore[operator]
                kind = "an embedding, shared with the vocabulary projection" if tied else "an embedding"
            elif "norm" in type(owner).__name__.lower():
                kind = "of a norm"
            reasons[name.removeprefix("base_model.model.")] = f"trainable, but {kind}"
    return reasons
