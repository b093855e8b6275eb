"""Which batches of a shard go side by side, and what their company costs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetrace.collection.lanes import Lanes
from finetrace.planning.counts import Piece


@dataclass(frozen=True)
class Rounds:
    """Rounds of `at_once` batches, as `collection.lanes` has them."""

    at_once: int

    def together(self, shard: Sequence[Piece]) -> int:
        """How many of a shard's batches, the first ones, go side by side; those after them go by themselves."""
        return Lanes(self.at_once).rounds(sum(piece.beside for piece in shard))

    def share(self, shard: Sequence[Piece], place: int, slower: float) -> float:
        """Times of its share of a full round that a batch of a shard takes: more in one that is not full, and by itself.

        `slower` is that of a batch by itself.
        """
        together = self.together(shard)
        if place >= together:
            return slower if shard[place].beside else 1.0
        last = together % self.at_once
        return self.at_once / last if place >= together - last else 1.0

    def ends(self, shard: Sequence[Piece], place: int) -> bool:
        """Whether all batches that were under way beside one of a shard have ended with it."""
        return place + 1 >= self.together(shard) or (place + 1) % self.at_once == 0

    def alone(self, shards: Iterable[Sequence[Piece]]) -> float:
        """Share of the tokens that goes by itself, all threads on one batch, where others go side by side."""
        shards = list(shards)
        whole = sum(piece.padded for shard in shards for piece in shard)
        last = sum(piece.padded for shard in shards for piece in shard[self.together(shard) :] if piece.beside)
        return last / whole if self.at_once > 1 and last else 0.0
