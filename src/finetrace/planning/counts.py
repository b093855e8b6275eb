"""What there is to do, counted exactly: the shards and batches that an index will go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from finetrace.batching import batches
from finetrace.encoding import Encoded


@dataclass(frozen=True)
class Piece:
    """One batch.

    Attributes:
        rows: Its examples, by their position in the data.
        longest: Tokens that each is padded to.
        tokens: Tokens that are not padding.
        loss_tokens: Tokens of the loss.
        beside: Whether it is collected side by side with others.
    """

    rows: tuple[int, ...]
    longest: int
    tokens: int
    loss_tokens: int
    beside: bool = True

    @property
    def padded(self) -> int:
        """Tokens that the model computes."""
        return len(self.rows) * self.longest

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, padded length and loss tokens, as `Shape` takes them."""
        return len(self.rows), self.longest, self.loss_tokens


def pieces_of(
    encoded: Sequence[Encoded],
    rows_per_shard: int,
    budget: int,
    beside: Callable[[Sequence[Encoded]], bool] = lambda items: True,
) -> list[list[Piece]]:
    """Every shard's batches, as the collection forms them: those that go side by side before the others."""
    shards = []
    for start in range(0, len(encoded), rows_per_shard):
        items = encoded[start : start + rows_per_shard]
        pieces = [_piece([items[i] for i in chosen], chosen, start, beside) for chosen in batches(items, budget)]
        shards.append(sorted(pieces, key=lambda piece: not piece.beside))
    return shards


def _piece(
    items: Sequence[Encoded], chosen: Sequence[int], start: int, beside: Callable[[Sequence[Encoded]], bool]
) -> Piece:
    lengths = [len(item.ids) for item in items]
    loss = sum(item.loss_tokens for item in items)
    return Piece(tuple(start + i for i in chosen), max(lengths), sum(lengths), loss, beside(items))


@dataclass(frozen=True)
class Work:
    """The batches of the shards that are left to do."""

    shards: tuple[tuple[Piece, ...], ...]

    @classmethod
    def of(cls, shards: Iterable[Iterable[Piece]]) -> Work:
        """From lists."""
        return cls(tuple(map(tuple, shards)))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All batches, in the order in which they are done."""
        return tuple(piece for shard in self.shards for piece in shard)

    @property
    def rows(self) -> int:
        """Examples."""
        return sum(len(piece.rows) for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens, padding left out."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def padded(self) -> int:
        """Tokens that the model computes, padding included."""
        return sum(piece.padded for piece in self.pieces)

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    @property
    def loss_tokens(self) -> int:
        """Tokens of the loss."""
        return sum(piece.loss_tokens for piece in self.pieces)
