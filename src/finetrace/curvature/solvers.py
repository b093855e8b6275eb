"""(F + lambda I) x = q by products alone: conjugate gradients, plain or preconditioned by a Nystroem sketch.

F = G^T G / n, segment by segment; every (query, segment) pair is a system of its own, and all go through the rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from finetrace.curvature.fisher import FisherDual
from finetrace.curvature.passes import dense_fisher, through_rows
from finetrace.curvature.products import Products
from finetrace.curvature.segments import reciprocal, segment_dots, spread
from finetrace.curvature.streamed import Streamed
from finetrace.curvature.train_rows import TrainRows
from finetrace.errors import FinetraceError

Solver = Literal["auto", "dual", "primal", "cg", "nystroem"]
RANK = 128  # of the sketch, where memory allows
MOST = 1000  # iterations of one run of conjugate gradients
REFINEMENTS = 6  # solutions of what the one before left, each measured in float64


DENSE_BYTES = 24  # an entry of a d x d matrix: sum, factor and what is added in between
DUAL_BYTES = 32  # an entry of an n x n one
SKETCH_BYTES = 40  # an entry of a sketch: start, image, vectors and the steps between
PASSES = 12  # what a preconditioned solve takes, about


def packed(segments: Sequence[int], room: int) -> list[list[int]] | None:
    """Segments of these widths in groups whose d x d matrices fit `room` bytes together; `None` where one alone does not."""
    groups: list[list[int]] = []
    taken = room
    for k, width in enumerate(segments):
        need = DENSE_BYTES * width**2
        if need > room:
            return None
        if taken + need > room:
            groups.append([])
            taken = 0
        groups[-1].append(k)
        taken += need
    return groups


def sketch_rank(segments: Sequence[int], n: int, room: int) -> int:
    """Rank of a sketch that fits `room` bytes; 0 where it would be too small to help."""
    rank = min(RANK, max(1, min(n, max(segments)) // 2), room // (SKETCH_BYTES * sum(segments)))
    return rank if rank >= 8 else 0


def choose(n: int, m: int, segments: Sequence[int], room: int, *, own: bool) -> Solver:
    """Which solver is the cheapest of those that fit `room` bytes.

    Operations of each, over all segments of width d, D in sum: dual 2 n^2 D, primal 2 n sum d^2, Nystroem about PASSES
    times 4 m n D. `own`: the rows' own influence is wanted too, which iterations would have to solve row by row.
    """
    width = sum(segments)
    iterated = PASSES * 4 * m * n * width if not own else float("inf")
    costs: list[tuple[float, Solver]] = []
    if DUAL_BYTES * n**2 <= room:
        costs.append((2.0 * n**2 * width, "dual"))
    if packed(segments, room) is not None:
        costs.append((2.0 * n * sum(d**2 for d in segments), "primal"))
    costs.append((iterated, "nystroem" if sketch_rank(segments, n, room) else "cg"))
    return min(costs, key=lambda each: each[0])[1]


def default_tolerance(dtype: torch.dtype) -> float:
    """What a solution has to meet: 1e-6 on float32 rows, 1e-10 on float64 ones."""
    return 1e-10 if dtype == torch.float64 else 1e-6


class ColumnRows(TrainRows, Protocol):
    """Training gradients that can be read by columns too."""

    def columns(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(columns, (n, c)) pieces of some columns."""
        ...


@dataclass(frozen=True, eq=False)
class Sketch:
    """U diag(values) U^T for every segment: the randomised Nystroem approximation of F.

    Frangella, Tropp and Udell, arXiv 2110.02820, Algorithm 2.1.

    Attributes:
        vectors: (k, D) the rows of U^T, orthonormal in every segment.
        values: (k, S) eigenvalues, largest first; 0 beyond what a segment's width allows.
    """

    vectors: Tensor
    values: Tensor

    def precondition(self, residual: Tensor, damping: Tensor, segments: Sequence[slice]) -> Tensor:
        """(m, D) (lambda + l_k) U (L + lambda)^{-1} U^T r + (I - U U^T) r."""
        result = residual.clone()
        for k, s in enumerate(segments):
            if float(damping[k]) <= 0:
                continue
            basis, values = self.vectors[:, s], self.values[:, k]
            inner = residual[:, s] @ basis.T  # (m, k)
            result[:, s] += (inner * ((values[-1] + damping[k]) / (values + damping[k]) - 1)) @ basis
        return result


def nystroem(rows: TrainRows, rank: int, seed: int = 0) -> Sketch:
    """A sketch of every segment, in one pass; the start is fixed, so that scores do not change from run to run."""
    generator = torch.Generator().manual_seed(seed)
    width = rows.segments[-1].stop
    test = torch.zeros(rank, width, dtype=torch.float64)
    for s in rows.segments:
        most = min(rank, s.stop - s.start)
        drawn = torch.randn(s.stop - s.start, most, generator=generator, dtype=torch.float64)
        test[:most, s] = torch.linalg.qr(drawn)[0].T
    test = test.to(rows.device)
    image = through_rows(rows, test)  # (k, D) F Omega
    vectors = torch.zeros_like(test)
    values = torch.zeros(rank, len(rows.segments), dtype=torch.float64, device=rows.device)
    noise = torch.finfo(rows.dtype).eps
    for k, s in enumerate(rows.segments):
        most = min(rank, s.stop - s.start)
        omega, shifted = test[:most, s].T, image[:most, s].T  # (d, k)
        shift = noise * float(shifted.norm())
        if shift == 0:
            continue
        shifted = shifted + shift * omega
        core = omega.T @ shifted
        core = (core + core.T) / 2
        factor, failed = torch.linalg.cholesky_ex(core)
        if int(failed):
            continue  # no sketch of this segment: plain conjugate gradients there
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T  # (d, k)
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values[:most, k] = (singular.square() - shift).clamp_min(0)
        vectors[:most, s] = left.T
    return Sketch(vectors, values)


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


class PrimalStream(Streamed):
    """P = (F + lambda I)^{-1} by a Cholesky factor of each segment's d x d matrix; queries are measured and refined."""

    def __init__(self, rows: TrainRows, damping: Tensor, tolerance: float) -> None:
        """`damping` is (S,) lambda; a segment whose damping is 0 is left out."""
        self.rows = rows
        self.damping = damping
        self.tolerance = tolerance
        self.factors = [None if m is None else torch.linalg.cholesky(m) for m in dense_fisher(rows, damping)]
        self.found = Solution("primal", passes=1)

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


class IterativeStream(Streamed):
    """P = (F + lambda I)^{-1} by conjugate gradients, preconditioned where there is a sketch.

    Solved in the rows' precision, measured in float64, and what is left is solved again until `tolerance` is met.
    """

    passes = True

    def __init__(self, rows: TrainRows, damping: Tensor, tolerance: float, sketch: Sketch | None = None) -> None:
        self.rows = rows
        self.damping = damping.to(rows.device)
        self.tolerance = tolerance
        self.sketch = sketch
        self.found = Solution("cg" if sketch is None else "nystroem", passes=int(sketch is not None))

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


class DualStream(Streamed):
    """P = (F + lambda I)^{-1} through the n x n Gram matrix of one segment after another (Woodbury).

    (F + lambda I)^{-1} q = (q - G^T beta) / lambda with (K + n lambda I) beta = G q; the gradients are read by columns.
    """

    passes = True

    def __init__(self, rows: ColumnRows, damping: Tensor, tolerance: float) -> None:
        self.rows = rows
        self.damping = damping.to(rows.device)
        self.tolerance = tolerance
        self.found = Solution("dual")

    def apply(self, vectors: Tensor) -> Tensor:
        """(m, D) solutions, as near as `tolerance`."""
        factors = [self._factor(k) for k in range(len(self.rows.segments))] if len(self.rows.segments) == 1 else None

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
        shifted = self._gram(k)
        shifted.diagonal().add_(self.rows.n * float(self.damping[k]))
        return torch.linalg.cholesky(shifted)
