"""Scores within a memory budget: training rows are read in blocks and met by preconditioned queries.

S = sum_b V_b P_b G_b^T is (V P) G^T: the queries are preconditioned first, in as many passes over the rows as P takes, and
one last pass gives the scores of all rows, block after block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
from torch import Tensor

from finetrace.attribution.memory import Plan, plan, tile
from finetrace.attribution.problem import Problem
from finetrace.attribution.stored_rows import StoredRows
from finetrace.attribution.streamed_pass import Pass
from finetrace.curvature.products import row_squares
from finetrace.curvature.refinement import Solution
from finetrace.curvature.segments import reciprocal, segment_dots, spread
from finetrace.curvature.solvers import Solver
from finetrace.curvature.streamed import Streamed
from finetrace.index.cache import digest

if TYPE_CHECKING:
    from finetrace.attribution.streamed_gradient import StreamedMethod


class Run(Protocol):
    """Scores of one method, block of rows after block of rows."""

    @property
    def queries(self) -> int:
        """How many go through together."""
        ...

    def blocks(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (m, r)) scores of the chosen queries, float64, from the first row to the last."""
        ...

    def describe(self) -> dict[str, Any]:
        """How it was computed."""
        ...


class MethodRun:
    """One method on one problem."""

    def __init__(self, method: StreamedMethod, problem: Problem, made: Plan) -> None:
        self.method = method
        self.problem = problem
        self.plan = made
        rows = StoredRows(problem.index, problem.blocks, made.step, joint=method.joined, device=problem.device)
        self.at = Pass(problem, made, rows, normalised=method.normalise != "none")
        self._operator: Streamed | None = None  # kept where there is one group
        self._solved: dict[str, Any] = {}
        problem.keeping.reserve(problem.memory)

    @property
    def queries(self) -> int:
        """How many go through together."""
        return self.plan.queries

    def describe(self) -> dict[str, Any]:
        """How it was computed."""
        return self.plan.describe() | self._solved

    def own(self) -> Tensor:
        """(n,) the rows' own influence."""
        kept = self.problem.sums.setdefault(self.method.curvature_key, {})
        if "train_self" not in kept:

            def make() -> dict[str, Tensor]:
                total = torch.zeros(self.at.rows.n, dtype=torch.float64)
                for _, group, operator in self._operators():
                    total += operator.own(group.rows, self._tile(group))
                return {"train_self": total}

            kept |= self.method.fetch_own(self.problem, make)
        return kept["train_self"]

    def blocks(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (m, r)) scores of the chosen queries, float64, from the first row to the last."""
        method, rows = self.method, self.at.rows
        vectors = rows.chosen(self.problem.features.gradients[chosen])
        ready, own = self._prepared(vectors)
        if method.by_block:
            yield from self._cosines(vectors, ready)
            return
        examples = None if own is None else reciprocal(own.clamp_min(0).sqrt()).to(rows.device)[:, None]
        queries = None
        if method.normalise == "cosine":
            lengths = (vectors.double() * ready * self._present()).sum(1)
            queries = reciprocal(lengths.clamp_min(0).sqrt())[None, :]
        for where, total in rows.products(ready):
            if examples is not None:
                total *= examples[where]
            if queries is not None:
                total.mul_(queries).clamp_(-1, 1)
            yield where, total.T.cpu()

    def _present(self) -> Tensor:
        """(D,) 0 in blocks whose rows have no gradient, which are left out of a query's norm whatever the scope; else 1."""
        rows = self.at.rows
        traces = self.problem.sizes(rows.by_block()).traces.to(rows.device)
        return spread((traces > 0).double(), rows.blocks_at)

    def _cosines(self, vectors: Tensor, ready: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The mean over blocks of each one's own cosine."""
        rows = self.at.rows
        count = int((self.at.sizes.traces > 0).sum())
        lengths = segment_dots(vectors.double(), ready, rows.blocks_at).sqrt()
        right = (ready * spread(reciprocal(lengths), rows.blocks_at) / max(1, count)).to(rows.dtype)
        for where, block in rows:
            total = torch.zeros(len(block), len(ready), dtype=torch.float64, device=rows.device)
            for s in rows.blocks_at:
                inner = block[:, s] @ right[:, s].T  # (r, m)
                total += inner * reciprocal(row_squares(block[:, s]).sqrt())[:, None]
            yield where, total.clamp_(-1, 1).T.cpu()

    def _prepared(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """(m, D) V P, and (n,) the rows' own influence where it is wanted; a group's curvature is made once for both."""
        method, problem = self.method, self.problem
        if method.plain:
            return vectors, None
        kept = problem.sums.setdefault(method.curvature_key, {})
        wanted = self.at.normalised and not method.by_block

        def make(*, own: bool) -> dict[str, Tensor]:
            ready = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
            total = torch.zeros(self.at.rows.n, dtype=torch.float64)
            for places, group, operator in self._operators():
                ready[:, places] = operator.solve(vectors[:, places])
                if own:
                    total += operator.own(group.rows, self._tile(group))
                self._note(operator)
            return {"ready": ready.cpu()} | ({"train_self": total} if own else {})

        made: dict[str, Tensor] = {}

        def owned() -> dict[str, Tensor]:
            made.update(make(own=True))
            return {"train_self": made["train_self"]}

        def queried() -> dict[str, Tensor]:
            ready = made["ready"] if made else make(own=False)["ready"]
            return {"ready": ready, **self._numbers()}

        if wanted and "train_self" not in kept:
            kept |= method.fetch_own(problem, owned)
        depends = {"curvature": method.curvature_key, "queries": digest(vectors), **method.depends(problem)}
        found = problem.fetch_all("queries", problem.blocks, queried, **depends)
        self._say(found)
        return found["ready"].to(vectors.device), kept["train_self"] if wanted else None

    def _numbers(self) -> dict[str, Tensor]:
        """How queries were solved, to be kept with them."""
        if "solver" not in self._solved:
            return {}
        names: list[str] = list(get_args(Solver))
        return {
            "solved": torch.tensor(
                [names.index(self._solved["solver"]), self._solved["residual"], self._solved["rounding"]],
                dtype=torch.float64,
            )
        }

    def _say(self, found: dict[str, Tensor]) -> None:
        if "solved" in found and "solver" not in self._solved:
            number, residual, rounding = found["solved"].tolist()
            solver = get_args(Solver)[int(number)]
            self._solved = {"solver": solver, "residual": residual, "rounding": rounding, "passes": 0}

    def _operators(self) -> Iterator[tuple[slice | Tensor, Pass, Streamed]]:
        """Every group's columns, rows and inverse curvature."""
        groups = self.method.groups(self.at)
        if len(groups) == 1:
            self._operator = self._operator or self.method.operator(self.at)
            yield slice(None), self.at, self._operator
            return
        columns = dict(zip(self.at.rows.blocks, self.at.rows.blocks_at, strict=True))
        for blocks in groups:
            places = torch.cat([torch.arange(columns[b].start, columns[b].stop) for b in blocks]).to(
                self.at.rows.device
            )
            group = self.at.part(blocks)
            yield places, group, self.method.operator(group)

    def _tile(self, group: Pass) -> int:
        return tile(self.plan.memory, group.rows.width, self.method.query_bytes, group.rows.piece)

    def _note(self, operator: Streamed) -> None:
        found = getattr(operator, "found", None)
        if isinstance(found, Solution):
            worst = max(found.residual, self._solved.get("residual", 0.0))
            rounding = max(operator.rounding, self._solved.get("rounding", 0.0))
            self._solved = {"solver": found.solver, "residual": worst, "rounding": rounding, "passes": found.passes}


class MeanRun:
    """The mean of the scores of several methods that go through their rows side by side."""

    def __init__(self, runs: Sequence[MethodRun]) -> None:
        self.runs = runs

    @property
    def queries(self) -> int:
        """How many go through together."""
        return min(run.queries for run in self.runs)

    def describe(self) -> dict[str, Any]:
        """How it was computed."""
        return self.runs[0].describe()

    def blocks(self, chosen: slice) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (m, r)) means."""
        for parts in zip(*(_steps(run.blocks(chosen), run.plan.step) for run in self.runs), strict=True):
            total = parts[0][1]
            for _, part in parts[1:]:
                total += part
            yield parts[0][0], total.div_(len(parts))


def run_of(pairs: Sequence[tuple[StreamedMethod, Problem]]) -> Run | None:
    """How several views of one method, or a single one, stream; `None` where all fit in memory."""
    if all(plan(method, problem) is None for method, problem in pairs):
        return None
    share = len(pairs)
    plans = [made for method, problem in pairs if (made := plan(method, problem, share, forced=True)) is not None]
    step = min(made.step for made in plans)
    runs = [
        MethodRun(method, problem, replace(made, step=step))
        for (method, problem), made in zip(pairs, plans, strict=True)
    ]
    return runs[0] if share == 1 else MeanRun(runs)


def whole(run: Run, m: int, n: int) -> Tensor:
    """(m, n) scores, float64."""
    values = torch.zeros(m, n, dtype=torch.float64)
    for chosen, where, part in all_blocks(run, m):
        values[chosen, where] = part
    return values


def all_blocks(run: Run, m: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, rows, scores) of all queries, as many at once as fit."""
    for first in range(0, m, run.queries):
        chosen = slice(first, min(first + run.queries, m))
        for where, part in run.blocks(chosen):
            yield chosen, where, part


def _steps(pieces: Iterator[tuple[slice, Tensor]], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces joined to blocks of `step` rows: views of different widths come in pieces of different sizes."""
    held: list[tuple[slice, Tensor]] = []
    for where, part in pieces:
        if held and where.start % step == 0:
            yield _joined(held)
            held = []
        held.append((where, part))
    if held:
        yield _joined(held)


def _joined(held: Sequence[tuple[slice, Tensor]]) -> tuple[slice, Tensor]:
    where = slice(held[0][0].start, held[-1][0].stop)
    return where, held[0][1] if len(held) == 1 else torch.cat([each for _, each in held], dim=1)
