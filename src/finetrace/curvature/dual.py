"""(F + lambda I) x = q through the n x n Gram matrix of each segment's rows."""

from __future__ import annotations

import torch
from torch import Tensor

from finetrace.curvature.fisher import FisherDual
from finetrace.curvature.products import Products
from finetrace.curvature.refinement import Solution, refined
from finetrace.curvature.streamed import Fetch, Streamed, made
from finetrace.curvature.train_rows import ColumnRows, TrainRows


class DualStream(Streamed):
    """P = (F + lambda I)^{-1} through the n x n Gram matrix of one segment after another (Woodbury).

    (F + lambda I)^{-1} q = (q - G^T beta) / lambda with (K + n lambda I) beta = G q; the gradients are read by columns.
    """

    passes = True

    def __init__(self, rows: ColumnRows, damping: Tensor, tolerance: float, fetch: Fetch = made) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out. The factors of these rows and this damping are
        what is fetched.
        """
        self.rows = rows
        self.damping = damping.to(rows.device)
        self.tolerance = tolerance
        self.fetch = fetch
        self.found = Solution("dual")

    def apply(self, vectors: Tensor) -> Tensor:
        """(m, D) solutions, as near as `tolerance`."""
        alone = len(self.rows.segments) == 1 and float(self.damping[0]) > 0
        factors = [self._factor(0)] if alone else None

        def solve(left: Tensor) -> Tensor:
            result = torch.zeros_like(left)
            for k, s in enumerate(self.rows.segments):
                if float(self.damping[k]) <= 0:
                    continue
                factor = factors[k] if factors is not None else self._factor(k)
                cross = torch.zeros(len(left), self.rows.n, dtype=torch.float64, device=left.device)
                for c, part in self.rows.columns(s):
                    cross += (left[:, c].to(part.dtype) @ part.T).double()
                beta = torch.cholesky_solve(cross.T, factor).T.to(self.rows.dtype)
                for c, part in self.rows.columns(s):
                    result[:, c] = (left[:, c] - beta @ part) / self.damping[k]
            return result

        return refined(self.rows, self.damping, vectors, solve, self.tolerance, self.found)

    def own(self, rows: TrainRows, tile: int) -> Tensor:
        """(n,) sum over segments of diag(G P G^T)."""
        total = torch.zeros(self.rows.n, dtype=torch.float64, device=self.rows.device)
        for k in range(len(self.rows.segments)):
            if float(self.damping[k]) > 0:
                gram = self._gram(k)
                nothing = gram.new_zeros(0, self.rows.n)
                known = Products.known(gram, nothing, gram.diagonal().clone(), gram.new_zeros(0))
                total += FisherDual(known, float(self.damping[k])).train_self()
        return total.cpu()

    def _gram(self, k: int) -> Tensor:
        """(n, n) K of a segment, float64."""
        gram = torch.zeros(self.rows.n, self.rows.n, dtype=torch.float64, device=self.rows.device)
        for _, part in self.rows.columns(self.rows.segments[k]):
            gram += (part @ part.T).double()
        return gram

    def _factor(self, k: int) -> Tensor:
        def make() -> Tensor:
            shifted = self._gram(k)
            shifted.diagonal().add_(self.rows.n * float(self.damping[k]))
            return torch.linalg.cholesky(shifted).mT  # upper, as it lies in memory

        return self.fetch(k, "dual-factor", make).to(self.rows.device).mT
