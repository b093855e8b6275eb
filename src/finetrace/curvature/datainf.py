"""DataInf: the inverse of a mean replaced by the mean of inverses (Kwon et al., ICLR 2024, arXiv 2310.00902, Eq. 5)."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from finetrace.curvature.passes import dense_fisher, through_rows
from finetrace.curvature.products import Products, row_squares
from finetrace.curvature.segments import reciprocal, spread
from finetrace.curvature.streamed import Fetch, Streamed, made
from finetrace.curvature.train_rows import TrainRows


class DataInf:
    """P = (1/n) sum_i (lambda I + g_i g_i^T)^{-1} = (1/lambda) [I - (1/n) sum_i D_i g_i g_i^T].

    D_i = 1 / (lambda + ||g_i||^2), by Sherman and Morrison.

    V P G^T = [C - (C D) K / n] / lambda = V R^T with R = G P = [G - K D G / n] / lambda, which does not depend on V.
    """

    def __init__(self, of: Products, damping: float) -> None:
        self.of = of
        self.damping = damping

    @cached_property
    def _weights(self) -> Tensor:
        """(n,) D."""
        return 1 / (self.damping + self.of.train_sq)

    def products(self) -> Tensor:
        """(m, n) [C - (C D) K / n] / lambda; where d < n, (C D) K is taken as ((C D) G) G^T, linear in n."""
        weighted = self.of.cross * self._weights
        gradients = self.of.gradients
        if gradients is not None and gradients.width < self.of.n:
            train = gradients.train
            second = ((weighted.to(train.dtype) @ train) @ train.T).double()
        else:
            gram = self.of.kept_gram  # no solve: K's own rounding weighs as much as that of this product
            second = (weighted.to(gram.dtype) @ gram).double()
        return second.div_(-self.of.n).add_(self.of.cross).div_(self.damping)

    def rows(self) -> Tensor:
        """(n, d) R, in the precision of the gradients; where d < n, K D G is taken as G (G^T D G), linear in n."""
        assert self.of.gradients is not None, "summed products carry no gradients"
        train = self.of.gradients.train
        weighted = self._weights.to(train.dtype)[:, None] * train
        if self.of.gradients.width < self.of.n:
            second = train @ (train.T @ weighted)
        else:
            second = self.of.kept_gram.to(train.dtype) @ weighted
        return second.div_(-self.of.n).add_(train).div_(self.damping)

    def train_self(self) -> Tensor:
        """(n,) [K_ii - sum_j D_j K_ij^2 / n] / lambda."""
        return (self.of.train_sq - self.of.gram.square() @ self._weights / self.of.n) / self.damping

    def query_self(self) -> Tensor:
        """(m,) [||v||^2 - sum_j D_j C_j^2 / n] / lambda."""
        return (self.of.query_sq - self.of.cross.square() @ self._weights / self.of.n) / self.damping


class DataInfStream(Streamed):
    """P = (1/lambda) [I - (1/n) sum_i D_i g_i g_i^T] with D_i = 1 / (lambda + ||g_i||^2), as `DataInf`: one pass a call."""

    passes = True

    def __init__(self, rows: TrainRows, damping: Tensor) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out."""
        self.rows = rows
        self.damping = damping.to(rows.device)

    def apply(self, vectors: Tensor) -> Tensor:
        """(v - (1/n) sum_i D_i g_i <g_i, v>) / lambda."""
        kept = spread(reciprocal(self.damping), self.rows.segments)
        wide = vectors.to(self.rows.device).double()
        second = through_rows(self.rows, wide, lambda k, part: reciprocal(self.damping[k] + row_squares(part)))
        return (wide - second) * kept


class DenseDataInfStream(Streamed):
    """P = (I - G^T D G / n) / lambda as one d x d matrix a segment, which takes one pass to make and none to apply."""

    def __init__(self, rows: TrainRows, damping: Tensor, fetch: Fetch = made) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out. The matrices of these rows and this damping are
        what is fetched.
        """
        self.segments = rows.segments
        self.damping = damping

        matrices: list[Tensor | None] = []

        def make(k: int) -> Tensor:
            """Of all segments in one pass, where one is asked for that is not kept."""
            if not matrices:
                matrices.extend(dense_fisher(rows, damping, lambda k, part: reciprocal(damping[k] + row_squares(part))))
            matrix, matrices[k] = matrices[k], None
            assert matrix is not None
            return matrix

        self.matrices = [
            fetch(k, "datainf-matrix", partial(make, k)).to(rows.device) if float(damping[k]) > 0 else None
            for k in range(len(rows.segments))
        ]

    def apply(self, vectors: Tensor) -> Tensor:
        """(v - v G^T D G / n) / lambda."""
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for k, s in enumerate(self.segments):
            matrix = self.matrices[k]
            if matrix is not None:
                part = vectors[:, s].double()
                result[:, s] = part / self.damping[k] - part @ matrix / self.damping[k]
        return result
