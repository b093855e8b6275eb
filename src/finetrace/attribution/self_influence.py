"""Self-influence: how much training on an example lowers its own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution.gradient import GradientMethod
from finetrace.attribution.method import Method, Need, make, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.selection import check


@register("selfinf")
@dataclass(frozen=True)
class SelfInfluence(Method):
    """Self-influence g^T P g of each example, the same for every query: high for rows the model had to learn by heart.

    P is the inverse curvature of the method named by `curvature`, at its defaults; `gradsim` gives the squared norm. Wrong
    labels and odd rows have high self-influence (Koh and Liang, arXiv 1703.04730; TracIn, arXiv 2002.08484).
    """

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    control: ClassVar[bool] = True
    query_free: ClassVar[bool] = True
    curvature: Literal["gradsim", "datainf", "lissa", "exact", "kfac", "ekfac"] = "exact"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    def __post_init__(self) -> None:
        check(self.label, self.loss_on, self.layers, self.at)

    def prepared(self, problem: Problem) -> Problem:
        """As the method named looks at it."""
        return self._method().prepared(problem)

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n), the same for every query."""
        return np.tile(self._method().train_self(problem).numpy(), (problem.m, 1))

    def _method(self) -> GradientMethod:
        method = make(self.curvature, loss_on=self.loss_on, layers=self.layers, at=self.at)
        assert isinstance(method, GradientMethod)
        return method

    @property
    def unit(self) -> str:
        """Of the method named."""
        return self._method().unit.replace("the query's", "its own")
