"""Gradients on disk in fewer bits: narrowed when a shard is written, widened block by block when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetrace.collection import Block
from finetrace.errors import FinetraceError

FeatureDtype = Literal["float32", "bfloat16", "float16"]
LARGEST_ERROR = 2.0**-7  # twice the unit roundoff of bfloat16: more than rounding alone can do
TOP = 15  # a block's largest entry is brought below 2^15 in float16, so that even sums of rounding stay below 65504


@dataclass(frozen=True)
class Narrowed:
    """Rows as they are written.

    Attributes:
        rows: (rows, D) in the dtype of the disk.
        exponents: (rows, blocks) int8, for float16 alone: what is stored of a row's block is its gradient over 2^exponent.
        rounding: Largest relative error ||stored - g|| / ||g|| of a row.
    """

    rows: Tensor
    exponents: Tensor | None
    rounding: float


def narrow(rows: Tensor, dtype: torch.dtype, blocks: Sequence[Block], ids: Sequence[str] = ()) -> Narrowed:
    """(rows, D) gradients rounded to `dtype`.

    A gradient of a mean loss may be smaller than float16 can tell from zero (6e-8) or larger than it can hold (65504), so
    each row's part of each block is scaled by a power of two of its own, which rounds nothing.

    Raises:
        FinetraceError: A row's part of a block would lose more than rounding takes, as it lies outside of the dtype's range.
    """
    if rows.dtype == dtype:
        return Narrowed(rows, None, 0.0)
    stored = torch.empty(rows.shape, dtype=dtype)
    scaling = dtype == torch.float16
    exponents = torch.zeros(len(rows), len(blocks), dtype=torch.int8) if scaling else None
    errors, sizes = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for i, block in enumerate(blocks):
        part = rows[:, block.columns]
        if exponents is not None:
            top = torch.frexp(part.abs().amax(1)).exponent - TOP
            exponents[:, i] = top.clamp(-126, 126)
            stored[:, block.columns] = part * _power(-exponents[:, i : i + 1]).to(part)
        else:
            stored[:, block.columns] = part
        back = widen(stored, exponents, block.columns, blocks, rows.dtype)
        error = torch.linalg.vector_norm(back - part, dim=1, dtype=torch.float64)
        size = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
        lost = ~(error <= LARGEST_ERROR * size)  # not finite counts as lost
        if lost.any():
            row = int(lost.nonzero()[0])
            name = f"example {ids[row]}" if ids else f"row {row + 1} of its shard"
            raise FinetraceError(
                f"{name}: its gradient in {block.name} (norm {float(size[row]):.1e}) lies outside of what "
                f"{str(dtype).removeprefix('torch.')} can hold; use --feature-dtype float32."
            )
        errors += error.square()
        sizes += size.square()
    relative = (errors / sizes.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return Narrowed(stored, exponents, float(relative.max()) if len(rows) else 0.0)


def widen(
    stored: Tensor, exponents: Tensor | None, columns: slice, blocks: Sequence[Block], dtype: torch.dtype
) -> Tensor:
    """(rows, columns) of stored (rows, D) gradients in `dtype`, in which products are taken.

    What is stored in `dtype` already comes back as a view; else it is a copy of these columns alone.
    """
    start, stop, _ = columns.indices(stored.shape[1])
    part = stored[:, start:stop].to(dtype)
    if exponents is not None:
        scale(part, exponents, start, blocks)
    return part


def scale(part: Tensor, exponents: Tensor, start: int, blocks: Sequence[Block]) -> None:
    """Multiply (rows, c) columns from `start` on by 2^exponent of their row and block, in place."""
    stop = start + part.shape[1]
    for i, block in enumerate(blocks):
        first, last = max(start, block.columns.start), min(stop, block.columns.stop)
        if first < last:
            part[:, first - start : last - start] *= _power(exponents[:, i : i + 1]).to(part.dtype)


def _power(exponents: Tensor) -> Tensor:
    """2^exponent in float32, exactly, for exponents from -126 to 127."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)
