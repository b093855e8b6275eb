"""The training gradients of an index, read from disk in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from finetrace.attribution.threads import beside_a_reader
from finetrace.collection import Block
from finetrace.curvature.products import COLUMNS
from finetrace.index.store import Index

PIECE = 2 << 20  # bytes of widened rows at a time, which the processor's caches hold
FEWEST = 64  # rows in a piece, where a block has as many: products of fewer are slow


class StoredRows:
    """The gradients of some blocks of an index as `TrainRows`: read in row blocks, widened piece by piece.

    Attributes:
        segments: One a block, or a single one of all columns.
        step: Rows that are read at once.
    """

    def __init__(self, index: Index, blocks: Sequence[Block], step: int, *, joint: bool, device: torch.device) -> None:
        self.index = index
        self.blocks = tuple(blocks)
        self.step = step
        self.joint = joint
        self.device = device
        self.n = len(index)
        self._first = min(block.offset for block in blocks)
        stop = max(block.columns.stop for block in blocks)
        self._range = slice(self._first, stop)
        self._gather: Tensor | None = None
        widths = [block.size for block in blocks]
        if sum(widths) != stop - self._first:  # layers that do not follow one another
            places = [torch.arange(block.offset, block.offset + block.size) for block in blocks]
            self._gather = torch.cat(places) - self._first
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        self.blocks_at = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
        self.segments: Sequence[slice] = [slice(0, ends[-1])] if joint else self.blocks_at
        self.dtype = index.manifest.computed_dtype

    @property
    def width(self) -> int:
        """D of the chosen blocks."""
        return self.blocks_at[-1].stop

    def by_block(self) -> StoredRows:
        """The same with a segment a block."""
        return StoredRows(self.index, self.blocks, self.step, joint=False, device=self.device) if self.joint else self

    def part(self, blocks: Sequence[Block]) -> StoredRows:
        """The same rows, some of the blocks."""
        return StoredRows(self.index, blocks, self.step, joint=self.joint, device=self.device)

    def chosen(self, vectors: Tensor) -> Tensor:
        """(r, D) of the chosen blocks out of whole gradients, in the rows' precision."""
        parts = [vectors[:, run] for run in adjacent(self.blocks)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(self.device, self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (r, D)) pieces."""
        widened = self._widening()
        for where, raw in self.index.row_blocks(self.step, self._range):
            for first in range(0, len(raw), self.piece):
                part = widened(raw[first : first + self.piece])
                yield slice(where.start + first, where.start + first + len(part)), part

    def products(self, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (r, m)) inner products with (m, D) vectors, float64, a block of rows at a time.

        Products of `COLUMNS` entries are taken in the rows' precision and summed in float64.
        """
        right = vectors.to(self.dtype).T
        starts = range(0, self.width, COLUMNS)
        widened = self._widening()
        product = torch.empty(min(self.step, self.n), len(vectors), dtype=self.dtype, device=self.device)
        with beside_a_reader(len(vectors)):
            for where, raw in self.index.row_blocks(self.step, self._range):
                shape = len(raw), len(vectors)
                product = product[: len(raw)]
                total = torch.zeros(shape, dtype=torch.float64, device=self.device) if len(starts) > 1 else None
                for first in range(0, len(raw), self.piece):
                    part, at = widened(raw[first : first + self.piece]), slice(first, first + self.piece)
                    for start in starts:
                        columns = slice(start, start + COLUMNS)
                        torch.mm(part[:, columns], right[columns], out=product[at])
                        if total is not None:
                            total[at] += product[at]
                yield where, product.to(torch.float64, copy=True) if total is None else total

    @property
    def piece(self) -> int:
        """Rows that are widened at once."""
        if self.device.type != "cpu":
            return self.step
        return min(self.step, max(FEWEST, PIECE // (self.width * self.dtype.itemsize)))

    def _widening(self) -> Callable[[Tensor], Tensor]:
        """What takes stored rows to the chosen blocks in the rows' precision; each result may overwrite the last."""
        wide: Tensor | None = None

        def widened(part: Tensor) -> Tensor:
            nonlocal wide
            if self._gather is not None:
                part = part[:, self._gather]
            if self.device.type != "cpu":
                return part.to(self.device).to(self.dtype)
            if part.dtype == self.dtype:
                return part
            wide = torch.empty(self.piece, self.width, dtype=self.dtype) if wide is None else wide
            return wide[: len(part)].copy_(part)

        return widened

    def some(self, where: slice) -> Tensor:
        """(r, D) of some rows."""
        part = self.index.gradients(self._range, where)
        return (part if self._gather is None else part[:, self._gather]).to(self.device, self.dtype)

    def columns(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(columns, (n, c)) pieces of some columns, as large as the blocks of rows are."""
        room = max(1, self.step * self.width // self.n)
        for block, at in zip(self.blocks, self.blocks_at, strict=True):
            for start in range(max(at.start, chosen.start), min(at.stop, chosen.stop), room):
                stop = min(start + room, at.stop, chosen.stop)
                places = slice(block.offset + start - at.start, block.offset + stop - at.start)
                whole = next(iter(self.index.row_blocks(self.n, places)))[1]
                yield slice(start, stop), whole.to(self.device, self.dtype)


def adjacent(blocks: Sequence[Block]) -> list[slice]:
    """The columns of some blocks in their order, those that follow one another joined."""
    runs: list[slice] = []
    for block in blocks:
        if runs and runs[-1].stop == block.offset:
            runs[-1] = slice(runs[-1].start, block.columns.stop)
        else:
            runs.append(block.columns)
    return runs
