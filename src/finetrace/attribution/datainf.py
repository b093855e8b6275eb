"""DataInf influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from finetrace.attribution.gradient import DEFAULT_DAMPING, Positive, SpannedMethod
from finetrace.attribution.memory import held, widest
from finetrace.attribution.method import Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.collection import Block
from finetrace.curvature import Damping, DampingRule, DataInf, InverseCurvature, Products
from finetrace.curvature.datainf import DataInfStream, DenseDataInfStream
from finetrace.curvature.solvers import packed
from finetrace.curvature.streamed import Streamed


@register("datainf")
@dataclass(frozen=True)
class DataInfMethod(SpannedMethod, StreamedMethod):
    """DataInf: sum_b [C_b - (C_b D_b) K_b / n] / lambda_b, the mean of inverses for the inverse of the mean.

    D_b = diag(1 / (lambda_b + K_b,ii)), K_b = G_b G_b^T, C_b = V_b G_b^T (Kwon et al., arXiv 2310.00902).
    """

    normalise: Normalise = "none"
    damping: Positive = DEFAULT_DAMPING
    damping_rule: DampingRule = "trace"
    loss_on: str = ""
    layers: str = "all"
    at: str = ""
    query_bytes: ClassVar[int] = 64

    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """DataInf's P."""
        return DataInf(products, Damping(self.damping, self.damping_rule).of(products, entries))

    def held_bytes(self, problem: Problem) -> int:
        """With Gram matrices where a block has more entries than there are rows, or norms are wanted."""
        return held(problem, gram=self.normalise != "none" or widest(problem) >= problem.n)

    def groups(self, at: Pass) -> list[Sequence[Block]]:
        """All, or as many as have their d x d matrices in memory, where the rows' own influence is wanted."""
        fit = packed(at.widths, at.spare) if at.normalised else None
        return [at.rows.blocks] if fit is None else [[at.rows.blocks[k] for k in group] for group in fit]

    def operator(self, at: Pass) -> Streamed:
        """One pass for the queries, or d x d matrices that take none."""
        damping = Damping(self.damping, self.damping_rule).of_traces(at.sizes.traces, at.entries)
        if at.normalised and packed(at.widths, at.spare) is not None:
            fetch = partial(at.fetch_of, damping=(self.damping, self.damping_rule))
            return DenseDataInfStream(at.rows, damping, fetch)
        return DataInfStream(at.rows, damping)
