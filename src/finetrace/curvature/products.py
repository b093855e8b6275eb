"""The inner products that every method needs, for one block or for several summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

COLUMNS = 1 << 14  # entries whose products are summed in the precision of the gradients before they go to float64
ROWS = 512  # that are multiplied at a time, at least


@dataclass(frozen=True, eq=False)
class Gradients:
    """One block's gradients; the training side may be large and is read anew whenever it is asked for.

    Attributes:
        read_train: Gives (n, d), one training example a row.
        query: (m, d), one query a row.
        read_parts: Gives the same rows some at a time, where they lie; the whole at once if not given.
    """

    read_train: Callable[[], Tensor]
    query: Tensor
    read_parts: Callable[[], Iterable[Tensor]] | None = None

    @property
    def train(self) -> Tensor:
        """(n, d)."""
        return self.read_train()

    @property
    def parts(self) -> Iterable[Tensor]:
        """(rows, d) after (rows, d)."""
        return (self.train,) if self.read_parts is None else self.read_parts()

    @property
    def width(self) -> int:
        """d."""
        return self.query.shape[1]


class Kept(Protocol):
    """What was computed of one block's training gradients before."""

    def fetch(self, name: str, make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """The tensor kept under this name, or made now."""
        ...


class Made:
    """Nothing was."""

    def fetch(self, name: str, make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """Made now."""
        return make()


class Products:
    """K = G G^T, C = V G^T and the squared norms, each computed when first asked for.

    They are accumulated and kept in the precision of the gradients (float32 or wider) and handed out in float64, in
    which everything is factored and solved.
    """

    def __init__(self, gradients: Gradients, kept: Kept = Made()) -> None:
        """`kept` may hold what depends on the training gradients alone."""
        self.gradients: Gradients | None = gradients
        self.kept = kept

    @classmethod
    def of(cls, train: Tensor, query: Tensor) -> Products:
        """Of one block's (n, d) and (m, d) gradients in memory."""
        return cls(Gradients(lambda: train, query))

    @classmethod
    def known(cls, gram: Tensor, cross: Tensor, train_sq: Tensor, query_sq: Tensor, kept: Kept = Made()) -> Products:
        """Of products computed elsewhere, such as sums over blocks; there are no gradients behind them."""
        made = cls.__new__(cls)
        made.gradients = None
        made.kept = kept
        made.kept_gram, made._cross, made._train_sq, made._query_sq = gram, cross, train_sq, query_sq
        return made

    @property
    def gram(self) -> Tensor:
        """(n, n) K, float64."""
        return self.kept_gram.double()

    @property
    def cross(self) -> Tensor:
        """(m, n) C, float64."""
        return self._cross.double()

    @property
    def train_sq(self) -> Tensor:
        """(n,) squared norms of the training gradients, float64."""
        return self._train_sq.double()

    @property
    def query_sq(self) -> Tensor:
        """(m,) squared norms of the query gradients, float64."""
        return self._query_sq.double()

    @property
    def multiplied(self) -> bool:
        """Whether C is known already."""
        return "_cross" in vars(self)

    @property
    def n(self) -> int:
        """Number of training examples."""
        return len(self._train_sq)

    @cached_property
    def kept_gram(self) -> Tensor:
        """(n, n) K in the precision in which it was accumulated."""

        def make() -> Tensor:
            train = self._known.train
            product = train @ train.T
            return (product + product.T) / 2  # of few rows the two halves are summed in different orders

        return self.kept.fetch("gram", make)

    @cached_property
    def _cross(self) -> Tensor:
        query, parts = self._known.query, self._known.parts
        return joined([query @ part.T for part in gathered(parts)], dim=1)  # one copy of rows at a time

    @cached_property
    def _train_sq(self) -> Tensor:
        return self.kept.fetch("squares", lambda: joined([row_squares(part) for part in self._known.parts], dim=0))

    @cached_property
    def _query_sq(self) -> Tensor:
        return row_squares(self._known.query)

    @property
    def _known(self) -> Gradients:
        assert self.gradients is not None, "summed products carry no gradients"
        return self.gradients


def summed(parts: Callable[[], Iterable[Products]], m: int, n: int, kept: Kept) -> Products:
    """Several blocks as one, of (m, n) products C; K is taken from what is `kept`, or summed in a pass of its own."""

    def make() -> Tensor:
        gram = torch.zeros(n, n, dtype=torch.float64)
        for part in parts():
            gram += part.gram
        return gram

    gram = kept.fetch("joint", make)
    cross = torch.zeros(m, n, dtype=torch.float64)
    train_sq, query_sq = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for part in parts():
        cross += part.cross
        train_sq += part.train_sq
        query_sq += part.query_sq
    return Products.known(gram, cross, train_sq, query_sq, kept)


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """(a, b) inner products of (a, d) and (b, d) rows, float64: those of `COLUMNS` entries at a time, summed."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], COLUMNS):
        chosen = slice(start, start + COLUMNS)
        total += left[:, chosen] @ right[:, chosen].T
    return total


def gathered(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows, neighbours copied together until they are `ROWS`: products with few rows take up to twice as long."""
    waiting: list[Tensor] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= ROWS:
            yield joined(waiting, dim=0)
            waiting = []
    if waiting:
        yield joined(waiting, dim=0)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Tensors side by side; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def row_squares(rows: Tensor) -> Tensor:
    """(n,) squared norms of (n, d) rows, float64."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
