"""The empirical Fisher, inverted exactly: P = (lambda I + G^T G / n)^{-1}."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from finetrace.curvature.products import Gradients, Products


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
        shifted = self.of.gram.clone()
        shifted.diagonal().add_(self.of.n * self.damping)
        return torch.linalg.cholesky(shifted)

    @cached_property
    def _solved(self) -> Tensor:
        """(m, n) C (K + n lambda I)^{-1}."""
        return torch.cholesky_solve(self.of.cross.T, self._factor).T

    def products(self) -> Tensor:
        """(m, n) n C (K + n lambda I)^{-1}."""
        return self.of.n * self._solved

    def train_self(self) -> Tensor:
        """(n,) diag(n K F^{-1}) with F = K + n lambda I, which is n - n^2 lambda diag(F^{-1}).

        Where n lambda is so much larger than K that the difference would cancel, K F^{-1} is summed entry by entry.
        """
        eye = torch.eye(self.of.n, dtype=torch.float64, device=self._factor.device)
        half = torch.linalg.solve_triangular(self._factor, eye, upper=False)  # L^{-1}
        shift = self.of.n * self.damping
        if shift < 1e3 * float(self.of.train_sq.min()):
            return self.of.n * (1 - shift * half.square().sum(0))
        return self.of.n * (self.of.gram * (half.T @ half)).sum(1)

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
        train = self._gradients.train
        curvature = (train.T @ train).double() / self.of.n
        curvature.diagonal().add_(self.damping)
        return torch.linalg.cholesky(curvature)

    @property
    def _gradients(self) -> Gradients:
        assert self.of.gradients is not None, "the primal route needs the gradients themselves"
        return self.of.gradients

    def products(self) -> Tensor:
        """(m, n) (V (lambda I + G^T G / n)^{-1}) G^T."""
        train, query = self._gradients.train, self._gradients.query
        solved = torch.cholesky_solve(query.double().T, self._factor).T  # (m, d)
        return (solved.to(train.dtype) @ train.T).double()

    def train_self(self) -> Tensor:
        """(n,) squared norms of L^{-1} g."""
        return self._whitened_squares(self._gradients.train)

    def query_self(self) -> Tensor:
        """(m,) squared norms of L^{-1} v."""
        return self._whitened_squares(self._gradients.query)

    def _whitened_squares(self, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self._factor, rows.double().T, upper=False).square().sum(0)


def fisher(of: Products, damping: float) -> FisherDual | FisherPrimal:
    """The cheaper of the two routes, which agree to the rounding of K: primal where the gradients are at hand and d < n."""
    if of.gradients is not None and of.gradients.width < of.n:
        return FisherPrimal(of, damping)
    return FisherDual(of, damping)
