"""An inverse curvature of training gradients that are never held: vectors go in, passes over the rows do the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from finetrace.curvature.train_rows import TrainRows

Fetch = Callable[[int, str, Callable[[], Tensor]], Tensor]  # what is kept of a segment by a name, or made now


def made(segment: int, name: str, make: Callable[[], Tensor]) -> Tensor:
    """A `Fetch` that keeps nothing."""
    return make()


class Streamed(ABC):
    """An inverse curvature P over all segments.

    Attributes:
        passes: Whether `apply` goes over the training rows.
        rounding: What products in the rows' precision may add to the residual of what was solved.
    """

    passes: bool = False
    rounding: float = 0.0

    @abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """(r, D) vectors to (r, D) P v, float64."""

    def solve(self, vectors: Tensor) -> Tensor:
        """The same for queries: as near as was asked for, where P is found by solving."""
        return self.apply(vectors)

    def own(self, rows: TrainRows, tile: int) -> Tensor:
        """(n,) g_i^T P g_i, float64: in one pass where P takes none, else with `tile` rows at a time as queries."""
        total = torch.zeros(rows.n, dtype=torch.float64)
        if not self.passes:
            for where, block in rows:
                total[where] = (block.double() * self.apply(block)).sum(1).cpu()
            return total
        for first in range(0, rows.n, tile):
            where = slice(first, min(first + tile, rows.n))
            held = rows.some(where)
            total[where] = (held.double() * self.apply(held)).sum(1).cpu()
        return total
