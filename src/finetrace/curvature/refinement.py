"""Iterative refinement of (F + lambda I) x = q: a solution is measured in float64, and what is left is solved again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.curvature.passes import through_rows
from finetrace.curvature.segments import reciprocal, segment_dots, spread
from finetrace.curvature.train_rows import TrainRows
from finetrace.errors import FinetraceError

REFINEMENTS = 6  # solutions of what the one before left, each measured in float64


def default_tolerance(dtype: torch.dtype) -> float:
    """What a solution has to meet: 1e-6 on float32 rows, 1e-10 on float64 ones."""
    return 1e-10 if dtype == torch.float64 else 1e-6


@dataclass
class Solution:
    """What was solved, and how well.

    Attributes:
        solver: Which one.
        residual: The largest ||(F + lambda) x - q|| / ||q|| of a query and segment, measured by products in float64.
        passes: Over the rows, those that measure included.
    """

    solver: str
    residual: float = 0.0
    passes: int = 0


def refined(
    rows: TrainRows,
    damping: Tensor,
    vectors: Tensor,
    solve: Callable[[Tensor], Tensor],
    tolerance: float,
    found: Solution,
) -> Tensor:
    """(m, D) x with (F + lambda I) x = q, solved again on what is left until it is as near as `tolerance`.

    Args:
        rows: The training rows.
        damping: (S,) lambda; a segment whose lambda is 0 is left out, and x is 0 there.
        vectors: (m, D) q.
        solve: Takes right-hand sides to approximate solutions.
        tolerance: The largest ||(F + lambda I) x - q|| / ||q|| allowed of a query and segment.
        found: Gets the residual reached and the passes made.

    Raises:
        FinetraceError: The tolerance is not met.
    """
    segments = rows.segments
    shift = spread(damping.to(rows.device), segments)
    present = (shift > 0).double()
    wanted = vectors.to(rows.device).double() * present
    size = segment_dots(wanted, wanted, segments).sqrt()  # (m, S)
    solution, left = torch.zeros_like(wanted), wanted
    worst, before = 1.0, float("inf")
    for _ in range(REFINEMENTS):
        solution = solution + solve(left)
        left = wanted - through_rows(rows, solution, exact=True) * present - shift * solution
        found.passes += 1
        worst = float((segment_dots(left, left, segments).sqrt() * reciprocal(size)).max())
        if worst <= tolerance or not worst < 0.5 * before:
            break
        before = worst
    found.residual = max(found.residual, worst)
    if not worst <= tolerance:
        raise FinetraceError(
            f"exact: solver {found.solver} reaches a relative residual of {worst:.1e}, not the tolerance {tolerance:.0e}; "
            "use more damping, or a larger tolerance."
        )
    return solution
