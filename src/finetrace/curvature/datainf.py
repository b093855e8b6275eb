"""DataInf: the inverse of a mean replaced by the mean of inverses (Kwon et al., ICLR 2024, arXiv 2310.00902, Eq. 5)."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from finetrace.curvature.products import Products


class DataInf:
    """P = (1/n) sum_i (lambda I + g_i g_i^T)^{-1} = (1/lambda) [I - (1/n) sum_i D_i g_i g_i^T].

    D_i = 1 / (lambda + ||g_i||^2), by Sherman and Morrison.

    V P G^T = [C - (C D) K / n] / lambda
    """

    def __init__(self, of: Products, damping: float) -> None:
        self.of = of
        self.damping = damping

    @cached_property
    def _weights(self) -> Tensor:
        """(n,) D."""
        return 1 / (self.damping + self.of.train_sq)

    def products(self) -> Tensor:
        """(m, n) [C - (C D) K / n] / lambda; where d < n, (C D) K is taken as ((C D) G) G^T, linear in n."""
        weighted = self.of.cross * self._weights
        gradients = self.of.gradients
        if gradients is not None and gradients.width < self.of.n:
            train = gradients.train
            second = ((weighted.to(train.dtype) @ train) @ train.T).double()
        else:
            second = weighted @ self.of.gram
        return (self.of.cross - second / self.of.n) / self.damping

    def train_self(self) -> Tensor:
        """(n,) [K_ii - sum_j D_j K_ij^2 / n] / lambda."""
        return (self.of.train_sq - self.of.gram.square() @ self._weights / self.of.n) / self.damping

    def query_self(self) -> Tensor:
        """(m,) [||v||^2 - sum_j D_j C_j^2 / n] / lambda."""
        return (self.of.query_sq - self.of.cross.square() @ self._weights / self.of.n) / self.damping
