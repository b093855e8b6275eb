"""Inner products that methods share, kept while they fit beside what a method holds."""

from __future__ import annotations

from finetrace.curvature import Products
from finetrace.index.store import Index

MOST = 2 << 30  # bytes


class Keeping:
    """The products of single blocks of a problem and of its views, and of all blocks as one, within one budget.

    Those of an index's single blocks are kept all or not at all.
    """

    def __init__(self, memory: int) -> None:
        """`memory` is the budget in bytes."""
        self._memory = memory
        self._room = min(MOST, memory)
        self._taken: dict[tuple[Index, str], int] = {}
        self._kept: dict[tuple[Index, str], Products] = {}

    def reserve(self, held: int) -> None:
        """Leave so many bytes to the method that is about to be computed; what does not fit beside them goes."""
        self._room = min(MOST, self._memory - held)
        if sum(self._taken.values()) > self._room:
            self._taken.clear()
            self._kept.clear()

    def get(self, index: Index, block: str) -> Products | None:
        """What is kept of a block."""
        return self._kept.get((index, block))

    def put(self, index: Index, block: str, products: Products, whole: int, together: str = "") -> None:
        """Keep a block's products, if those of all that are kept `together` with them, `whole` bytes, fit."""
        if (index, together) not in self._taken:
            if sum(self._taken.values()) + whole > self._room:
                return
            self._taken[index, together] = whole
        self._kept[index, block] = products
