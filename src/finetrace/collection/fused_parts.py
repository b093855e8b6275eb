"""Parts of a layer that the fused pass is made of: norm, rotation, SwiGLU, and memory that batches share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.collection.fused_layout import Pair, matched

STEP = 256  # rows of the perceptron at a time, which stay in the processor's cache


class Workspace:
    """Memory by name that one batch leaves to the next: fresh memory has to be cleared page by page."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised; what lay under this name before is overwritten."""
        size = 1
        for each in shape:
            size *= each
        held = self._held.get(name)
        if held is None or len(held) < size or held.dtype != dtype:
            self._held.pop(name, None)
            held = self._held[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)

    def clear(self) -> None:
        """Give it back."""
        self._held.clear()


@dataclass(frozen=True)
class Norm:
    """y = w x / sqrt(mean(x^2) + eps), with w in the dtype of x."""

    weight: Tensor
    eps: float

    def scales(self, x: Tensor) -> Tensor:
        """(F, 1) 1 / sqrt(mean(x^2) + eps)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()

    def forward(self, x: Tensor, scales: Tensor) -> Tensor:
        """(F, d)."""
        return (x * scales).mul_(self.weight)

    def backward(self, grad: Tensor, deltas: Tensor, x: Tensor, scales: Tensor, pairs: tuple[Pair, ...]) -> None:
        """Add dL/dx of (N, d) dL/dy to `grad` (N, d)."""
        weighted = torch.mul(deltas, self.weight)
        for g, t, a, s in matched(pairs, (grad, weighted), (x, scales)):
            along = (t * a).sum(-1, keepdim=True).mul_(s.pow(3).div_(-a.shape[-1]))
            g.addcmul_(t, s).addcmul_(a, along)


@dataclass(frozen=True)
class Shape:
    """Heads, groups of heads that share a key, and the width of a head."""

    heads: int
    groups: int
    width: int


def swiglu(gate: Tensor, up: Tensor, by_gate: Tensor, by_up: Tensor, wide: torch.dtype) -> Tensor:
    """silu(g) u of (F, m) g and u, and its derivatives by g and by u, with all steps between in `wide`.

    With s = silu(g) and sigma = s / g, the derivative of s is sigma + s (1 - sigma).
    """
    product = torch.empty_like(gate)
    one = torch.ones((), dtype=wide)
    for start in range(0, len(gate), STEP):
        part = slice(start, start + STEP)
        g, u = gate[part].to(wide), up[part].to(wide)
        sigma = torch.sigmoid(g)
        s = g * sigma
        by_up[part] = s
        by_gate[part] = torch.lerp(s, one, sigma).mul_(u)
        product[part] = s.mul_(u)
    return product


def rotate(qkv: Tensor, shape: Shape, turn: tuple[Tensor, Tensor]) -> None:
    """Rotate the queries and keys of (..., rows, (H + 2 G) D) in place, by the rows' places in their examples."""
    cos, sin = turn  # (rows, 1, D / 2)
    turned = qkv.view(*qkv.shape[:-1], -1, 2, shape.width // 2)[..., : shape.heads + shape.groups, :, :]
    first, second = turned[..., 0, :].to(cos.dtype), turned[..., 1, :].to(cos.dtype)
    left, right = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    turned[..., 0, :], turned[..., 1, :] = left, right
