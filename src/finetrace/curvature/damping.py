"""The damping lambda as a multiple of something measured on the training gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetrace.curvature.products import Products

DampingRule = Literal["trace", "entry"]


@dataclass(frozen=True)
class Damping:
    """lambda of one block (or of all of them jointly), from the n x d training gradients G.

    Attributes:
        multiple: The factor.
        rule: `trace`: lambda = multiple * mean_i ||g_i||^2 = multiple * trace(G^T G / n), the sum of the empirical
            Fisher's eigenvalues, which means the same for a block of any size and for all of them jointly.
            `entry`: lambda = multiple * mean of the squared entries of G, which is the trace divided by d; with
            multiple 0.1 this is the rule of Grosse et al. (2308.03296) and DataInf (2310.00902). A projection keeps the
            trace in expectation, and d is that of the gradients before it.
    """

    multiple: float
    rule: DampingRule = "trace"

    def of(self, products: Products, entries: int) -> float:
        """lambda for a block whose gradient has so many entries."""
        trace = float(products.train_sq.mean())
        return self.multiple * (trace if self.rule == "trace" else trace / entries)

    def of_traces(self, traces: Tensor, entries: Sequence[int]) -> Tensor:
        """(S,) lambda of segments whose empirical Fishers have these traces and whose gradients so many entries."""
        counts = torch.tensor(entries, dtype=torch.float64, device=traces.device)
        return self.multiple * (traces if self.rule == "trace" else traces / counts)
