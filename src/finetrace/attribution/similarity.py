"""Similarity of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from finetrace.attribution.method import Method, Need, register
from finetrace.attribution.problem import Problem
from finetrace.collection.representations import Pooling, Representation


@register("repsim")
@dataclass(frozen=True)
class RepSim(Method):
    """Cosine of hidden states, h(query) . h(example) / (||h(query)|| ||h(example)||).

    By default of the final layer at the last prompt token (arXiv 2409.19998), which sees no response; pooling
    `last-token` and `mean-response` do.
    """

    needs: ClassVar[tuple[Need, ...]] = ("representations",)
    layer: int = -1
    pooling: Pooling = "last-prompt"

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) cosines."""
        train, query = problem.representations(Representation(self.layer, self.pooling))
        rows, columns = (torch.nn.functional.normalize(each.double(), dim=1) for each in (query, train))
        return (rows @ columns.T).clamp(-1, 1).numpy()

    @property
    def unit(self) -> str:
        """A cosine."""
        return "cosine"

    @property
    def normalisation(self) -> str:
        """Always a cosine."""
        return "cosine"
