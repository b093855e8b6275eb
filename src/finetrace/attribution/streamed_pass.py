"""What a method that streams works with: the rows, what is known of them, and the memory for its curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from finetrace.attribution.memory import Plan
from finetrace.attribution.problem import Problem
from finetrace.attribution.stored_rows import StoredRows
from finetrace.collection import Block
from finetrace.curvature.passes import Sizes


class Pass:
    """What a method that streams works with, for all blocks or for a group of them.

    Attributes:
        problem: The problem as the method looks at it.
        plan: How it goes through the rows.
        rows: The rows.
        sizes: Of the rows' segments.
        spare: Bytes for the curvature.
        normalised: Whether the rows' own influence is wanted too.
    """

    def __init__(self, problem: Problem, plan: Plan, rows: StoredRows, *, normalised: bool) -> None:
        self.problem = problem
        self.plan = plan
        self.rows = rows
        self.spare = plan.memory // 4
        self.normalised = normalised

    @property
    def sizes(self) -> Sizes:
        """Found in one pass unless they are known."""
        return self.problem.sizes(self.rows)

    @property
    def widths(self) -> list[int]:
        """Of the segments."""
        return [s.stop - s.start for s in self.rows.segments]

    @property
    def entries(self) -> list[int]:
        """Of the segments' gradients, before any projection."""
        counts = [block.entries for block in self.rows.blocks]
        return [sum(counts)] if self.rows.joint else counts

    def fetch(self, name: str, make: Callable[[], dict[str, Tensor]], **depends: Any) -> dict[str, Tensor]:
        """Tensors that depend on these rows, from the index's cache or made now."""
        return self.problem.fetch_all(name, self.rows.blocks, make, joint=self.rows.joint, **depends)

    def fetch_of(self, segment: int, name: str, make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """The same for a tensor that depends on one segment of the rows."""
        blocks = self.rows.blocks if self.rows.joint else self.rows.blocks[segment : segment + 1]
        return self.problem.kept(blocks).fetch(name, make, joint=self.rows.joint, **depends)

    def part(self, blocks: Sequence[Block]) -> Pass:
        """The same for a group of blocks."""
        if tuple(blocks) == self.rows.blocks:
            return self
        return Pass(self.problem, self.plan, self.rows.part(blocks), normalised=self.normalised)
