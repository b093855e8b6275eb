"""Vectors of D entries and values of S segments, which are ranges of the D columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_dots(a: Tensor, b: Tensor, segments: Sequence[slice]) -> Tensor:
    """(r, S) inner products of the rows of a and b in every segment."""
    return torch.stack([(a[:, s] * b[:, s]).sum(1) for s in segments], dim=1)


def spread(values: Tensor, segments: Sequence[slice]) -> Tensor:
    """(r, S) or (S,) values of segments to (r, D) or (D,), each in all columns of its segment."""
    widths = torch.tensor([s.stop - s.start for s in segments], device=values.device)
    return values.repeat_interleave(widths, dim=-1)


def reciprocal(values: Tensor) -> Tensor:
    """1 / x, and 0 for 0: a segment whose gradients are all zero is left out."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
