"""Where along the fine-tuning gradients are taken: at its end, where the adapter is, or at its start.

A model that has learnt its training set by heart has little of it left in its gradients: what remains are the words that
it still gets wrong. Where fine-tuning began nothing had been learnt yet, and an example's gradient says all that it had to
teach. LoRA starts from B = 0, so that the start is at hand without any checkpoint: it is the adapter with its B put back to
zero. Its A is the one that training ended with, and the gradient of A is zero there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from finetrace.errors import FinetraceError

Moment = Literal["end", "start"]
At = Literal["", "end", "start"]  # empty where a method takes an index's own
ZERO = (True, "gaussian", "eva")  # PEFT's ways to begin that leave B at zero


def each_moment(at: str) -> tuple[At, ...]:
    """The moments of a method's `at`: one of `At`, or several of `end` and `start` joined by `+`.

    Raises:
        FinetraceError: One is neither, or one of several is empty.
    """
    if at == "":
        return ("",)
    return tuple(_known(each) for each in at.split("+"))


def _known(moment: str) -> Moment:
    if moment not in get_args(Moment):
        raise FinetraceError(f"at={moment}: not known; use {' or '.join(get_args(Moment))}.")
    return cast(Moment, moment)


@contextmanager
def at_moment(model: nn.Module, moment: Moment) -> Iterator[None]:
    """While open, `model` stands where fine-tuning ended or began; afterwards it is bit by bit what it was.

    Raises:
        FinetraceError: The start is asked of a model that cannot be put back there.
    """
    if _known(moment) == "end":
        yield
        return
    kept = [(weight, weight.detach().clone()) for weight in _learnt(model)]
    try:
        with torch.no_grad():
            for weight, _ in kept:
                weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


def _learnt(model: nn.Module) -> list[Tensor]:
    """The weights of the adapter that are zero before training."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise FinetraceError(
            "at=start: the model has no LoRA adapter that could be taken back to its start; use at=end."
        )
    for name in model.active_adapters:
        why = why_no_start(model.peft_config[name])
        if why is not None:
            raise FinetraceError(f"at=start: {why}, so its start is not at hand; use at=end.")
    strays = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    if strays:
        raise FinetraceError(
            f"at=start: {strays[0]} is trained beside the adapter, so its start is not at hand; use at=end."
        )
    found = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise FinetraceError("at=start: the adapter is merged into its base; unmerge it first.")
        for name in layer.active_adapters:
            if name in getattr(layer, "lora_variant", {}):
                raise FinetraceError("at=start: only plain LoRA can be taken back to its start; use at=end.")
            if name in layer.lora_B:
                found += list(layer.lora_B[name].parameters())
            if name in layer.lora_embedding_A:  # of embeddings it is A that begins at zero
                found.append(layer.lora_embedding_A[name])
    if not found:
        raise FinetraceError(
            "at=start: the adapter is not LoRA, and no other can be taken back to its start; use at=end."
        )
    return found


def why_no_start(config: Any) -> str | None:
    """Why the adapter of a PEFT configuration cannot be taken back to its start; `None` where it can.

    What was trained beside B, or did not begin at zero, cannot be put back.
    """
    how = getattr(config, "init_lora_weights", True)
    if how not in ZERO:
        return f"this adapter began with init_lora_weights={how}, where B is not zero"
    if getattr(config, "use_dora", False):
        return "this adapter is DoRA, which trains magnitudes beside B"
    if config.modules_to_save:
        return f"{', '.join(sorted(config.modules_to_save))} were trained beside the adapter (modules_to_save)"
    if getattr(config, "bias", "none") != "none":
        return f"biases were trained beside the adapter (bias={config.bias})"
    if getattr(config, "trainable_token_indices", None):
        return "token embeddings were trained beside the adapter (trainable_token_indices)"
    return None
