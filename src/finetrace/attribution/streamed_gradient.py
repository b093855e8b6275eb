"""Gradient methods whose P is an operator on vectors too, so that rows are read in blocks where they do not fit in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from finetrace.attribution.gradient import GradientMethod
from finetrace.attribution.memory import plan
from finetrace.attribution.problem import Problem
from finetrace.attribution.streamed_pass import Pass
from finetrace.attribution.streaming import MethodRun, Run, run_of, whole
from finetrace.collection import Block
from finetrace.curvature.streamed import Streamed


class StreamedMethod(GradientMethod):
    """A gradient method that streams where its matrices exceed the problem's memory (`attribution.streaming`).

    Attributes:
        query_bytes: What an entry of a query takes: itself, preconditioned, and what is held on the way.
    """

    query_bytes: ClassVar[int] = 48

    @abstractmethod
    def operator(self, at: Pass) -> Streamed:
        """P of a group of blocks."""

    def groups(self, at: Pass) -> list[Sequence[Block]]:
        """Blocks whose curvatures are held together."""
        return [at.rows.blocks]

    @property
    def must_stream(self) -> bool:
        """Whether the parameters ask for what only streaming does."""
        return False

    @property
    def by_block(self) -> bool:
        """Whether scores are a cosine of each block."""
        return False

    @property
    def plain(self) -> bool:
        """Whether queries go through as they are."""
        return False

    def depends(self, problem: Problem) -> dict[str, Any]:
        """What P depends on besides parameters and gradients."""
        return {}

    def run(self, problem: Problem) -> Run | None:
        """How S is computed by streaming; `None` where what it takes fits the problem's memory, and `matrix` goes on there."""
        several = self._several()
        return run_of([(each, each.prepared(problem)) for each in several] if several else [(self, problem)])

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) S, normalised: streamed, or in memory."""
        run = self.run(problem)
        if run is None:
            return super().matrix(problem)
        values = whole(run, problem.m, problem.n).numpy()
        problem.computed[self.computed_as] = run.describe()
        return values

    def train_self(self, problem: Problem) -> Tensor:
        """(n,) self-influence g_i^T P g_i of every training example, summed over blocks."""
        made = plan(self, problem)
        return super().train_self(problem) if made is None else MethodRun(self, problem, made).own()

    def fetch_own(self, problem: Problem, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`train_self` from the index's cache, or all that `make` makes, of which it is kept."""
        more: dict[str, Tensor] = {}

        def own() -> dict[str, Tensor]:
            more.update(make())
            return {"train_self": more["train_self"]}

        return (
            problem.fetch_all("own", problem.blocks, own, curvature=self.curvature_key, **self.depends(problem)) | more
        )
