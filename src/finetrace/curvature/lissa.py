"""LiSSA: the inverse as a truncated Neumann series (Agarwal et al., 2017; Koh and Liang, 2017)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from finetrace.curvature.passes import through_rows
from finetrace.curvature.products import Products
from finetrace.curvature.segments import reciprocal, spread
from finetrace.curvature.streamed import Streamed
from finetrace.curvature.train_rows import TrainRows

TOLERANCE = 1e-6  # relative, of the largest eigenvalue
STEPS = 300  # of subspace iteration at most
SUBSPACE = 8  # vectors


class LiSSA:
    """r_0 = v, r_t = v + r_{t-1} - (H + lambda I) r_{t-1} / sigma, and P v = r_T / sigma, with H = G^T G / n.

    sigma is at least the largest eigenvalue of H + lambda I, so the series converges to the exact inverse from below;
    what T iterations leave of an eigendirection with eigenvalue e is a share (1 - (e + lambda) / sigma)^(T + 1).
    The iterates stay in the span of v and the training gradients: r = a v + beta G, and only (a, beta) are iterated,
    n^2 operations a step and no gradient touched.
    """

    def __init__(self, of: Products, damping: float, iterations: int) -> None:
        self.of = of
        self.damping = damping
        self.iterations = iterations

    @cached_property
    def scale(self) -> float:
        """sigma: lambda plus the largest eigenvalue of K / n."""
        return self.damping + largest_eigenvalue(self.of.gram) / self.of.n

    def products(self) -> Tensor:
        """(m, n) (a C + beta K) / sigma."""
        a, beta = self._query_coefficients
        return (a * self.of.cross + beta @ self.of.gram) / self.scale

    def train_self(self) -> Tensor:
        """(n,) the diagonal of (a K + beta K) / sigma, every training gradient taken as v."""
        a, beta = self._iterate(self.of.gram)
        return (a * self.of.train_sq + (beta * self.of.gram).sum(1)) / self.scale

    def query_self(self) -> Tensor:
        """(m,) (a ||v||^2 + beta . C) / sigma."""
        a, beta = self._query_coefficients
        return (a * self.of.query_sq + (beta * self.of.cross).sum(1)) / self.scale

    @cached_property
    def _query_coefficients(self) -> tuple[float, Tensor]:
        return self._iterate(self.of.cross)

    def _iterate(self, inner: Tensor) -> tuple[float, Tensor]:
        """Coefficients after T steps for vectors whose inner products with G are `inner` (rows, n)."""
        keep = 1 - self.damping / self.scale
        step = 1 / (self.scale * self.of.n)
        gram = self.of.kept_gram  # products alone, no solve: K's own precision is enough
        inner = inner.to(gram.dtype)
        a, beta = 1.0, torch.zeros_like(inner)
        for _ in range(self.iterations):
            beta = torch.addmm((keep * beta).sub_(inner, alpha=step * a), beta, gram, alpha=-step)
            a = 1 + keep * a
        return a, beta.double()


class ReleasedLiSSA:
    """The recurrence of the study's released code: r_t = v + r_{t-1} - (H r_{t-1} - lambda r_{t-1}) / scale, P v = r_T.

    It subtracts the damping where `LiSSA` adds it, divides by a fixed scale where the series needs an upper bound of the
    largest eigenvalue, and leaves the result unscaled; with a scale of 1000 the curvature all but vanishes and P v comes
    close to (T + 1) v.
    """

    def __init__(self, of: Products, damping: float, iterations: int, scale: float = 1000.0) -> None:
        self.of = of
        self.damping = damping
        self.iterations = iterations
        self.scale = scale

    def products(self) -> Tensor:
        """(m, n) a C + beta K."""
        a, beta = self._query
        return a * self.of.cross + beta @ self.of.gram

    def train_self(self) -> Tensor:
        """(n,) the diagonal of a K + beta K, every training gradient taken as v."""
        a, beta = self._iterate(self.of.gram)
        return a * self.of.train_sq + (beta * self.of.gram).sum(1)

    def query_self(self) -> Tensor:
        """(m,) a ||v||^2 + beta . C."""
        a, beta = self._query
        return a * self.of.query_sq + (beta * self.of.cross).sum(1)

    @cached_property
    def _query(self) -> tuple[float, Tensor]:
        return self._iterate(self.of.cross)

    def _iterate(self, inner: Tensor) -> tuple[float, Tensor]:
        """Coefficients of r_T = a v + beta G for vectors whose inner products with G are `inner` (rows, n)."""
        grow = 1 + self.damping / self.scale
        step = 1 / (self.scale * self.of.n)
        for gram in (self.of.kept_gram, self.of.gram):  # as in `LiSSA`; but this may diverge, beyond float32 first
            start = inner.to(gram.dtype)
            a, beta = 1.0, torch.zeros_like(start)
            for _ in range(self.iterations):
                beta = torch.addmm((grow * beta).sub_(start * (step * a)), beta, gram, alpha=-step)
                a = 1 + grow * a
            if bool(torch.isfinite(beta).all()):
                break
        return a, beta.double()


class SeriesStream(Streamed):
    """r_0 = v, r_t = v + keep r_(t-1) - step F r_(t-1), P v = out r_T with F = G^T G / n: a pass over the rows a step."""

    passes = True

    def __init__(self, rows: TrainRows, keep: Tensor, step: Tensor, out: Tensor, iterations: int) -> None:
        """`keep`, `step` and `out` are (S,); a segment whose `out` is 0 is left out."""
        self.rows = rows
        self.iterations = iterations
        self._keep, self._step, self._out = (spread(each.to(rows.device), rows.segments) for each in (keep, step, out))

    @classmethod
    def of(cls, rows: TrainRows, damping: Tensor, largest: Tensor, iterations: int) -> SeriesStream:
        """`LiSSA`, with (S,) lambda and (S,) largest eigenvalues of F."""
        inverse = reciprocal(damping + largest) * (damping > 0)
        return cls(rows, 1 - damping * inverse, inverse, inverse, iterations)

    @classmethod
    def released(cls, rows: TrainRows, damping: Tensor, iterations: int, scale: float = 1000.0) -> SeriesStream:
        """`ReleasedLiSSA`, with (S,) lambda."""
        there = (damping > 0).double()
        return cls(rows, 1 + damping / scale, there / scale, there, iterations)

    def apply(self, vectors: Tensor) -> Tensor:
        """(r, D) out r_T."""
        wide = vectors.to(self.rows.device).double()
        r = wide
        for _ in range(self.iterations):
            r = torch.addcmul(wide + self._keep * r, self._step, through_rows(self.rows, r), value=-1)
        return self._out * r


def largest_eigenvalues(rows: TrainRows, vectors: int = SUBSPACE) -> Tensor:
    """(S,) `largest_eigenvalue` of every segment's G^T G / n by the same iteration, a pass over the rows a step, float64.

    `vectors` are iterated on, fewer where a segment has fewer columns; the fewer, the more passes.
    """
    width = rows.segments[-1].stop
    start = torch.randn(vectors, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = start.to(rows.device)
    values, residuals = (torch.zeros(len(rows.segments), dtype=torch.float64) for _ in range(2))
    for s in rows.segments:
        basis[:, s] = _orthonormal(basis[:, s])
    for _ in range(STEPS):
        image = through_rows(rows, basis)
        for k, s in enumerate(rows.segments):
            found, rotation = torch.linalg.eigh(image[:, s] @ basis[:, s].T)
            values[k] = found[-1].cpu()
            top = rotation[:, -1]
            residuals[k] = (top @ image[:, s] - found[-1] * (top @ basis[:, s])).norm().cpu()
            basis[:, s] = _orthonormal(image[:, s])
        if bool((residuals <= TOLERANCE * values).all()):
            break
    return values.clamp_min(0) + residuals


def _orthonormal(vectors: Tensor) -> Tensor:
    """(r, d) of the same span with orthonormal rows; where r > d, the last ones are zero."""
    found = torch.zeros_like(vectors)
    basis = torch.linalg.qr(vectors.T)[0].T  # (min(r, d), d)
    found[: len(basis)] = basis
    return found


def largest_eigenvalue(matrix: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest eigenvalue of a positive semi-definite (n, n) matrix, from above to about a relative `tolerance`.

    Subspace iteration with Rayleigh and Ritz; the residual's norm, by which the value may be too small, is added. The
    start is fixed, so scores do not change from run to run.
    """
    n = len(matrix)
    if n <= 16:
        return max(0.0, float(torch.linalg.eigvalsh(matrix)[-1])) * (1 + tolerance)
    start = torch.randn(n, SUBSPACE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(matrix.device))[0]
    value, residual = 0.0, 0.0
    for _ in range(STEPS):
        image = matrix @ basis  # (n, r)
        values, rotation = torch.linalg.eigh(basis.T @ image)
        value = float(values[-1])
        residual = float((image @ rotation[:, -1] - values[-1] * (basis @ rotation[:, -1])).norm())
        if residual <= tolerance * value:
            break
        basis = torch.linalg.qr(image)[0]
    return max(0.0, value) + residual
