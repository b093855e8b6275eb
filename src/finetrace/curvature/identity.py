"""No curvature: P = I."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetrace.curvature.passes import Sizes
from finetrace.curvature.products import Products
from finetrace.curvature.segments import spread
from finetrace.curvature.streamed import Streamed
from finetrace.curvature.train_rows import TrainRows


@dataclass(frozen=True)
class Identity:
    """P = I, so V P G^T = C: plain inner products of gradients."""

    of: Products

    def products(self) -> Tensor:
        """(m, n) C."""
        return self.of.cross

    def train_self(self) -> Tensor:
        """(n,) squared norms."""
        return self.of.train_sq

    def query_self(self) -> Tensor:
        """(m,) squared norms."""
        return self.of.query_sq


class IdentityStream(Streamed):
    """P = I on the segments that have a gradient."""

    def __init__(self, rows: TrainRows, sizes: Sizes | None = None) -> None:
        """Without `sizes` no segment is left out, which changes nothing but the queries' own norms."""
        self.squares = None if sizes is None else sizes.squares
        self.present = None if sizes is None else spread((sizes.traces > 0).double(), rows.segments)

    def apply(self, vectors: Tensor) -> Tensor:
        """v."""
        wide = vectors.double()
        return wide if self.present is None else wide * self.present.to(wide)

    def own(self, rows: TrainRows, tile: int) -> Tensor:
        """(n,) squared norms."""
        return super().own(rows, tile) if self.squares is None else self.squares
