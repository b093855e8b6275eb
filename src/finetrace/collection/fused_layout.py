"""Which tokens of a batch the fused pass computes, and in what order they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.forward import Batch


@dataclass(frozen=True)
class Pair:
    """Rows of a backward matrix, seen as `shape` of rows, and the forward rows that they belong to."""

    grads: slice
    shape: tuple[int, ...]
    saved: slice


@dataclass(frozen=True)
class Layout:
    """Rows without padding, in two orders.

    Forward: the opening that all examples share, once; then what is each example's own: tokens that only lead to the loss,
    further ones whose hidden state is wanted, those that predict a token of the loss, and those after the last such one.
    Backward: the opening once for every example, whose gradients differ; then the own tokens in the same order, without the
    last kind, which no gradient reaches. Tokens that nothing asks for are in neither.

    Attributes:
        count, width: B and T of the batch.
        ids, positions: (F,) token and place in its example of every forward row.
        places: (F,) place b * T + t of every forward row; of a shared one, that in the first example.
        source: (B * T,) the forward row of every place; where nothing is computed, that of the example's last row.
        carrying: (N,) place b * T + t of every backward row.
        wanted: The first forward row whose hidden state is wanted; all after it are, or lie behind the loss.
        loss: Forward rows that predict a token of the loss, in the order of `Batch.rows`; in the backward order they are
            the last ones.
        whole: How all backward rows match forward rows.
        last: How the rows of the loss match the forward rows from `wanted` on.
    """

    count: int
    width: int
    ids: Tensor
    positions: Tensor
    places: Tensor
    source: Tensor
    carrying: Tensor
    wanted: int
    loss: slice
    whole: tuple[Pair, ...]
    last: tuple[Pair, ...]

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Of a batch padded on the right alone; the same whatever is asked for, so that equal batches give equal bits."""
        count, width = batch.ids.shape
        example = torch.arange(count)
        rows = torch.zeros(count * width, dtype=torch.bool)
        rows[batch.rows] = True
        needed = rows.clone()
        needed[batch.rows + 1] = True  # whose hidden states may be pooled, as those of prompts' ends
        needed[example * width + torch.tensor(batch.prompt_lengths) - 1] = True
        places = torch.arange(width)
        rows, needed = rows.view(count, width), needed.view(count, width)
        last_row = torch.where(rows, places, -1).amax(1, keepdim=True)  # (B, 1)
        last = torch.where(needed, places, -1).amax(1, keepdim=True)
        shared = 0
        if count > 1:
            alike = (batch.ids == batch.ids[0]).all(0) & ~needed.any(0)
            shared = int(alike.long().cumprod(0).sum())
        kind = torch.where(rows, 2, torch.where(needed, 1, 0))
        kind = torch.where(places > last_row, 3, kind)
        own = (places >= shared) & (places <= last)
        chosen = own.flatten().nonzero().squeeze(1)
        order = torch.argsort(kind.flatten()[chosen], stable=True)
        chosen = chosen[order]
        counts = torch.bincount(kind.flatten()[chosen], minlength=4).tolist()
        opening = torch.arange(shared)
        source = torch.full((count * width,), -1)
        source[chosen] = shared + torch.arange(len(chosen))
        source = source.view(count, width)
        source = torch.where(source < 0, source.gather(1, last), source)
        source[:, :shared] = opening
        every = torch.cat([opening, chosen])
        reached = counts[0] + counts[1] + counts[2]
        repeated = (example[:, None] * width + opening).flatten()
        whole = [Pair(slice(0, count * shared), (count, shared), slice(0, shared))] if shared else []
        whole.append(Pair(slice(count * shared, count * shared + reached), (reached,), slice(shared, shared + reached)))
        start = shared + counts[0]
        return cls(
            count=count,
            width=width,
            ids=batch.ids.flatten()[every],
            positions=every % width,
            places=every,
            source=source.flatten(),
            carrying=torch.cat([repeated, chosen[:reached]]),
            wanted=start,
            loss=slice(start + counts[1], shared + reached),
            whole=tuple(whole),
            last=(Pair(slice(0, counts[2]), (counts[2],), slice(counts[1], counts[1] + counts[2])),),
        )

    @property
    def key(self) -> bytes:
        """Tells batches apart whose forward rows differ."""
        size = f"fused {self.count} {self.width} {len(self.ids)}|".encode()
        return size + self.ids.numpy().tobytes() + self.places.numpy().tobytes()

    def spread(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """(F, d) forward rows as (B, T, d); `out` is memory of (B T, d)."""
        return torch.index_select(values, 0, self.source, out=out).view(self.count, self.width, -1)

    def scatter(self, grads: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, d) backward rows, or the last ones of them, as (B, T, d) with zeros elsewhere; `out` is memory of (B T, d)."""
        padded = grads.new_zeros(self.count * self.width, grads.shape[1]) if out is None else out.zero_()
        padded.index_copy_(0, self.carrying[len(self.carrying) - len(grads) :], grads)
        return padded.view(self.count, self.width, -1)


def matched(
    pairs: tuple[Pair, ...], grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Views of backward matrices (N, .) and of forward ones (F, .) that broadcast against each other, part by part."""
    for pair in pairs:
        yield (
            *(each[pair.grads].view(*pair.shape, each.shape[1]) for each in grads),
            *(each[pair.saved] for each in saved),
        )
