"""No curvature: P = I."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finetrace.curvature.products import Products


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
