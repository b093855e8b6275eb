"""(F + lambda I) x = q by products alone: conjugate gradients, plain or preconditioned by a Nystroem sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from finetrace.curvature.nystroem import Sketch
from finetrace.curvature.passes import through_rows
from finetrace.curvature.refinement import Solution, refined
from finetrace.curvature.segments import reciprocal, segment_dots, spread
from finetrace.curvature.streamed import Streamed
from finetrace.curvature.train_rows import TrainRows

MOST = 1000  # iterations of one run of conjugate gradients


class IterativeStream(Streamed):
    """P = (F + lambda I)^{-1} by conjugate gradients, preconditioned where there is a sketch.

    Solved in the rows' precision, measured in float64, and what is left is solved again until `tolerance` is met.
    """

    passes = True

    def __init__(
        self, rows: TrainRows, damping: Tensor, tolerance: float, sketch: Sketch | None = None, *, passed: int = 0
    ) -> None:
        """`passed` passes over the rows were made for the sketch."""
        self.rows = rows
        self.damping = damping.to(rows.device)
        self.tolerance = tolerance
        self.sketch = sketch
        self.found = Solution("cg" if sketch is None else "nystroem", passes=passed)

    def apply(self, vectors: Tensor) -> Tensor:
        """(m, D) solutions, as near as `tolerance`."""
        return refined(self.rows, self.damping, vectors, self._run, self.tolerance, self.found)

    def _run(self, wanted: Tensor) -> Tensor:
        """Conjugate gradients until every residual is a little below the tolerance, relative to what it was."""
        segments = self.rows.segments
        shift = spread(self.damping, segments)
        reach = max(0.3 * self.tolerance, torch.finfo(self.rows.dtype).eps)
        goal = reach * segment_dots(wanted, wanted, segments).sqrt()
        solution, residual = torch.zeros_like(wanted), wanted
        direction = self._preconditioned(residual)
        product = segment_dots(residual, direction, segments)
        for _ in range(MOST):
            active = segment_dots(residual, residual, segments).sqrt() > goal
            if not active.any():
                break
            image = through_rows(self.rows, direction) + shift * direction
            self.found.passes += 1
            step = spread(product * reciprocal(segment_dots(direction, image, segments)) * active, segments)
            solution = solution + step * direction
            residual = residual - step * image
            ready = self._preconditioned(residual)
            now = segment_dots(residual, ready, segments)
            direction = ready + spread(now * reciprocal(product), segments) * direction
            product = now
        return solution

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return residual if self.sketch is None else self.sketch.precondition(residual, self.damping, self.rows.segments)
