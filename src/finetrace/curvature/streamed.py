"""Inverse curvatures of training gradients that are never held: vectors go in, passes over the rows do the rest.

n rows, D columns, S segments: the blocks of the curvature, side by side in a row (all columns are one segment for the
scope `joint`). Products are taken in the rows' precision, float32 or wider, and summed over rows in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from finetrace.curvature.kronecker import KroneckerBasis
from finetrace.curvature.products import row_squares

FLUSH = 4096  # rows whose d x d products are summed in the rows' precision before they go to float64


class TrainRows(Protocol):
    """Training gradients that can be gone through again and again.

    Attributes:
        n: Rows.
        segments: Columns of each segment.
        dtype: Of the rows as they come: float32 or float64.
        device: Where they come.
    """

    n: int
    segments: Sequence[slice]
    dtype: torch.dtype
    device: torch.device

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (r, D)), from the first row to the last; what is yielded must not be kept."""
        ...

    def some(self, where: slice) -> Tensor:
        """(r, D) of some rows, which may be kept."""
        ...


@dataclass(frozen=True, eq=False)
class HeldRows:
    """(n, D) gradients in memory as `TrainRows`, `step` rows at a time."""

    train: Tensor
    segments: Sequence[slice]
    step: int = 256

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.train)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.train.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.train.device

    def some(self, where: slice) -> Tensor:
        """(r, D)."""
        return self.train[where]

    def columns(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(columns, (n, c)) the chosen columns, all at once."""
        yield chosen, self.train[:, chosen]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Views of the rows."""
        for start in range(0, self.n, self.step):
            where = slice(start, min(start + self.step, self.n))
            yield where, self.train[where]


class Streamed(ABC):
    """An inverse curvature P over all segments.

    Attributes:
        passes: Whether `apply` goes over the training rows.
    """

    passes: bool = False

    @abstractmethod
    def apply(self, vectors: Tensor) -> Tensor:
        """(r, D) vectors to (r, D) P v, float64."""

    def solve(self, vectors: Tensor) -> Tensor:
        """The same for queries: as near as was asked for, where P is found by solving."""
        return self.apply(vectors)

    def own(self, rows: TrainRows, tile: int) -> Tensor:
        """(n,) g_i^T P g_i, float64: in one pass where P takes none, else with `tile` rows at a time as queries."""
        total = torch.zeros(rows.n, dtype=torch.float64)
        if not self.passes:
            for where, block in rows:
                total[where] = (block.double() * self.apply(block)).sum(1).cpu()
            return total
        for first in range(0, rows.n, tile):
            where = slice(first, min(first + tile, rows.n))
            held = rows.some(where)
            total[where] = (held.double() * self.apply(held)).sum(1).cpu()
        return total


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


def segment_dots(a: Tensor, b: Tensor, segments: Sequence[slice]) -> Tensor:
    """(r, S) inner products of the rows of a and b in every segment."""
    return torch.stack([(a[:, s] * b[:, s]).sum(1) for s in segments], dim=1)


def spread(values: Tensor, segments: Sequence[slice]) -> Tensor:
    """(r, S) or (S,) values of segments to (r, D) or (D,), each in all columns of its segment."""
    widths = torch.tensor([s.stop - s.start for s in segments], device=values.device)
    return values.repeat_interleave(widths, dim=-1)


def reciprocal(values: Tensor) -> Tensor:
    """1 / x, and 0 for 0: a segment whose gradients are all zero is left out."""
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))


class IdentityStream(Streamed):
    """P = I on the segments that have a gradient."""

    def __init__(self, rows: TrainRows, sizes: Sizes | None = None) -> None:
        """Without `sizes` no segment is left out, which changes nothing but the queries' own norms."""
        self.squares = None if sizes is None else sizes.squares
        self.present = None if sizes is None else spread((sizes.traces > 0).double(), rows.segments)

    def apply(self, vectors: Tensor) -> Tensor:
        """v."""
        wide = vectors.double()
        return wide if self.present is None else wide * self.present.to(wide)

    def own(self, rows: TrainRows, tile: int) -> Tensor:
        """(n,) squared norms."""
        return super().own(rows, tile) if self.squares is None else self.squares


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


class DenseStream(Streamed):
    """P as one d x d matrix a segment, which takes one pass to make and none to apply.

    The empirical Fisher's (lambda I + G^T G / n)^{-1}, by a Cholesky factor, or DataInf's (I - G^T D G / n) / lambda.
    """

    def __init__(self, rows: TrainRows, damping: Tensor, *, datainf: bool = False) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out."""
        self.segments = rows.segments
        self.damping = damping
        self.datainf = datainf
        weigh = (lambda k, part: reciprocal(damping[k] + row_squares(part))) if datainf else None
        self.matrices = dense_fisher(rows, damping, weigh)
        self.factors = [None if datainf or m is None else torch.linalg.cholesky(m) for m in self.matrices]

    def apply(self, vectors: Tensor) -> Tensor:
        """P v."""
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for k, s in enumerate(self.segments):
            matrix, factor = self.matrices[k], self.factors[k]
            if matrix is None:
                continue
            part = vectors[:, s].double()
            if factor is not None:
                result[:, s] = torch.cholesky_solve(part.T, factor).T
            else:
                result[:, s] = part / self.damping[k] - part @ matrix / self.damping[k]
        return result


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
