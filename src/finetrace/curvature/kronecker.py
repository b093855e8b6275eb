"""K-FAC and EK-FAC: the curvature of a weight matrix as a Kronecker product (arXiv 1503.05671, 1806.03884, 2308.03296)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finetrace.curvature.products import Gradients, Products
from finetrace.curvature.streamed import Streamed


def eigen(total: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(d,) eigenvalues and (d, d) eigenvectors, as columns, of a (d, d) sum over tokens by their number, in float64."""
    tokens = max(1, tokens)  # a layer that no token reached has zero sums, and any basis
    values, vectors = torch.linalg.eigh(total.double() / tokens)
    return values, vectors


@dataclass(frozen=True, eq=False)
class KroneckerBasis:
    """The eigenbasis Q_L x Q_R of one block's curvature, and its eigenvalues there.

    Attributes:
        left: (r, r), columns are eigenvectors of the left factor L = E[delta delta^T].
        right: (c, c), of the right factor R = E[a a^T].
        kfac: (r, c), outer product of the factors' eigenvalues times tokens an example.
        ekfac: (r, c), mean over examples of the squared entries of Q_L^T G_i Q_R: the best diagonal in this basis.
    """

    left: Tensor
    right: Tensor
    kfac: Tensor
    ekfac: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, tokens: int, examples: int) -> KroneckerBasis:
        """From sums over tokens (r, r) and (c, c), in float64; `ekfac` is zero until `corrected`.

        The mean over examples of an example's summed outer products is (tokens / examples) x L kron R, with L and R the
        means over tokens.
        """
        return cls.from_eigen(eigen(left, tokens), eigen(right, tokens), tokens, examples)

    @classmethod
    def from_eigen(
        cls, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], tokens: int, examples: int
    ) -> KroneckerBasis:
        """From what `eigen` makes of both sums."""
        (left_values, left_basis), (right_values, right_basis) = left, right
        share = max(1, tokens) / examples
        values = left_values.clamp_min(0)[:, None] * right_values.clamp_min(0)[None, :] * share
        return cls(left_basis, right_basis, values, torch.zeros_like(values))

    def corrected(self, squares: Tensor) -> KroneckerBasis:
        """With `ekfac` set to (r, c) mean squares of rotated gradients."""
        return KroneckerBasis(self.left, self.right, self.kfac, squares)

    def rotate(self, rows: Tensor) -> Tensor:
        """(n, r c) flattened gradients to (n, r, c) Q_L^T G Q_R, in the dtype of `rows`."""
        left, right = self.left.to(rows), self.right.to(rows)
        return left.T @ rows.view(len(rows), len(left), len(right)) @ right

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """(n, r, c) to flattened (n, r c) Q_L X Q_R^T."""
        left, right = self.left.to(rotated), self.right.to(rotated)
        return (left @ rotated @ right.T).flatten(1)


class Kronecker:
    """P = (Q_L x Q_R) (Lambda + lambda I)^{-1} (Q_L x Q_R)^T, lambda = multiple x mean of Lambda."""

    def __init__(self, of: Products, basis: KroneckerBasis, eigenvalues: Tensor, multiple: float) -> None:
        self.of = of
        self.basis = basis
        self.damping = multiple * float(eigenvalues.mean())
        self._inverse = 1 / (eigenvalues.double() + self.damping)  # (r, c)

    def products(self) -> Tensor:
        """(m, n) the queries preconditioned in the eigenbasis, against the gradients as they are."""
        rotated = self._query * self._inverse.to(self._query)
        train = self._gradients.train
        return (self.basis.rotate_back(rotated).to(train.dtype) @ train.T).double()

    def train_self(self) -> Tensor:
        """(n,) sum of squared rotated entries over Lambda + lambda."""
        return self._weighted_squares(self.basis.rotate(self._gradients.train))

    def query_self(self) -> Tensor:
        """(m,) the same of the queries."""
        return self._weighted_squares(self._query)

    def _weighted_squares(self, rotated: Tensor) -> Tensor:
        squares = rotated.square().flatten(1)
        return (squares @ self._inverse.flatten().to(squares)).double()

    @cached_property
    def _query(self) -> Tensor:
        """(m, r, c)."""
        return self.basis.rotate(self._gradients.query)

    @property
    def _gradients(self) -> Gradients:
        assert self.of.gradients is not None, "a Kronecker curvature needs the gradients themselves"
        return self.of.gradients


class KroneckerStream(Streamed):
    """P = (Q_L x Q_R) (Lambda + lambda I)^{-1} (Q_L x Q_R)^T in every segment, as `Kronecker`."""

    def __init__(
        self,
        segments: Sequence[slice],
        bases: Sequence[KroneckerBasis | None],
        eigenvalues: Sequence[Tensor],
        multiple: float,
    ) -> None:
        """`None` in place of a basis leaves a segment out."""
        self.segments = segments
        self.bases = bases
        self.inverses = [1 / (each.double() + multiple * float(each.mean())) for each in eigenvalues]

    def apply(self, vectors: Tensor) -> Tensor:
        """The vectors preconditioned in the eigenbasis."""
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for s, basis, inverse in zip(self.segments, self.bases, self.inverses, strict=True):
            if basis is not None:
                rotated = basis.rotate(vectors[:, s].contiguous())
                result[:, s] = basis.rotate_back(rotated * inverse.to(rotated)).double()
        return result
