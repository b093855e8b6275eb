"""Similarity of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetrace.attribution.method import Method, Need, register
from finetrace.attribution.problem import Problem
from finetrace.collection.representations import Pooling, Representation

PIECE = 4 << 20  # bytes of hidden states that are in float64 at a time


def cosines(query: Tensor, train: Callable[[], Iterable[Tensor]], n: int, *, centred: bool) -> NDArray[np.float64]:
    """(m, n) cosines of (m, d) with (n, d), with `centred` after the mean of the n rows was taken off both.

    `train` gives the rows in parts, from the first to the last, as often as it is called; none is kept.
    """

    def pieces() -> Iterator[Tensor]:
        for part in train():
            yield from (piece.double() for piece in part.split(max(1, PIECE // (8 * query.shape[1]))))

    middle = sum(piece.sum(0) for piece in pieces()) / n if centred else 0.0

    def directions(states: Tensor) -> Tensor:
        return torch.nn.functional.normalize(states - middle, dim=1)

    rows, scores, start = directions(query.double()), torch.empty(len(query), n, dtype=torch.float64), 0
    for piece in pieces():
        scores[:, start : start + len(piece)] = rows @ directions(piece).T
        start += len(piece)
    return scores.clamp_(-1, 1).numpy()


@register("repsim")
@dataclass(frozen=True)
class RepSim(Method):
    """Cosine of hidden states, h(query) . h(example) / (||h(query)|| ||h(example)||).

    By default of the final layer at the last prompt token (arXiv 2409.19998), which sees no response; pooling
    `last-token` and `mean-response` do. `layer` counts from 0, the embedding, or from the end, or is a share of the depth
    (see `Representation`). `centred` takes the mean over the training examples off both sides before the cosine: what all
    rows have in common then counts for nothing.
    """

    needs: ClassVar[tuple[Need, ...]] = ("representations",)
    layer: int | float = -1
    pooling: Pooling = "last-prompt"
    centred: bool = False

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) cosines."""
        train, query = problem.representations(Representation(self.layer, self.pooling))
        return cosines(query, train, problem.n, centred=self.centred)

    @property
    def unit(self) -> str:
        """A cosine."""
        return "cosine"

    @property
    def normalisation(self) -> str:
        """Always a cosine."""
        return "cosine"
