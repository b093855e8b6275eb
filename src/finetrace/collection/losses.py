"""Losses of examples without gradients, as the collection computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetrace.batching import batch_budget, batches
from finetrace.collection.precision import wide_prefix, wide_residual
from finetrace.encoding import Encoded
from finetrace.forward import Batch, example_losses, token_losses
from finetrace.modes import evaluating
from finetrace.rotary import batch_tokens_within


def mean_losses(
    model: nn.Module, items: Sequence[Encoded], *, learnt: Sequence[nn.Parameter] = (), batch_tokens: int | None = None
) -> Tensor:
    """(n,) each example's own mean loss in nats, float64, on the CPU.

    Args:
        model: The model; it is in eval mode meanwhile.
        items: Examples; each loss is that of its own tokens, whatever batch it travels in.
        learnt: The parameters that differ from one model to the next: what lies below the lowest of them is computed once a
            batch and found again for the next model of the same base.
        batch_tokens: Padded tokens a batch holds at most; by default what suits the device.
    """
    device = next(model.parameters()).device
    losses = torch.empty(len(items), dtype=torch.float64)
    prefix = wide_prefix(model, learnt) if learnt else None
    with torch.no_grad(), evaluating(model), wide_residual(model) as narrowing:
        for chosen in batches(items, batch_tokens_within(model, items, batch_tokens or batch_budget(device))):
            batch = Batch.of([items[i] for i in chosen]).to(device)
            with narrowing():
                tokens, _ = token_losses(model, batch, prefix=prefix)
            losses[chosen] = example_losses(batch, tokens.double()).cpu()
    return losses
