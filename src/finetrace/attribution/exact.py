"""Influence with the empirical Fisher inverted exactly, by the solver that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finetrace.attribution.gradient import DEFAULT_DAMPING, Positive, Scope, ScopedMethod
from finetrace.attribution.memory import held
from finetrace.attribution.method import Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.collection import Block
from finetrace.curvature import Damping, DampingRule, FisherDual, FisherPrimal, InverseCurvature, Products, fisher
from finetrace.curvature.conjugate_gradients import IterativeStream
from finetrace.curvature.dual import DualStream
from finetrace.curvature.nystroem import Sketch, nystroem
from finetrace.curvature.primal import PrimalStream
from finetrace.curvature.refinement import default_tolerance
from finetrace.curvature.segments import reciprocal
from finetrace.curvature.solvers import DENSE_BYTES, DUAL_BYTES, Solver, choose, packed, sketch_rank
from finetrace.curvature.streamed import Streamed
from finetrace.errors import FinetraceError
from finetrace.units import size


@register("exact")
@dataclass(frozen=True)
class Exact(ScopedMethod, StreamedMethod):
    """Influence with the empirical Fisher inverted exactly: sum_b V_b (lambda_b I + G_b^T G_b / n)^(-1) G_b^T.

    scope `joint` takes one Fisher over all blocks. Solvers meet the `tolerance`, the largest relative residual
    ||(F + lambda) x - v|| / ||v|| allowed (0: 1e-6 on float32 gradients, 1e-10 on float64 ones); in memory it is that of
    products as float32 sums them, and results name their rounding beside it. `dual` computes
    n C_b (K_b + n lambda_b I)^(-1); `primal` solves d_b x d_b; `cg` takes conjugate gradients, by products alone; `nystroem`
    preconditions them with a sketch; `auto` takes the cheapest of those that fit the memory.
    """

    normalise: Normalise = "none"
    scope: Scope = "block"
    damping: Positive = DEFAULT_DAMPING
    damping_rule: DampingRule = "trace"
    solver: Solver = "auto"
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    query_bytes: ClassVar[int] = 128

    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """The exact inverse, by the cheaper route unless one is asked for."""
        damping = Damping(self.damping, self.damping_rule).of(products, entries)
        if self.solver == "auto":
            return fisher(products, damping)
        return FisherDual(products, damping) if self.solver == "dual" else FisherPrimal(products, damping)

    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """One a block, or a single one; what was solved is measured.

        The residual is of the products as the gradients' precision sums them. They differ from the Fisher by about its unit
        roundoff u times the trace, which adds u trace / lambda to the residual of the gradients themselves: `rounding`.
        """
        solvers, worst, rounding = set(), 0.0, 0.0
        roundoff = torch.finfo(problem.features.gradients.dtype).eps / 2
        for part in super().parts(problem):
            yield part
            assert isinstance(part, (FisherDual, FisherPrimal))
            solvers.add("dual" if isinstance(part, FisherDual) else "primal")
            worst = max(worst, part.residual())
            rounding = max(rounding, roundoff * float(part.of.train_sq.mean()) / part.damping)
        tolerance = self._tolerance(problem)
        if worst > tolerance:
            raise FinetraceError(
                f"{self.label}: the relative residual is {worst:.1e}, not the tolerance {tolerance:.0e}; use more damping, or "
                "a larger tolerance."
            )
        if solvers:
            found = {"solver": " and ".join(sorted(solvers)), "residual": worst, "rounding": rounding}
            problem.computed[self.computed_as] = found

    @property
    def must_stream(self) -> bool:
        """Iterations go by products with the rows, and a primal solve over all blocks has no other way."""
        return self.solver in ("cg", "nystroem") or (self.solver == "primal" and self.joined)

    def held_bytes(self, problem: Problem) -> int:
        """With a Gram matrix of the rows, or of a block's columns where they are fewer."""
        dual = self.solver == "dual" or self.joined
        least = max(min(problem.n, block.size) if not dual else problem.n for block in problem.blocks)
        if self.solver == "primal":
            least = max(block.size for block in problem.blocks)
        return held(problem, gram=False) + 32 * least**2

    def groups(self, at: Pass) -> list[Sequence[Block]]:
        """All, or as many as have their d x d matrices in memory, for a primal solve."""
        if self.joined or self._solver(at) != "primal":
            return [at.rows.blocks]
        fit = packed(at.widths, at.spare) or [[k] for k in range(len(at.widths))]
        return [[at.rows.blocks[k] for k in group] for group in fit]

    def operator(self, at: Pass) -> Streamed:
        """By the solver chosen; products with the rows round as those in memory do (`parts`)."""
        self._refuse_beyond(at)
        damping = Damping(self.damping, self.damping_rule).of_traces(at.sizes.traces, at.entries)
        found = self._solving(at, damping)
        share = at.sizes.traces.to(damping) * reciprocal(damping)  # 0 where a segment is left out
        found.rounding = torch.finfo(at.rows.dtype).eps / 2 * float(share.max())
        return found

    def _solving(self, at: Pass, damping: Tensor) -> Streamed:
        solver, tolerance = self._solver(at), self._tolerance(at.problem)
        fetch = partial(at.fetch_of, damping=(self.damping, self.damping_rule))
        if solver == "dual":
            return DualStream(at.rows, damping, tolerance, fetch)
        if solver == "primal":
            return PrimalStream(at.rows, damping, tolerance, fetch)
        if solver == "cg":
            return IterativeStream(at.rows, damping, tolerance)
        rank, passed = sketch_rank(at.widths, at.rows.n, at.spare) or 1, 0

        def make() -> dict[str, Tensor]:
            nonlocal passed
            passed += 1
            drawn = nystroem(at.rows, rank)
            return {"vectors": drawn.vectors, "values": drawn.values}

        found = {name: tensor.to(at.rows.device) for name, tensor in at.fetch("sketch", make, rank=rank).items()}
        return IterativeStream(at.rows, damping, tolerance, Sketch(**found), passed=passed)

    def _refuse_beyond(self, at: Pass) -> None:
        """Stop where the solver that was asked for holds a matrix that the memory does not, beside queries and rows."""
        sides = {"dual": (at.rows.n, DUAL_BYTES), "primal": (max(at.widths), DENSE_BYTES)}
        if self.solver in sides:
            side, entry = sides[self.solver]
            queries = at.plan.queries * at.rows.width * self.query_bytes
            left = at.plan.memory - at.plan.memory // 4 - queries
            if (need := entry * side**2) > left:
                raise FinetraceError(
                    f"{self.label}: the {self.solver} solver holds a matrix of {side:,} x {side:,} and what becomes of it, "
                    f"{size(need)}, and of the memory of {size(at.plan.memory)} {size(max(0, left))} are left beside queries "
                    "and rows; give it more (--memory), or leave the solver to auto."
                )

    def _solver(self, at: Pass) -> Solver:
        if self.solver != "auto":
            return self.solver
        stored = at.problem.index.row_blocks(1).dtype.itemsize
        return choose(at.rows.n, at.problem.m, at.widths, at.spare, own=at.normalised, itemsize=stored)

    def _tolerance(self, problem: Problem) -> float:
        return self.tolerance or default_tolerance(problem.features.gradients.dtype)
