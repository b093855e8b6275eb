"""K-FAC and EK-FAC influence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from finetrace.attribution.gradient import Positive
from finetrace.attribution.method import Need, Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.collection.factors import Labels
from finetrace.curvature import InverseCurvature, Kronecker, KroneckerBasis
from finetrace.curvature.kronecker import KroneckerStream
from finetrace.curvature.streamed import Streamed
from finetrace.index.factors import digest as factors_digest

DEFAULT_DAMPING = 0.1  # of the mean eigenvalue, as in Grosse et al. (arXiv 2308.03296)


class _KroneckerMethod(StreamedMethod):
    """sum_b V_b (Q_b (Lambda_b + lambda_b I) Q_b^T)^(-1) G_b^T with Q_b = Q_L x Q_R.

    Needs gradients that are sums of products of two sides: whole, or projected on both sides.
    """

    needs: ClassVar[tuple[Need, ...]] = ("gradients", "factors")
    damping: float
    labels: Labels

    def _viewed(self, problem: Problem) -> Problem:
        """The same, its factors at hand."""
        chosen = problem.on(self.loss_on, self.layers, self.labels, self.at)
        chosen.kronecker(self.labels)
        return chosen

    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """One a block."""
        bases = problem.kronecker(self.labels)
        for block, products in problem.products():
            basis = bases[block.name]
            yield Kronecker(products, basis, self.eigenvalues(basis), self.damping)

    def operator(self, at: Pass) -> Streamed:
        """Queries are preconditioned in the eigenbases."""
        bases = at.problem.kronecker(self.labels)
        chosen: list[KroneckerBasis | None] = [bases[block.name] for block in at.rows.blocks]
        eigenvalues = [self.eigenvalues(bases[block.name]) for block in at.rows.blocks]
        if at.normalised or any(float(each.mean()) <= 0 for each in eigenvalues):
            for k, trace in enumerate(at.sizes.traces.tolist()):
                chosen[k] = chosen[k] if trace > 0 else None
        return KroneckerStream(at.rows.segments, chosen, eigenvalues, self.damping)

    def depends(self, problem: Problem) -> dict[str, Any]:
        """On the factors, which may be fitted again, and on whether blocks without a gradient are left out."""
        return {"factors": factors_digest(problem.index.folder, self.labels), "normalised": self.normalise != "none"}

    @abstractmethod
    def eigenvalues(self, basis: KroneckerBasis) -> Tensor:
        """Lambda (r, c)."""


@register("kfac")
@dataclass(frozen=True)
class KFAC(_KroneckerMethod):
    """Influence with the curvature of each weight as a Kronecker product: E[a a^T] x E[delta delta^T].

    Factors are means over the tokens that carry gradient (`FactorSums`), times the tokens an example; lambda = damping x the
    mean eigenvalue (Martens and Grosse, arXiv 1503.05671). labels `model` draws the labels from the model's own predictions,
    which gives the Fisher of the training loss; `data` takes the data's own (the empirical Fisher).
    """

    normalise: Normalise = "none"
    damping: Positive = DEFAULT_DAMPING
    labels: Labels = "model"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    def eigenvalues(self, basis: KroneckerBasis) -> Tensor:
        """Products of the factors' eigenvalues."""
        return basis.kfac


@register("ekfac")
@dataclass(frozen=True)
class EKFAC(_KroneckerMethod):
    """Influence with K-FAC's eigenbasis and the eigenvalues measured in it: mean over examples of (Q_L^T G Q_R)^2.

    The best diagonal in that basis (George et al., arXiv 1806.03884; Grosse et al., arXiv 2308.03296); labels and
    damping as in `kfac`.
    """

    normalise: Normalise = "none"
    damping: Positive = DEFAULT_DAMPING
    labels: Labels = "model"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    def eigenvalues(self, basis: KroneckerBasis) -> Tensor:
        """Measured."""
        return basis.ekfac
