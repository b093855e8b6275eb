"""(F + lambda I) x = q through a Cholesky factor of each segment's d x d matrix."""

from __future__ import annotations

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

        def make() -> dict[str, Tensor]:
            self.found.passes += 1
            matrices = dense_fisher(rows, damping)
            return {str(k): torch.linalg.cholesky(m) for k, m in enumerate(matrices) if m is not None}

        factors = {int(k): factor.to(rows.device) for k, factor in fetch("primal-factors", make).items()}
        self.factors = [factors.get(k) for k in range(len(rows.segments))]

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
