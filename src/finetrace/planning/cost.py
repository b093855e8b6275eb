"""Floating-point operations and memory of one pass of a causal language model, by its shapes alone.

A matrix product with a weight of P entries takes 2 P operations a token forward and as many backward, where only the gradient
of its input is wanted: frozen weights get none. Attention comes on top, and the gradients of the tracked matrices themselves.
The vocabulary projection sees the tokens of the loss alone. What is left out, norms and activation functions and the cost of
starting kernels, is in the rate that is measured, so that only ratios of these numbers count where batches were measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetrace.collection.factors import Labels
    from finetrace.collection.modules import Tracking

LOGITS = 3  # float32 copies of the logits that a backward pass needs at once: themselves, their softmax, its gradient


@dataclass(frozen=True)
class Shape:
    """What the cost of a pass hangs on.

    Attributes:
        layers: Transformer layers.
        hidden: Width of the residual stream.
        attention: Heads times their width.
        keys: The same of keys and values, smaller where query heads share them.
        intermediate: Width inside the feed-forward layers.
        vocabulary: Tokens that there are.
        below: Entries of the weights below the lowest tracked layer, which take no backward pass; embeddings and the
            vocabulary projection are in neither.
        above: Entries of the other weights.
        layers_above: Transformer layers from the lowest tracked one on.
        tracked: (rows, columns) of each tracked matrix, as it is kept.
        contracted: Entries of the gradients that are formed: of one projected on both sides what is kept, of one projected
            afterwards the whole.
    """

    layers: int
    hidden: int
    attention: int
    keys: int
    intermediate: int
    vocabulary: int
    below: int
    above: int
    layers_above: int
    tracked: tuple[tuple[int, int], ...]
    contracted: int

    @classmethod
    def of(cls, model: Any, tracking: Tracking) -> Shape:
        """Of a loaded model and what is tracked of it."""
        config = model.config.get_text_config()
        heads = int(config.num_attention_heads)
        wide = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        shared = int(getattr(config, "num_key_value_heads", None) or heads)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        below, above = _weights(model, {id(layer.module) for layer in tracking.layers})
        layers = int(config.num_hidden_layers)
        lowest = min((_layer(block.name) for block in tracking.blocks), default=0)
        return cls(
            layers=layers,
            hidden=int(config.hidden_size),
            attention=heads * wide,
            keys=shared * wide,
            intermediate=int(inner) if isinstance(inner, int) else int(max(inner)),
            vocabulary=int(model.get_output_embeddings().weight.shape[0]),
            below=below,
            above=above,
            layers_above=max(0, layers - lowest),
            tracked=tuple(block.matrix for block in tracking.blocks),
            contracted=sum(
                math.prod(block.original or block.shape) if block.name in tracking.flat else block.size
                for block in tracking.blocks
            ),
        )

    @property
    def head(self) -> int:
        """Entries of the vocabulary projection."""
        return self.vocabulary * self.hidden

    def forward(self, rows: int, longest: int, loss_tokens: int) -> float:
        """Operations of the forward pass of `rows` examples padded to `longest`, `loss_tokens` of them in the loss."""
        tokens = rows * longest
        attention = 4.0 * tokens * longest * self.attention * self.layers
        return 2.0 * tokens * (self.below + self.above) + attention + 2.0 * loss_tokens * self.head

    def backward(self, rows: int, longest: int, loss_tokens: int) -> float:
        """Operations of one backward pass down to the lowest tracked layer, the tracked gradients included."""
        tokens = rows * longest
        attention = 8.0 * tokens * longest * self.attention * self.layers_above
        products = 2.0 * tokens * (self.above + self.contracted)
        return products + attention + 2.0 * loss_tokens * self.head

    def factors(self, rows: int, longest: int, loss_tokens: int, labels: Labels) -> float:
        """What Kronecker factors add: outer products of both sides of a matrix, and with the model's labels a backward pass."""
        outer = 2.0 * rows * longest * sum(r * r + c * c for r, c in self.tracked)
        return outer + (self.backward(rows, longest, loss_tokens) if labels == "model" else 0.0)

    def collection(self, rows: int, longest: int, loss_tokens: int, labels: Labels | None = None) -> float:
        """Operations that the collection of one batch takes."""
        whole = self.forward(rows, longest, loss_tokens) + self.backward(rows, longest, loss_tokens)
        return whole + (self.factors(rows, longest, loss_tokens, labels) if labels is not None else 0.0)

    def activations(self, rows: int, longest: int, loss_tokens: int, half: bool) -> int:
        """Bytes that one batch holds at most between its forward and its backward pass: an estimate.

        Of every token and layer above the lowest tracked one: the residual stream and what two norms keep of it, in float32;
        queries, keys, values and what attention makes of them; three widths of the feed-forward layer; in the dtype of the
        matrix products. Then the logits.
        """
        product = 2 if half else 4
        wide = 4 * 7 * self.hidden
        narrow = product * (2 * self.hidden + 2 * self.attention + 3 * self.keys + 4 * self.intermediate)
        tokens = rows * longest
        return tokens * self.layers_above * (wide + narrow) + LOGITS * 4 * loss_tokens * self.vocabulary


def decomposition(matrices: Sequence[tuple[int, int]], examples: int) -> tuple[float, float]:
    """What finishing Kronecker factors takes: sum of n^3 over the sides decomposed, and operations of turning the gradients."""
    cubes = float(sum(r**3 + c**3 for r, c in matrices))
    return cubes, 2.0 * examples * sum(r * r * c + r * c * c for r, c in matrices)


def _weights(model: Any, tracked: set[int]) -> tuple[int, int]:
    """Entries of the linear weights before the first tracked module and from there on, in the order of registration."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = {id(module) for module in model.get_output_embeddings().modules()}
    below = above = 0
    started = False
    for module in model.modules():
        started = started or id(module) in tracked
        if id(module) in head or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        entries = (
            module.in_features * module.out_features if isinstance(module, nn.Linear) else int(module.weight.numel())
        )
        if started:
            above += entries
        else:
            below += entries
    return below, above


def _layer(name: str) -> int:
    """The transformer layer that a parameter is in, 0 where its name has no number."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0
