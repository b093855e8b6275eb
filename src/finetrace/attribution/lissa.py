"""LiSSA influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from finetrace.attribution.gradient import BY_STEP, DEFAULT_DAMPING, Positive, Scope, ScopedMethod
from finetrace.attribution.memory import held
from finetrace.attribution.method import Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.curvature import Damping, DampingRule, InverseCurvature, LiSSA, Products, ReleasedLiSSA
from finetrace.curvature.lissa import SUBSPACE, SeriesStream, largest_eigenvalues
from finetrace.curvature.streamed import Streamed


@register("lissa")
@dataclass(frozen=True)
class LiSSAMethod(ScopedMethod, StreamedMethod):
    """LiSSA: r_0 = v, r_t = v + r_(t-1) - (H + lambda I) r_(t-1) / sigma; the score is r_T . g / sigma.

    H = G^T G / n and sigma is the largest eigenvalue of H + lambda I, so more iterations come nearer to `exact`.
    recurrence `released` is that of the study's released code, r_t = v + r_(t-1) - (H - lambda I) r_(t-1) / 1000, scored
    as r_T . g, which is close to (iterations + 1) times `gradsim`.
    """

    normalise: Normalise = "none"
    iterations: Annotated[int, Field(ge=0)] = 10
    scope: Scope = "block"
    damping: Positive = DEFAULT_DAMPING
    damping_rule: DampingRule = "trace"
    recurrence: Literal["neumann", "released"] = "neumann"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""
    query_bytes: ClassVar[int] = 64

    @property
    def _unit(self) -> str:
        """The released recurrence approaches no inverse."""
        if self.recurrence == "neumann":
            return super()._unit
        return f"{BY_STEP}, (iterations + 1) times over"

    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """T terms of the Neumann series."""
        damping = Damping(self.damping, self.damping_rule).of(products, entries)
        kind = LiSSA if self.recurrence == "neumann" else ReleasedLiSSA
        return kind(products, damping, self.iterations)

    def held_bytes(self, problem: Problem) -> int:
        """With Gram matrices, on which it iterates."""
        return held(problem, gram=True)

    def operator(self, at: Pass) -> Streamed:
        """A pass a step; the largest eigenvalues, which take some passes more, are kept in the index."""
        damping = Damping(self.damping, self.damping_rule).of_traces(at.sizes.traces, at.entries)
        if self.recurrence == "released":
            return SeriesStream.released(at.rows, damping, self.iterations)
        vectors = max(1, min(SUBSPACE, at.spare // (32 * sum(at.widths))))

        def make() -> dict[str, Tensor]:
            return {"largest": largest_eigenvalues(at.rows, vectors)}

        found = at.fetch("largest", make)
        return SeriesStream.of(at.rows, damping, found["largest"], self.iterations)
