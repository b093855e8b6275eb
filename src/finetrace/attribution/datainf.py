"""DataInf influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from finetrace.attribution.gradient import DEFAULT_DAMPING, Positive, SpannedMethod
from finetrace.attribution.memory import held, widest
from finetrace.attribution.method import Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.stored_rows import adjacent
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streamed_pass import Pass
from finetrace.collection import Block
from finetrace.curvature import Damping, DampingRule, DataInf, Products
from finetrace.curvature.datainf import DataInfStream, DenseDataInfStream
from finetrace.curvature.products import inner_products
from finetrace.curvature.solvers import packed
from finetrace.curvature.streamed import Streamed
from finetrace.index.cache import ROWS


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

    def inverse(self, products: Products, entries: int) -> DataInf:
        """DataInf's P."""
        return DataInf(products, Damping(self.damping, self.damping_rule).of(products, entries))

    def _totals(self, problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
        """Products are V R^T with the rows R = G P, where the index's cache has room for them: one product a query.

        A cosine has to know V G^T besides, and takes them from that.
        """
        rows = self._rows(problem) if "products" in names and "query_self" not in names else None
        if rows is None:
            return super()._totals(problem, names)
        query = problem.features.gradients
        parts = [query[:, run] for run in adjacent(problem.blocks)]
        products = inner_products(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rows)
        return {**super()._totals(problem, [name for name in names if name != "products"]), "products": products}

    def _rows(self, problem: Problem) -> Tensor | None:
        """(n, D) R of the problem's blocks side by side, kept; `None` where there is no room, or C is known already."""
        held = [problem.keeping.get(problem.index, block.name) for block in problem.blocks]
        if problem.cache is None or all(each is not None and each.multiplied for each in held):
            return None
        dtype, ends = problem.features.gradients.dtype, list(accumulate(block.size for block in problem.blocks))
        size = problem.n * ends[-1] * dtype.itemsize
        if self.held_bytes(problem) + 2 * size > problem.memory:
            return None

        def make() -> Tensor:
            rows = torch.zeros(problem.n, ends[-1], dtype=dtype)
            at = {block.name: slice(end - block.size, end) for block, end in zip(problem.blocks, ends, strict=True)}
            for block, products in problem.products():
                rows[:, at[block.name]] = self.inverse(products, block.entries).rows()
            return rows

        about = {"damping": [self.damping, self.damping_rule]}
        return problem.cache.fetch_rows(f"datainf-{ROWS}", problem.blocks, make, size, **about)

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
