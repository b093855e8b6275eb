"""What a curvature offers: products with its inverse, and the two self-influences that normalise them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class InverseCurvature(Protocol):
    """A symmetric positive operator P, an inverse or an approximation of one, between gradients of one block."""

    def products(self) -> Tensor:
        """(m, n) V P G^T: the predicted decrease of each query's loss per unit of up-weighting, float64."""
        ...

    def train_self(self) -> Tensor:
        """(n,) diag(G P G^T): each training example's self-influence, float64."""
        ...

    def query_self(self) -> Tensor:
        """(m,) diag(V P V^T), float64."""
        ...
