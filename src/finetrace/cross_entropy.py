"""Cross-entropy over a vocabulary, some rows at a time: the logits and their gradient are large, and nothing beside them is.

In half precision autograd would keep a float32 copy of the logits and one of their log-probabilities, each twice as large as
the logits themselves, and make two more on the way back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetrace.attention import HALF

BYTES = 16 << 20  # of the rows that are widened at a time


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(R,) log-loss in nats of (R,) targets under (R, vocabulary) logits, in float32 or wider whatever the logits are in.

    It can be differentiated once; the gradient of the logits is in their own dtype.
    """
    return cast(Tensor, _CrossEntropy.apply(logits, targets))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        losses = torch.empty(len(logits), dtype=_wide(logits.dtype), device=logits.device)
        for some in _some(logits):
            losses[some] = functional.cross_entropy(logits[some].to(losses.dtype), targets[some], reduction="none")
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Torch's own, of a few rows at a time: the same to the last bit."""
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        for some in _some(logits):
            chances = functional.log_softmax(logits[some].to(grad.dtype), dim=-1)
            slope = torch.zeros_like(chances).scatter_(1, targets[some].unsqueeze(1), -grad[some].unsqueeze(1))
            found[some] = torch.ops.aten._log_softmax_backward_data(slope, chances, 1, chances.dtype)
        return found, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _some(logits: Tensor) -> list[slice]:
    step = max(1, BYTES // (max(1, logits.shape[1]) * _wide(logits.dtype).itemsize))
    return [slice(start, start + step) for start in range(0, len(logits), step)]
