"""One layer of a Llama, forward and backward by hand, for frozen weights: only gradients of inputs are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.attention import grouped, grouped_backward
from finetrace.collection.fused_group import Group, record
from finetrace.collection.fused_layout import Layout, Pair, matched
from finetrace.collection.fused_parts import Norm, Shape, Workspace, rotate, swiglu, total
from finetrace.collection.hooks import GradientRecorder


@dataclass(frozen=True)
class Place:
    """What all layers of a batch share.

    Attributes:
        layout: Of the rows.
        bias: (r T, T) zero where a query sees a key, else minus infinity.
        forward: cos and sin of the rotation of every forward row, (F, 1, D / 2) each.
        backward: cos and sin of the rotation back at every place of an example, (T, 1, D / 2) each, times the scale of
            attention's inner products.
        workspace: For what the backward pass needs.
    """

    layout: Layout
    bias: Tensor
    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor]
    workspace: Workspace

    def normed(self, norm: Norm, x: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a norm makes of x, in `dtype` and in its own, until the next one is asked for."""
        wide = norm.forward(x, scales, self.workspace.take("normed", x.shape, x.dtype))
        return self.narrow(wide, dtype), wide

    def narrow(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """In `dtype`, until the next one is asked for."""
        return values if values.dtype == dtype else self.workspace.take("narrow", values.shape, dtype).copy_(values)


@dataclass
class Kept:
    """What a layer's backward pass needs; `from_row` is the first forward row of everything after attention."""

    x: Tensor
    scales: Tensor
    low: Tensor | None
    attention: tuple[Tensor, Tensor, Tensor, Tensor]
    from_row: int
    attended: Tensor | None
    out_low: Tensor | None
    middle: Tensor
    middle_scales: Tensor
    gate_low: Tensor | None
    up_low: Tensor | None
    by_gate: Tensor
    by_up: Tensor
    product: Tensor | None
    down_low: Tensor | None


@dataclass(frozen=True)
class Layer:
    """The weights of one layer.

    Attributes:
        number: Of the layer, for the names of its memory.
        shape: Of its attention.
        before, between: Norms before attention and before the perceptron.
        qkv, out, gate, up, down: Linear maps.
    """

    number: int
    shape: Shape
    before: Norm
    between: Norm
    qkv: Group
    out: Group
    gate: Group
    up: Group
    down: Group

    def forward(self, x: Tensor, place: Place, from_row: int, keep: bool) -> tuple[Tensor, Kept | None]:
        """The layer's output for the forward rows from `from_row` on, and what `backward` needs."""
        layout, dtype = place.layout, self.qkv.weight.dtype
        name = f"{self.number}" if keep else "passing"

        def room(what: str, rows: int, columns: int, kind: torch.dtype = dtype) -> Tensor:
            return place.workspace.take(f"{what} {name}", (rows, columns), kind)

        scales = self.before.scales(x)
        narrow, normed = place.normed(self.before, x, scales, dtype)
        qkv = place.workspace.take("qkv", (len(x), len(self.qkv.weight)), dtype)
        low = self.qkv.forward(narrow, normed, qkv)
        attention, result = self._attend(qkv, place, name)
        rows = len(x) - from_row
        attended = place.workspace.take("attended rows", (rows, result.shape[1]), dtype)
        torch.index_select(result, 0, layout.places[from_row:], out=attended)  # (F', H D)
        added = place.workspace.take("added", (rows, x.shape[1]), dtype)
        out_low = self.out.forward(attended, attended, added)
        middle = total(x[from_row:], added, room("middle", rows, x.shape[1], x.dtype))
        middle_scales = self.between.scales(middle)
        narrow, normed = place.normed(self.between, middle, middle_scales, dtype)
        gate, up = (place.workspace.take(what, (rows, len(self.gate.weight)), dtype) for what in ("gate", "up"))
        gate_low, up_low = self.gate.forward(narrow, normed, gate), self.up.forward(narrow, normed, up)
        by_gate, by_up = (room(what, rows, gate.shape[1]) for what in ("by gate", "by up"))
        product = swiglu(gate, up, by_gate, by_up, place.workspace.take("product", gate.shape, dtype))
        down_low = self.down.forward(product, product, added)
        passed = place.workspace.take(f"x {self.number + 1 if keep else self.number % 2}", middle.shape, x.dtype)
        total(middle, added, passed)
        if not keep:
            return passed, None
        return passed, Kept(
            x, scales, low, attention, from_row, attended.clone() if self.out.watched else None, out_low, middle,
            middle_scales, gate_low, up_low, by_gate, by_up, product.clone() if self.down.watched else None, down_low,
        )  # fmt: skip

    def _attend(self, qkv: Tensor, place: Place, name: str) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Query, key, value and weights of all groups, and (B T, H D) results."""
        layout, shape = place.layout, self.shape
        count, width = layout.count, layout.width
        rotate(qkv, shape, place.forward, place.workspace)
        joined = place.workspace.take("joined", (count * width, qkv.shape[1]), qkv.dtype)
        spread = layout.spread(qkv, joined).view(count, width, -1, shape.width).transpose(1, 2)  # (B, H + 2 G, T, D)
        parts = spread.split((shape.heads, shape.groups, shape.groups), 1)
        grouped_parts = []
        for what, part in zip("qkv", parts, strict=True):
            held = place.workspace.take(f"{what} {name}", part.shape, part.dtype)
            grouped_parts.append(held.copy_(part).view(count * shape.groups, -1, shape.width))
        query, key, value = grouped_parts

        def take(what: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
            return place.workspace.take(f"weights {name}" if what == "weights" else what, size, dtype)

        result, weights = grouped(query, key, value, place.bias, shape.width**-0.5, take=take)
        ordered = place.workspace.take("ordered", (count, width, shape.heads, shape.width), result.dtype)
        ordered.copy_(result.view(count, shape.heads, width, shape.width).transpose(1, 2))
        return (query, key, value, weights), ordered.view(count * width, -1)

    def backward(
        self, grad: Tensor, kept: Kept, place: Place, recorder: GradientRecorder, pairs: tuple[Pair, ...], lowest: bool
    ) -> None:
        """Turn `grad` (N, d) of the layer's output into that of its input, in place, and record what is tracked.

        `pairs` say which rows of `grad`, the last ones or all, come from the output; the lowest layer's input has no gradient.
        """
        layout = place.layout
        rows = grad[len(grad) - pairs[-1].grads.stop :]
        self._perceptron(rows, kept, place, recorder, pairs)
        deltas = place.narrow(rows, self.out.weight.dtype)
        low = self.out.low_deltas(deltas)
        if kept.attended is not None:
            inputs = _spread(kept.attended, layout, kept.from_row).to(self.out.wide)
            self._record(self.out, kept, kept.out_low, layout, recorder, inputs, deltas, low)
        size, dtype, workspace = layout.count * layout.width, deltas.dtype, place.workspace
        above = self.out.backward(deltas, low, workspace.take("above", (len(deltas), self.out.weight.shape[1]), dtype))
        padded = layout.scatter(above, workspace.take("padded", (size, above.shape[1]), dtype))
        attended = self._unattend(padded, kept, place)  # (B, T, out)
        small: Tensor | None = None
        if self.qkv.watched or self.qkv.down is not None:
            wide = attended
            if dtype != self.qkv.wide:
                wide = workspace.take("wide", attended.shape, self.qkv.wide).copy_(attended)
            small = self.qkv.low_deltas(wide)  # (B, T, r)
        if self.qkv.watched:
            normed = self.before.forward(kept.x, kept.scales) if self.qkv.sees_inputs else kept.x[:, :0]
            record(self.qkv, recorder, layout, layout.spread(normed), kept.low, wide, wide if small is None else small)
        if not lowest:
            packed = small.flatten(0, 1).index_select(0, layout.carrying) if small is not None else None
            carried = workspace.take("carried", (len(layout.carrying), attended.shape[2]), dtype)
            torch.index_select(attended.flatten(0, 1), 0, layout.carrying, out=carried)
            found = self.qkv.backward(carried, packed, workspace.take("found", grad.shape, dtype))
            self.before.backward(grad, found, kept.x, kept.scales, layout.whole, workspace)

    def _record(
        self,
        group: Group,
        kept: Kept,
        low: Tensor | None,
        layout: Layout,
        recorder: GradientRecorder,
        inputs: Tensor,
        deltas: Tensor,
        low_deltas: Tensor | None,
    ) -> None:
        """Record what is tracked of a map after attention, from (N', out) and (N', r) gradients."""
        if not group.watched:
            return
        ranks = _whole(low, kept.from_row)
        whole = layout.scatter(deltas).to(group.wide)
        record(
            group, recorder, layout, inputs, ranks, whole, whole if low_deltas is None else layout.scatter(low_deltas)
        )

    def _perceptron(
        self, grad: Tensor, kept: Kept, place: Place, recorder: GradientRecorder, pairs: tuple[Pair, ...]
    ) -> None:
        """Carry `grad` to the input of the second norm."""
        layout, dtype, workspace = place.layout, self.gate.weight.dtype, place.workspace
        deltas = place.narrow(grad, dtype)
        low = self.down.low_deltas(deltas)
        inner = workspace.take("inner", (len(grad), self.down.weight.shape[1]), dtype)  # (N, m)
        self.down.backward(deltas, low, inner)
        if kept.product is not None:
            inputs = _spread(kept.product, layout, kept.from_row).to(self.down.wide)
            self._record(self.down, kept, kept.down_low, layout, recorder, inputs, deltas, low)
        by_gate, by_up = (workspace.take(what, inner.shape, dtype) for what in ("gate", "up"))
        for a, b, d, g, u in matched(pairs, (by_gate, by_up, inner), (kept.by_gate, kept.by_up)):
            torch.mul(d, g, out=a)
            torch.mul(d, u, out=b)
        gate_low, up_low = self.gate.low_deltas(by_gate), self.up.low_deltas(by_up)
        if self.gate.watched or self.up.watched:
            inputs = _spread(self.between.forward(kept.middle, kept.middle_scales), layout, kept.from_row)
            for group, mine, its_low, small in (
                (self.gate, by_gate, kept.gate_low, gate_low),
                (self.up, by_up, kept.up_low, up_low),
            ):
                self._record(group, kept, its_low, layout, recorder, inputs, mine, small)
        found = workspace.take("found", grad.shape, dtype)
        self.gate.backward(by_gate, gate_low, found)
        self.up.backward(by_up, up_low, found, add=True)
        self.between.backward(grad, found, kept.middle, kept.middle_scales, pairs, workspace)

    def _unattend(self, grad: Tensor, kept: Kept, place: Place) -> Tensor:
        """(B, T, (H + 2 G) D) gradients of queries, keys and values before rotation from (B, T, H D) of the results."""
        layout, shape = place.layout, self.shape
        count, width = layout.count, layout.width
        query, key, value, weights = kept.attention
        above = place.workspace.take("ordered", (count, shape.heads, width, shape.width), grad.dtype)
        above = above.copy_(grad.view(count, width, shape.heads, shape.width).transpose(1, 2)).view(query.shape)
        take = place.workspace.take
        found = grouped_backward(above, query, key, value, weights, 1.0, take)  # rotating back also scales
        joined = place.workspace.take("joined", (count, width, shape.heads + 2 * shape.groups, shape.width), grad.dtype)
        parts = joined.split((shape.heads, shape.groups, shape.groups), 2)
        for part, each in zip(parts, found, strict=True):
            part.copy_(each.view(count, -1, width, shape.width).transpose(1, 2))
        joined = joined.view(count, width, -1)
        rotate(joined, shape, place.backward, place.workspace)
        return joined


def _whole(values: Tensor | None, from_row: int) -> Tensor | None:
    """Forward rows from `from_row` on, with zeros for those before."""
    if values is None or from_row == 0:
        return values
    return torch.cat([values.new_zeros(from_row, values.shape[1]), values])


def _spread(values: Tensor, layout: Layout, from_row: int) -> Tensor:
    whole = _whole(values, from_row)
    assert whole is not None
    return layout.spread(whole)
