"""Training gradients that are gone through, whether they are held in memory or read from disk.

n rows, D columns, S segments: the blocks of a curvature, side by side in a row (all columns are one segment for the scope
`joint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TrainRows(Protocol):
    """Training gradients that can be gone through again and again.

    Attributes:
        n: Rows.
        segments: Columns of each segment.
        dtype: Of the rows as they come: float32 or float64.
        device: Where they come.
    """

    n: int
    segments: Sequence[slice]
    dtype: torch.dtype
    device: torch.device

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (r, D)), from the first row to the last; what is yielded must not be kept."""
        ...

    def some(self, where: slice) -> Tensor:
        """(r, D) of some rows, which may be kept."""
        ...


class ColumnRows(TrainRows, Protocol):
    """Training gradients that can be read by columns too."""

    def columns(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(columns, (n, c)) pieces of some columns."""
        ...


@dataclass(frozen=True, eq=False)
class HeldRows:
    """(n, D) gradients in memory as `TrainRows`, `step` rows at a time."""

    train: Tensor
    segments: Sequence[slice]
    step: int = 256

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.train)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.train.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.train.device

    def some(self, where: slice) -> Tensor:
        """(r, D)."""
        return self.train[where]

    def columns(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(columns, (n, c)) the chosen columns, all at once."""
        yield chosen, self.train[:, chosen]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Views of the rows."""
        for start in range(0, self.n, self.step):
            where = slice(start, min(start + self.step, self.n))
            yield where, self.train[where]
