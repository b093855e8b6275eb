"""Linear maps that share an input, multiplied as one, with their LoRA and what is tracked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from finetrace.collection.fused_layout import Layout
from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.modules import Tracked


@dataclass(frozen=True)
class Watched:
    """A tracked matrix: the weight itself, or LoRA's A or B, and where its outputs and ranks lie in the group."""

    layer: Tracked
    kind: Literal["weight", "a", "b"]
    outputs: slice
    ranks: slice
    scale: float


@dataclass(frozen=True)
class Member:
    """One linear map: (out, in) weight; LoRA's (r, in) A, (out, r) B and its scale, or `None`; what is tracked."""

    weight: Tensor
    lora: tuple[Tensor, Tensor, float] | None
    tracked: tuple[tuple[Literal["weight", "a", "b"], Tracked], ...]


class Group:
    """y = W x + s B A x of several maps, their rows below one another.

    LoRA's products are in the dtype `wide`, but for the sum of both parts, which is rounded once to that of W.
    """

    def __init__(self, members: Sequence[Member], wide: torch.dtype) -> None:
        weights = [member.weight.detach() for member in members]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (out, in)
        self.wide = wide
        loras = [member.lora for member in members if member.lora is not None]
        self.down: Tensor | None = None  # A, (r, in)
        self.up = self.weight.new_empty(0)  # s B, (out, r), zero where a rank belongs to another member
        watched: list[Watched] = []
        if loras:
            self.down = torch.cat([lora[0].detach().to(wide) for lora in loras])
            self.up = torch.zeros(len(self.weight), len(self.down), dtype=wide)
        output = rank = 0
        for member in members:
            outputs, ranks, scale = slice(output, output + len(member.weight)), slice(0, 0), 1.0
            if member.lora is not None:
                ranks, scale = slice(rank, rank + len(member.lora[0])), member.lora[2]
                self.up[outputs, ranks] = member.lora[1].detach().to(wide) * scale
            watched += [Watched(layer, kind, outputs, ranks, scale) for kind, layer in member.tracked]
            output, rank = outputs.stop, max(rank, ranks.stop)
        self.watched = tuple(watched)

    @cached_property
    def _narrow(self) -> tuple[Tensor, Tensor]:
        """A and s B in the dtype of W."""
        assert self.down is not None
        return self.down.to(self.weight.dtype), self.up.to(self.weight.dtype)

    @property
    def sees_inputs(self) -> bool:
        """Whether a tracked matrix needs the group's own input."""
        return any(each.kind != "b" for each in self.watched)

    def forward(self, inputs: Tensor, wide_inputs: Tensor, out: Tensor) -> Tensor | None:
        """Write (F, out) to `out`; returns A x (F, r) in `wide`, or `None` without LoRA."""
        torch.mm(inputs, self.weight.T, out=out)
        if self.down is None:
            return None
        low = wide_inputs.to(self.wide) @ self.down.T
        out.addmm_(low.to(out.dtype), self._narrow[1].T)
        return low

    def low_deltas(self, deltas: Tensor) -> Tensor | None:
        """(N, r) dL/d(A x) in `wide` of (N, out) dL/dy."""
        return None if self.down is None else deltas.to(self.wide) @ self.up

    def backward(self, deltas: Tensor, low: Tensor | None, out: Tensor, add: bool = False) -> Tensor:
        """Write (N, in) dL/dx of (N, out) dL/dy and (N, r) dL/d(A x) to `out`, or add it to what is there."""
        found = out.addmm_(deltas, self.weight) if add else torch.mm(deltas, self.weight, out=out)
        return found if low is None else found.addmm_(low.to(found.dtype), self._narrow[0])


def record(
    group: Group,
    recorder: GradientRecorder,
    layout: Layout,
    inputs: Tensor,
    low: Tensor | None,
    deltas: Tensor,
    low_deltas: Tensor,
) -> None:
    """Hand the gradients of what is tracked to the recorder.

    Args:
        group: The maps.
        recorder: Adds them up.
        layout: Of the rows.
        inputs: (B, T, in) x in `wide`; not read where the group does not see its inputs.
        low: (F, r) A x.
        deltas: (B, T, out) dL/dy in `wide`, zero where nothing is computed.
        low_deltas: (B, T, r) dL/d(A x); anything without LoRA.
    """
    ranks = layout.spread(low) if low is not None else inputs
    product: Tensor | None = None  # of all ranks
    for each in group.watched:
        side = {
            "weight": (inputs, deltas[..., each.outputs]),
            "a": (inputs, low_deltas[..., each.ranks]),
            "b": (ranks[..., each.ranks], deltas[..., each.outputs]),
        }[each.kind]
        if recorder.hears or not recorder.multiplies(each.layer):
            delta = side[1] * each.scale if each.kind == "b" else side[1]
            seen = recorder.projected(each.layer, side[0].contiguous())
            if recorder.hears:
                recorder.see(each.layer, seen)
            if recorder.multiplies(each.layer):
                recorder.see_deltas(each.layer, delta)
            else:
                recorder.accumulate(each.layer, seen, delta)
                continue
        if each.kind == "a":
            if product is None:
                product = torch.bmm(low_deltas.transpose(1, 2), inputs)  # (B, r, in)
            recorder.add(each.layer.weight, product[:, each.ranks].flatten(1))
        else:
            rows = torch.bmm(side[1].transpose(1, 2), side[0])  # (B, out, in or r)
            recorder.add(each.layer.weight, (rows.mul_(each.scale) if each.kind == "b" else rows).flatten(1))
