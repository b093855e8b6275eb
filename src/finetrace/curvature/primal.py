"""(F + lambda I) x = q through a Cholesky factor of each segment's d x d matrix."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from finetrace.curvature.passes import dense_fisher
from finetrace.curvature.refinement import Solution, refined
from finetrace.curvature.streamed import Fetch, Streamed, made
from finetrace.curvature.train_rows import TrainRows


class PrimalStream(Streamed):
    """P = (F + lambda I)^{-1} by a Cholesky factor of each segment's d x d matrix; queries are measured and refined."""

    def __init__(self, rows: TrainRows, damping: Tensor, tolerance: float, fetch: Fetch = made) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out. The factors of these rows and this damping are
        what is fetched.
        """
        self.rows = rows
        self.damping = damping
        self.tolerance = tolerance
        self.found = Solution("primal")

        matrices: list[Tensor | None] = []

        def make(k: int) -> Tensor:
            """Of all segments in one pass, where one is asked for that is not kept; upper, as it lies in memory."""
            if not matrices:
                self.found.passes += 1
                matrices.extend(dense_fisher(rows, damping))
            matrix, matrices[k] = matrices[k], None
            assert matrix is not None
            return torch.linalg.cholesky(matrix).mT

        self.factors = [
            fetch(k, "primal-factor", partial(make, k)).to(rows.device).mT if float(damping[k]) > 0 else None
            for k in range(len(rows.segments))
        ]

    def apply(self, vectors: Tensor) -> Tensor:
        """(m, D) solutions, as the factors give them."""
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for s, factor in zip(self.rows.segments, self.factors, strict=True):
            if factor is not None:
                result[:, s] = torch.cholesky_solve(vectors[:, s].double().T, factor).T
        return result

    def solve(self, vectors: Tensor) -> Tensor:
        """(m, D) solutions, as near as `tolerance`."""
        return refined(self.rows, self.damping, vectors, self.apply, self.tolerance, self.found)
