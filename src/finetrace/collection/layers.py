"""Which linear layers are tracked: those of an adapter, or plain ones by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from finetrace.errors import FinetraceError
from finetrace.fingerprint import active_adapters

ALL_LINEAR = "all-linear"  # among the patterns of modules: every linear layer of a model without an adapter


def lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The A and B of every LoRA layer, with their names.

    Raises:
        FinetraceError: There are none, they are switched off, or one has no exact gradient here.
    """
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


def named_layers(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The linear layers in whose names one of the patterns is found, or all of them, with their names.

    Raises:
        FinetraceError: A pattern is none, fits nothing, or fits a layer whose gradient is not that of a linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    if ALL_LINEAR in patterns:
        return _every_linear(model)
    linear = [
        (name, module)
        for long, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and (name := _used(long, model)) is not None
    ]
    for pattern in patterns:
        try:
            found = [name for name, _ in linear if re.search(pattern, name)]
        except re.error as error:
            raise FinetraceError(f"--modules {pattern}: not a regular expression ({error}).") from error
        if not found:
            some = ", ".join(name for name, _ in linear[:4])
            raise FinetraceError(f"--modules {pattern}: no linear layer has such a name; there are {some}, ...")
    chosen = [(name, module) for name, module in linear if any(re.search(pattern, name) for pattern in patterns)]
    for name, module in chosen:
        _refuse_scaled_bias(name, module, model)
    return chosen


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


def _used(name: str, model: nn.Module) -> str | None:
    """A layer's name as it is once the adapter is loaded again, or `None` for what a pass with the adapter never calls."""
    parts = name.removeprefix("base_model.model.").split(".")
    active = active_adapters(model)
    if parts[-1] == "original_module":  # that `modules_to_save` has taken the place of
        return None
    for place, part in enumerate(parts[:-1]):
        if part in ("lora_A", "lora_B", "modules_to_save"):
            owner: Any = model.get_submodule(name.rpartition(f".{part}.")[0])
            idle = getattr(owner, "merged", False) or getattr(owner, "disable_adapters", False)
            if parts[place + 1] not in active or idle:
                return None
            if len(active) == 1:  # whatever it is called here, it is loaded as this
                parts[place + 1] = "default"
    return ".".join(parts)


def _refuse_scaled_bias(name: str, module: nn.Module, model: nn.Module) -> None:
    """DoRA takes a base layer's bias off its output and adds it again, so that what is seen there is not its gradient alone."""
    owner: Any = next((each for each in model.modules() if getattr(each, "base_layer", None) is module), None)
    variants = getattr(owner, "lora_variant", {})
    if module.bias is not None and variants:
        kind = type(next(iter(variants.values()))).__name__
        raise FinetraceError(
            f"{name}: under {kind} the gradient of this layer's bias cannot be seen; leave it out of --modules."
        )
