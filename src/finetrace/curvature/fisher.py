"""The empirical Fisher, inverted exactly: P = (lambda I + G^T G / n)^{-1}."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from finetrace.curvature.products import Gradients, Products

NEAR = 1e-11  # a residual that is not solved for again
STEPS = 2  # of solving for what is left, at most


class FisherDual:
    """The n x n route, for d >= n. With K = G G^T and C = V G^T (Woodbury):

    V P G^T = n C (K + n lambda I)^{-1}
    """

    def __init__(self, of: Products, damping: float) -> None:
        self.of = of
        self.damping = damping

    @cached_property
    def _factor(self) -> Tensor:
        """(n, n) Cholesky factor of K + n lambda I."""

        def make() -> Tensor:
            shifted = self.of.gram.clone()
            shifted.diagonal().add_(self.of.n * self.damping)
            return torch.linalg.cholesky(shifted)

        return self.of.kept.fetch("dual", make, damping=self.damping)

    @cached_property
    def _solution(self) -> tuple[Tensor, float]:
        """(m, n) C (K + n lambda I)^{-1} and its residual; what rounding leaves, where damping is small, is solved again."""
        cross, gram, shift = self.of.cross, self.of.gram, self.of.n * self.damping
        sizes = self.of.query_sq.sqrt()
        found, left, residual = torch.zeros_like(cross), -cross, float("inf")
        for _ in range(1 + STEPS):
            nearer = found - torch.cholesky_solve(left.T, self._factor).T
            left = nearer @ gram + shift * nearer - cross
            norms = ((left @ gram) * left).sum(1).clamp_min(0).sqrt() / shift
            largest = _largest(norms, sizes) if len(cross) else 0.0
            if not largest < residual:
                break
            found, residual = nearer, largest
            if residual <= NEAR:
                break
        return found, residual

    @property
    def _solved(self) -> Tensor:
        return self._solution[0]

    def products(self) -> Tensor:
        """(m, n) n C (K + n lambda I)^{-1}."""
        return self.of.n * self._solved

    def residual(self) -> float:
        """The largest ||(F + lambda I) x - q|| / ||q|| of the queries solved so far, 0 if none were.

        x is (q - G^T beta) / lambda, so what is left of q is G^T r / (n lambda) with r = (K + n lambda I) beta - C, and its
        norm is that of r under K.
        """
        return self._solution[1] if "_solution" in vars(self) else 0.0

    def train_self(self) -> Tensor:
        """(n,) diag(n K F^{-1}) with F = K + n lambda I, which is n - n^2 lambda diag(F^{-1}).

        Where n lambda is so much larger than K that the difference would cancel, K F^{-1} is summed entry by entry.
        """
        inverse = torch.cholesky_inverse(self._factor)  # F^{-1}
        shift = self.of.n * self.damping
        if shift < 1e3 * float(self.of.train_sq.min()):
            return self.of.n * (1 - shift * inverse.diagonal())
        return self.of.n * torch.einsum("ij,ij->i", self.of.gram, inverse)

    def query_self(self) -> Tensor:
        """(m,) (||v||^2 - diag(C (K + n lambda I)^{-1} C^T)) / lambda."""
        return (self.of.query_sq - (self._solved * self.of.cross).sum(1)) / self.damping


class FisherPrimal:
    """The d x d route, for d < n: a Cholesky factor of lambda I + G^T G / n."""

    def __init__(self, of: Products, damping: float) -> None:
        self.of = of
        self.damping = damping

    @cached_property
    def _factor(self) -> Tensor:
        def make() -> Tensor:
            train = self._gradients.train
            curvature = (train.T @ train).double() / self.of.n
            curvature.diagonal().add_(self.damping)
            return torch.linalg.cholesky(curvature)

        return self.of.kept.fetch("primal", make, damping=self.damping)

    @cached_property
    def _solved(self) -> Tensor:
        """(m, d) V (lambda I + G^T G / n)^{-1}."""
        return torch.cholesky_solve(self._gradients.query.double().T, self._factor).T

    def residual(self) -> float:
        """The largest ||(F + lambda I) x - q|| / ||q|| of the queries solved so far, 0 if none were."""
        query = self._gradients.query.double()
        if "_solved" not in self.__dict__ or not len(query):
            return 0.0
        left = (self._solved @ self._factor) @ self._factor.T - query
        return _largest(torch.linalg.vector_norm(left, dim=1), torch.linalg.vector_norm(query, dim=1))

    @property
    def _gradients(self) -> Gradients:
        assert self.of.gradients is not None, "the primal route needs the gradients themselves"
        return self.of.gradients

    def products(self) -> Tensor:
        """(m, n) (V (lambda I + G^T G / n)^{-1}) G^T."""
        train = self._gradients.train
        return (self._solved.to(train.dtype) @ train.T).double()

    def train_self(self) -> Tensor:
        """(n,) squared norms of L^{-1} g."""
        return self._whitened_squares(self._gradients.train)

    def query_self(self) -> Tensor:
        """(m,) squared norms of L^{-1} v."""
        return self._whitened_squares(self._gradients.query)

    def _whitened_squares(self, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._factor, rows.double().T, upper=False).square().sum(0)


def _largest(norms: Tensor, sizes: Tensor) -> float:
    """Of the quotients; a query that is zero has nothing left."""
    return float(torch.where(sizes > 0, norms / sizes, torch.zeros_like(norms)).max())


def fisher(of: Products, damping: float) -> FisherDual | FisherPrimal:
    """The cheaper of the two routes, which agree to the rounding of K: primal where the gradients are at hand and d < n."""
    if of.gradients is not None and of.gradients.width < of.n:
        return FisherPrimal(of, damping)
    return FisherDual(of, damping)
