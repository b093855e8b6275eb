"""LiSSA: the inverse as a truncated Neumann series (Agarwal et al., 2017; Koh and Liang, 2017)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from finetrace.curvature.products import Products


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
        gram = self.of.gram
        a, beta = 1.0, torch.zeros_like(inner)
        for _ in range(self.iterations):
            beta = grow * beta - step * (a * inner + beta @ gram)
            a = 1 + grow * a
        return a, beta


def largest_eigenvalue(matrix: Tensor, tolerance: float = 1e-6) -> float:
    """The largest eigenvalue of a positive semi-definite (n, n) matrix, from above to about a relative `tolerance`.

    Subspace iteration with Rayleigh and Ritz; the residual's norm, by which the value may be too small, is added. The
    start is fixed, so scores do not change from run to run.
    """
    n = len(matrix)
    if n <= 16:
        return max(0.0, float(torch.linalg.eigvalsh(matrix)[-1])) * (1 + tolerance)
    start = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(matrix.device))[0]
    value, residual = 0.0, 0.0
    for _ in range(300):
        image = matrix @ basis  # (n, 8)
        values, rotation = torch.linalg.eigh(basis.T @ image)
        value = float(values[-1])
        residual = float((image @ rotation[:, -1] - values[-1] * (basis @ rotation[:, -1])).norm())
        if residual <= tolerance * value:
            break
        basis = torch.linalg.qr(image)[0]
    return max(0.0, value) + residual
