"""Kronecker factors of the curvature: sums of a a^T and delta delta^T over the tokens through which the loss is reached."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from finetrace.collection.modules import Tracked, Tracking
from finetrace.forward import Batch

Labels = Literal["model", "data"]


class FactorSums:
    """For every block, sums over tokens t of the outer products of its two sides.

    A linear weight W with y_t = W a_t has left side delta_t = dL/dy_t and right side a_t (exchanged where the weight is
    stored transposed); a bias has left side delta_t and right side 1. An example's gradient is the sum over all tokens at
    which delta is not zero, and of these the prompt's are many: what a value projection makes of a prompt reaches the response
    through attention. So the sums go from an example's first token to the last one that predicts a token of the loss. What
    lies after it, and padding, carries no gradient and is in no sum. In the last layer the prompt's queries carry none either;
    they are counted there all the same, as no rule that looks at the numbers tells a zero from a rounding error.

    A batch is added by `commit`, once it is known to be whole; one that is tried again is counted once.

    Attributes:
        labels: `model` draws the labels of the loss from the model's own predictions, which makes the curvature the
            Fisher (Gauss-Newton) of the training loss; `data` takes those of the data (the empirical Fisher).
        left, right: By block name, (rows, rows) and (columns, columns), in the features' dtype, each where its layer is.
        tokens: By block name, how many tokens are in the sums.
    """

    def __init__(self, tracking: Tracking, labels: Labels, dtype: torch.dtype, device: torch.device) -> None:
        self.labels = labels
        self.dtype = dtype
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        places = {
            block.name: next(layer.module.parameters()).device
            for layer in tracking.layers
            for block in (layer.weight, layer.bias)
            if block is not None
        }
        for block in tracking.blocks:
            rows, columns = block.matrix
            where = places.get(block.name, device)
            self.left[block.name] = torch.zeros(rows, rows, dtype=dtype, device=where)
            self.right[block.name] = torch.zeros(columns, columns, dtype=dtype, device=where)
            self.tokens[block.name] = 0
        self._seen: dict[tuple[torch.device, int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._products: list[tuple[Tensor, Tensor | int]] = []  # what the batch adds, and to which sum
        self._counts: list[tuple[str, int]] = []

    def beside(self) -> FactorSums:
        """The same sums for a batch of its own, which adds to them when it is committed."""
        other = copy.copy(self)
        other._seen, other._products, other._counts = {}, [], []
        return other

    def begin(self) -> None:
        """A new batch: what was seen of one that was not committed is in no sum."""
        self._seen.clear()
        self._products.clear()
        self._counts.clear()

    def commit(self) -> None:
        """The batch is whole: add what was seen of it, which allocates nothing and so cannot stop half-way."""
        for total, product in self._products:
            total += product
        for name, count in self._counts:
            self.tokens[name] += count
        self.begin()

    def see_inputs(self, layer: Tracked, inputs: Tensor, batch: Batch) -> None:
        """Note sum_t a_t a_t^T of one call; layers that share their input (query and value projections) share its product."""
        key = (inputs.device, inputs.data_ptr(), tuple(inputs.shape))
        if key not in self._seen:
            rows = self._rows(layer, inputs, batch)
            self._seen[key] = (inputs, rows.T @ rows)  # the input is kept, so that its address is not given away again
        total = (self.left if layer.transposed else self.right)[layer.weight.name]
        self._products.append((total, self._seen[key][1].to(total.device)))
        count = len(batch.rows if layer.is_head else batch.carrying)
        self._counts.append((layer.weight.name, count))
        if layer.bias is not None:
            self._products.append((self.right[layer.bias.name], count))
            self._counts.append((layer.bias.name, count))

    def see_deltas(self, layer: Tracked, delta: Tensor, batch: Batch) -> None:
        """Note sum_t delta_t delta_t^T of one call."""
        rows = self._rows(layer, delta, batch)
        product = rows.T @ rows
        side = self.right if layer.transposed else self.left
        self._products.append((side[layer.weight.name], product))
        if layer.bias is not None:
            self._products.append((self.left[layer.bias.name], product))

    def _rows(self, layer: Tracked, values: Tensor, batch: Batch) -> Tensor:
        """(S, d) values at the positions that carry gradient; the vocabulary projection sees no others."""
        flat = values.reshape(-1, values.shape[-1])
        rows = flat[: len(batch.rows)] if layer.is_head else flat.index_select(0, batch.carrying.to(flat.device))
        return rows.to(self.dtype)


def sampled_targets(logits: Tensor, batch: Batch, ids: Sequence[str]) -> Tensor:
    """(R,) one token drawn from the model's own prediction at every row of (R, vocabulary) logits."""
    return drawn(logits, uniforms(batch, ids))


def uniforms(batch: Batch, ids: Sequence[str]) -> Tensor:
    """(R,) random numbers in [0, 1), float64: fixed by the example's id, so that no draw depends on the batch that an
    example travels in.
    """
    return torch.cat([_uniform(id_, count) for id_, count in zip(ids, batch.counts, strict=True)])


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """(R,) one token at every row of (R, vocabulary) logits, drawn with the (R,) random numbers."""
    wide = logits.detach()
    total = torch.softmax(wide, dim=-1, dtype=torch.float64 if wide.dtype == torch.float64 else torch.float32).cumsum(
        -1
    )
    wanted = uniform.to(total.device, total.dtype).unsqueeze(1) * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def sampled_loss(losses: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens of sqrt(w_t) times the log-loss of a drawn token.

    Drawn tokens make the scores of different positions uncorrelated, so an example's gradient of this has the second
    moment sum_t w_t F_t: the Fisher of the example's own mean loss, exactly in expectation.
    """
    return (losses * batch.weights.sqrt().to(losses.dtype)).sum()


def _uniform(name: str, count: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(f"sampled labels\0{name}".encode()).digest()[:8], "little") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
