"""Which weight matrices are tracked, and how their gradients lie side by side in one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from finetrace.collection.layers import lora_layers, named_layers
from finetrace.collection.projection import KEPT, Flat, Projection, Sides
from finetrace.errors import FinetraceError
from finetrace.fingerprint import active_adapters


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
        FinetraceError: Nothing fits, a layer cannot be tracked exactly, or the model is not a causal one.
    """
    if isinstance(modules, str):
        modules = (modules,)
    _refuse_looking_ahead(model)
    head = set(model.get_output_embeddings().modules())  # type: ignore[operator]
    owners = _owners(model)
    chosen = lora_layers(model) if modules is None else named_layers(model, modules)
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
        _refuse_tied(name, module, model, owners)
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


def _refuse_looking_ahead(model: nn.Module) -> None:
    """Where tokens see what follows them, they see their own targets and the padding of the batch."""
    config = getattr(model, "config", None)
    declared = {
        "is_causal": True,
        "is_decoder": hasattr(type(config), "is_decoder"),
    }  # what others say of it is not read
    for name in (name for name, read in declared.items() if read and getattr(config, name, True) is False):
        raise FinetraceError(
            f"{name}=False in the model's configuration: its tokens see those that follow them, so it is no causal language "
            f"model, and its losses would hang on the batch; load it with {name}=True."
        )


def _refuse_tied(name: str, module: nn.Module, model: nn.Module, owners: Mapping[int, Sequence[str]]) -> None:
    """`owners`: the modules that hold a parameter, tracked or not."""
    if module.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise FinetraceError(
            f"{name}: this layer shares its weight with the input embedding, so its gradient is not that of a linear "
            "layer alone; leave it out of --modules."
        )
    others = [each for each in owners.get(id(module.weight), ()) if model.get_submodule(each) is not module]
    if others:
        raise FinetraceError(
            f"{name}: this layer shares its weight with {others[0].removeprefix('base_model.model.')}, so its gradient is the "
            "sum of both, which is not kept; name other layers with --modules."
        )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(name)
    return found


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
        if (parameter.requires_grad or _tuned(name, model)) and id(parameter) not in seen:
            owner = model.get_submodule(name.rpartition(".")[0])
            kind = "not a tracked linear layer"
            if isinstance(owner, nn.Embedding):
                tied = parameter is model.get_output_embeddings().weight  # type: ignore[operator]
                kind = "an embedding, shared with the vocabulary projection" if tied else "an embedding"
            elif "norm" in type(owner).__name__.lower():
                kind = "of a norm"
            reasons[name.removeprefix("base_model.model.")] = f"trainable, but {kind}"
    return reasons


def _tuned(name: str, model: nn.Module) -> bool:
    """Whether a parameter was trained with the adapter that is at work; once loaded, all are frozen."""
    parts = name.split(".")
    kind = next((part for part in parts if part.startswith("lora_") or part == "modules_to_save"), None)
    if kind is None:
        return False
    return parts[parts.index(kind) + 1] in active_adapters(model)
