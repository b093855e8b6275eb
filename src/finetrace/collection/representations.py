"""Hidden states as representations: which layer, and pooled over which tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finetrace.attention import HALF
from finetrace.errors import FinetraceError
from finetrace.forward import Batch

Pooling = Literal["last-prompt", "last-token", "mean-response"]
POOLINGS: tuple[Pooling, ...] = ("last-prompt", "last-token", "mean-response")


@dataclass(frozen=True)
class Representation:
    """A hidden state of one layer, pooled over tokens.

    Attributes:
        layer: 0 is the embedding, k the output of transformer layer k, the last one after the final norm; negative
            numbers count from the end, so -1 is what the vocabulary projection sees. A number between 0 and 1 is a share
            of the model's depth: 0.75 of 30 layers is layer 22.
        pooling: `last-prompt` (the token from which the answer starts), `last-token` (the last token of the loss: the
            answer's end-of-turn token, or the text's last token with the loss on all) or `mean-response` (mean over the
            tokens of the loss).
    """

    layer: int | float = -1
    pooling: Pooling = "last-prompt"

    @property
    def name(self) -> str:
        """`pooling@layer`, as stored in an index."""
        return f"{self.pooling}@{self.layer}"

    @property
    def place(self) -> int:
        """The layer by number, of what was resolved."""
        if isinstance(self.layer, float):
            raise TypeError(f"{self.name} is a share of a depth; resolve it for a model first.")
        return self.layer

    @classmethod
    def parse(cls, text: str) -> Representation:
        """From `pooling@layer` or `pooling`."""
        pooling, at, layer = text.partition("@")
        if pooling not in POOLINGS or (at and not re.fullmatch(r"-?[0-9]+|0?\.[0-9]+", layer)):
            raise FinetraceError(
                f"{text}: not a representation; write {'|'.join(POOLINGS)}, with @LAYER if not the last: a number, or "
                "a share of the depth between 0 and 1."
            )
        return cls((float(layer) if "." in layer else int(layer)) if at else -1, pooling)

    def resolve(self, layers: int) -> Representation:
        """The same with the layer counted from the end, which is how an index names it."""
        if isinstance(self.layer, float):
            if not 0 < self.layer < 1:
                raise FinetraceError(f"layer {self.layer}: a share of the model's depth lies between 0 and 1.")
            layer = max(1, int(self.layer * layers)) - layers - 1
        else:
            layer = self.layer if self.layer < 0 else self.layer - layers - 1
        if not -layers - 1 <= layer < 0:
            raise FinetraceError(f"layer {self.layer}: the model has layers 0 (embedding) to {layers}.")
        return Representation(layer, self.pooling)


UPPER = 0.75  # where answers of one kind lie closest together (benchmarks/choose_representation.py)
FINAL = tuple(Representation(-1, pooling) for pooling in POOLINGS)
DEFAULT_REPRESENTATIONS = (*FINAL, Representation(UPPER, "mean-response"))


def pool(hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Reduce (B, T, d) hidden states to (B, d), in float32 or wider."""
    batch = batch.to(hidden.device)  # where the layer is
    every = torch.arange(len(batch), device=hidden.device)
    if pooling == "last-prompt":
        last = torch.tensor(batch.prompt_lengths, device=hidden.device) - 1
        chosen = hidden[every, last]
    elif pooling == "last-token":
        last = torch.zeros(len(batch), dtype=torch.long, device=hidden.device)
        last = last.scatter_reduce(0, batch.example, batch.rows % hidden.shape[1] + 1, "amax")
        chosen = hidden[every, last]
    else:
        tokens = hidden.reshape(-1, hidden.shape[-1])[batch.rows + 1]  # the loss tokens themselves
        tokens = tokens.float() if hidden.dtype in HALF else tokens
        total = torch.zeros(len(batch), hidden.shape[-1], dtype=tokens.dtype, device=hidden.device)
        counts = torch.tensor(batch.counts, device=hidden.device).unsqueeze(1)
        chosen = total.index_add(0, batch.example, tokens) / counts
    return chosen.float() if chosen.dtype in HALF else chosen
