"""Parts of a layer that the fused pass is made of: norm, rotation, SwiGLU, and memory that batches share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.collection.fused_layout import Pair, matched

HEADROOM = 4  # a buffer is longer than asked for by one in so many parts; what is never written takes no memory


class Workspace:
    """Memory by name that one batch leaves to the next: fresh memory has to be cleared page by page."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised; what lay under this name before is overwritten."""
        last = self._last.get(name)
        if last is not None and last.dtype == dtype and last.shape == tuple(shape):
            return last
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            self._held.pop(name, None)
            self._last.pop(name, None)
            held = self._held[name] = torch.empty(size + size // HEADROOM, dtype=dtype)
        self._last[name] = held[:size].view(*shape)
        return self._last[name]

    def clear(self) -> None:
        """Give it back."""
        self._held.clear()
        self._last.clear()


@dataclass(frozen=True)
class Norm:
    """y = w x / sqrt(mean(x^2) + eps), with w in the dtype of x."""

    weight: Tensor
    eps: float

    def scales(self, x: Tensor) -> Tensor:
        """(F, 1) 1 / sqrt(mean(x^2) + eps)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()

    def forward(self, x: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
        """(F, d)."""
        return torch.mul(x, scales, out=out).mul_(self.weight)

    def backward(
        self, grad: Tensor, deltas: Tensor, x: Tensor, scales: Tensor, pairs: tuple[Pair, ...], room: Workspace
    ) -> None:
        """Add dL/dx of (N, d) dL/dy to `grad` (N, d)."""
        weighted = room.take("weighted", deltas.shape, x.dtype).copy_(deltas).mul_(self.weight)
        products, ones = room.take("products", deltas.shape, x.dtype), x.new_ones(x.shape[-1], 1)
        for g, t, p, a, s in matched(pairs, (grad, weighted, products), (x, scales)):
            along = (torch.mul(t, a, out=p) @ ones).mul_(s.pow(3).div_(-a.shape[-1]))
            g.addcmul_(t, s).addcmul_(a, along)


def total(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Write the sum to `out`, in its dtype, which is that of `first`; a sum of two dtypes at once takes four times as long."""
    return torch.add(first, second, out=out) if first.dtype == second.dtype else out.copy_(second).add_(first)


@dataclass(frozen=True)
class Shape:
    """Heads, groups of heads that share a key, and the width of a head."""

    heads: int
    groups: int
    width: int


def swiglu(gate: Tensor, up: Tensor, by_gate: Tensor, by_up: Tensor, out: Tensor) -> Tensor:
    """silu(g) u of (F, m) g and u, and its derivatives by g and by u, each written to the memory given for it.

    silu(g), which is the derivative by u, is rounded to the model's dtype before it is multiplied, as the model itself does.
    """
    torch.ops.aten.silu.out(gate, out=by_up)
    torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=by_gate)
    return torch.mul(by_up, up, out=out)


def rotate(qkv: Tensor, shape: Shape, turn: tuple[Tensor, Tensor], room: Workspace) -> None:
    """Rotate the queries and keys of (..., rows, (H + 2 G) D) in place, by the rows' places in their examples."""
    cos, sin = turn  # (rows, 1, D / 2)
    turned = qkv.view(*qkv.shape[:-1], -1, 2, shape.width // 2)[..., : shape.heads + shape.groups, :, :]
    halves = turned[..., 0, :], turned[..., 1, :]
    first, second, left = (room.take(f"turned {k}", halves[0].shape, cos.dtype) for k in range(3))
    first.copy_(halves[0])
    second.copy_(halves[1])
    halves[0].copy_(torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1))
    halves[1].copy_(second.mul_(cos).addcmul_(first, sin))
