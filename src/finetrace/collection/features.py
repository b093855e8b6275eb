"""What a pass makes of its examples, and where the rows of many batches gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Features:
    """What is known of some examples, one a row, in the order they were given.

    Attributes:
        gradients: (rows, D) gradient of each example's own mean loss, blocks side by side.
        losses: (rows,) that loss, in nats.
        representations: By name (`pooling@layer`), (rows, d) hidden states.
        sampled: (rows, D) gradients of `sampled_loss`, where factors with the model's own labels were asked for.
        left_out: Why an example has no row here, by its position among those that were given.
        halved: How many batches did not fit in memory and were halved.
    """

    gradients: Tensor
    losses: Tensor
    representations: dict[str, Tensor]
    sampled: Tensor | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    halved: int = 0

    def __len__(self) -> int:
        return len(self.losses)

    def some(self, chosen: slice) -> Features:
        """Of some of the examples that have features."""
        kept = {name: value[chosen] for name, value in self.representations.items()}
        return Features(self.gradients[chosen], self.losses[chosen], kept)


class Gathering:
    """Room for the features of `count` examples, filled batch by batch in any order."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, sampled: bool) -> None:
        self.gradients = torch.empty(count, width, dtype=dtype)
        self.losses = torch.empty(count, dtype=dtype)
        self.sampled = torch.empty_like(self.gradients) if sampled else None
        self.representations: dict[str, Tensor] = {}
        self.left_out: dict[int, str] = {}
        self.halved = 0

    def put(self, chosen: Sequence[int], found: Features) -> None:
        """The features of the examples at the positions `chosen`, on the CPU, in place of any that were put there before."""
        places = list(chosen)
        self.gradients[places] = found.gradients
        self.losses[places] = found.losses
        if self.sampled is not None and found.sampled is not None:
            self.sampled[places] = found.sampled
        for name, values in found.representations.items():
            if name not in self.representations:
                self.representations[name] = values.new_empty(len(self.losses), values.shape[1])
            self.representations[name][places] = values

    def features(self) -> Features:
        """Everything but the rows that were left out."""
        if not self.left_out:
            return Features(self.gradients, self.losses, self.representations, self.sampled, {}, self.halved)
        kept = [i for i in range(len(self.losses)) if i not in self.left_out]
        hidden = {name: each[kept] for name, each in self.representations.items()}
        sampled = self.sampled[kept] if self.sampled is not None else None
        return Features(self.gradients[kept], self.losses[kept], hidden, sampled, dict(self.left_out), self.halved)
