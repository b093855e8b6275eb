"""What scoring takes in memory, and how many rows and queries go through at a time where not everything fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetrace.attribution.problem import Problem
from finetrace.errors import FinetraceError
from finetrace.units import size

if TYPE_CHECKING:
    from finetrace.attribution.streamed_gradient import StreamedMethod

LARGEST_BLOCK = 64 << 20  # bytes of rows that are read at once where the budget is large: more is not faster
SCORE = 32  # bytes that a score of a block of rows takes: its product, itself, the block before it, what a mean puts together
PRODUCT = 16  # bytes of an inner product on the way through the rows


def widest(problem: Problem) -> int:
    """Entries of the largest block."""
    return max(block.size for block in problem.blocks)


def held(problem: Problem, *, gram: bool) -> int:
    """Bytes that scoring in memory takes, about: a block's gradients, the products, and with `gram` an n x n matrix."""
    n, m = problem.n, problem.m
    columns = 2 * n * widest(problem) * problem.features.gradients.element_size()
    return columns + 40 * m * n + (32 * n**2 if gram else 0)


@dataclass(frozen=True)
class Plan:
    """How one method goes through the rows.

    Attributes:
        memory: Bytes that it may use.
        step: Rows read at once.
        queries: Queries that go through together.
    """

    memory: int
    step: int
    queries: int

    def describe(self) -> dict[str, Any]:
        """As results say it."""
        return {
            "computed": "streamed",
            "memory": self.memory,
            "rows_at_once": self.step,
            "queries_at_once": self.queries,
        }


def plan(method: StreamedMethod, problem: Problem, share: int = 1, *, forced: bool = False) -> Plan | None:
    """How the method streams; `None` where all it needs fits the problem's memory, so that it goes on in memory.

    Args:
        method: One that looks at one loss, one choice of layers and one moment.
        problem: As the method looks at it.
        share: How many methods go through their rows side by side and share the memory.
        forced: Stream even if all fits.

    Raises:
        FinetraceError: Not even one row and one query fit.
    """
    forced = forced or problem.step is not None or method.must_stream
    if not forced and method.held_bytes(problem) <= problem.memory:
        return None
    memory = problem.memory // share
    stored = problem.index.row_blocks(1).dtype.itemsize
    width = sum(block.size for block in problem.blocks)
    query = width * method.query_bytes
    row = width * (2 * stored + (problem.index.manifest.computed_dtype.itemsize if stored < 4 else 0))
    if query + row > memory:
        raise FinetraceError(
            f"{method.label}: one query and one row of {width:,} entries take {size(query + row)}, more than the memory "
            f"of {size(memory)}; give it more (--memory)."
        )
    room = memory // 4  # for a block of rows and its scores
    queries = max(1, min(problem.m, memory // 2 // query, room // (SCORE * (problem.step or 1))))
    step = problem.step or max(1, min(LARGEST_BLOCK // row, room // (row + SCORE * queries)))
    return Plan(memory, min(problem.n, step), queries)


def tile(memory: int, width: int, query_bytes: int, rows: int) -> int:
    """Rows that go through as queries together, where their products with `rows` rows are held at a time."""
    return max(1, min(memory // 2 // (width * query_bytes), memory // 8 // (PRODUCT * rows)))
