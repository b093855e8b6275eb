"""Gradient similarity: inner products and cosines of loss gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetrace.attribution.gradient import BY_STEP, Scope, SpannedMethod, divide
from finetrace.attribution.method import Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.curvature import Identity, InverseCurvature, Products
from finetrace.curvature.identity import IdentityStream
from finetrace.curvature.streamed import Streamed


@register("gradsim")
@dataclass(frozen=True)
class GradSim(SpannedMethod, StreamedMethod):
    """Inner product of the two loss gradients, sum_b v_b . g_b (TracIn at one checkpoint; "Hessian-free").

    Unit: decrease of the query's loss per unit of a gradient step on the example, to first order.
    """

    normalise: Normalise = "none"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""
    query_bytes: ClassVar[int] = 32

    @property
    def _unit(self) -> str:
        """A step is of a size here."""
        return BY_STEP

    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """P = I."""
        return Identity(products)

    def _totals(self, problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
        """Products alone need no norms, so that blocks need not be told apart."""
        return {"products": problem.inner()} if list(names) == ["products"] else super()._totals(problem, names)

    @property
    def plain(self) -> bool:
        """Unless norms are wanted."""
        return self.normalise == "none"

    def operator(self, at: Pass) -> Streamed:
        """P = I; norms are looked at where they are wanted."""
        return IdentityStream(at.rows, at.sizes if at.normalised else None)


@register("gradcos")
@dataclass(frozen=True)
class GradCos(SpannedMethod, StreamedMethod):
    """Cosine of the two loss gradients: v . g / (||v|| ||g||), over all blocks or averaged over each block's own.

    scope `joint`: one cosine of the whole gradients. scope `block`: (1/B) sum_b v_b . g_b / (||v_b|| ||g_b||).
    """

    scope: Scope = "joint"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""
    normalise: ClassVar[Normalise] = "cosine"  # type: ignore[misc]
    query_bytes: ClassVar[int] = 32

    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """P = I."""
        return Identity(products)

    def _matrix(self, problem: Problem) -> NDArray[np.float64]:
        if self.scope == "joint":
            return super()._matrix(problem)
        total, blocks = torch.zeros(problem.m, problem.n, dtype=torch.float64), 0
        for _, products in problem.products():
            norms = products.query_sq.sqrt()[:, None] * products.train_sq.sqrt()[None, :]
            total += divide(products.cross, norms)
            blocks += 1
        return (total / max(1, blocks)).clamp(-1, 1).numpy()

    def operator(self, at: Pass) -> Streamed:
        """P = I; norms are looked at where they are wanted."""
        return IdentityStream(at.rows, at.sizes if at.normalised else None)

    @property
    def by_block(self) -> bool:
        """By scope."""
        return self.scope == "block"

    @property
    def normalisation(self) -> str:
        """Always a cosine."""
        return "cosine"
