"""Sums over one pass of the training rows: norms, products with the empirical Fisher, the Fisher itself.

Products are taken in the rows' precision, float32 or wider, and summed over rows in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetrace.curvature.products import row_squares
from finetrace.curvature.train_rows import TrainRows

FLUSH = 4096  # rows whose d x d products are summed in the rows' precision before they go to float64


@dataclass(frozen=True, eq=False)
class Sizes:
    """Squared norms of the training gradients, from one pass.

    Attributes:
        squares: (n,) of whole rows, float64.
        traces: (S,) mean over rows of a segment's squares: the trace of its empirical Fisher, float64.
    """

    squares: Tensor
    traces: Tensor


def sizes(rows: TrainRows) -> Sizes:
    """One pass over the rows."""
    squares = torch.zeros(rows.n, dtype=torch.float64)
    traces = torch.zeros(len(rows.segments), dtype=torch.float64)
    for where, block in rows:
        each = torch.stack([row_squares(block[:, s]) for s in rows.segments], dim=1).cpu()  # (r, S)
        squares[where] = each.sum(1)
        traces += each.sum(0)
    return Sizes(squares, traces / rows.n)


def through_rows(
    rows: TrainRows,
    vectors: Tensor,
    weigh: Callable[[int, Tensor], Tensor] | None = None,
    *,
    exact: bool = False,
) -> Tensor:
    """(r, D) sum_i w_i g_i <g_i, v> / n for every segment, float64, in one pass.

    Args:
        rows: The training rows.
        vectors: (r, D).
        weigh: The weights (rows,) of a segment's (rows, d) gradients; 1 if not given, which is the product with the
            empirical Fisher.
        exact: Take the products in float64 whatever the rows are.
    """
    dtype = torch.float64 if exact else rows.dtype
    right = vectors.to(rows.device, dtype)
    total = torch.zeros(vectors.shape, dtype=torch.float64, device=rows.device)
    for _, block in rows:
        for k, s in enumerate(rows.segments):
            part = block[:, s].to(dtype)
            inner = part @ right[:, s].T  # (rows, r)
            if weigh is not None:
                inner *= weigh(k, part).to(inner)[:, None]
            total[:, s] += inner.T @ part
    return total / rows.n


def dense_fisher(
    rows: TrainRows, damping: Tensor, weigh: Callable[[int, Tensor], Tensor] | None = None
) -> list[Tensor | None]:
    """lambda I + G^T G / n of every segment, (d, d) in float64, in one pass; with weights G^T D G / n, nothing added.

    `None` for a segment whose damping is 0.
    """
    there = [k for k in range(len(rows.segments)) if float(damping[k]) > 0]
    widths = [s.stop - s.start for s in rows.segments]
    sums = {k: torch.zeros(widths[k], widths[k], dtype=torch.float64, device=rows.device) for k in there}
    some = {k: torch.zeros(widths[k], widths[k], dtype=rows.dtype, device=rows.device) for k in there}
    seen = 0
    for _, block in rows:
        for k in there:
            part = block[:, rows.segments[k]]
            left = part if weigh is None else part * weigh(k, part).to(part)[:, None]
            some[k].addmm_(left.T, part)
        seen += len(block)
        if seen >= FLUSH:
            seen = 0
            for k in there:
                sums[k] += some[k]
                some[k].zero_()
    for k in there:
        sums[k] = (sums[k] + some[k]) / rows.n
        if weigh is None:
            sums[k].diagonal().add_(float(damping[k]))
    return [sums.get(k) for k in range(len(rows.segments))]
