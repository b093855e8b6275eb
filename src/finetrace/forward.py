"""One pass of a causal language model that projects only the wanted positions onto the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from finetrace.attention import short_attention
from finetrace.cross_entropy import cross_entropy
from finetrace.encoding import Encoded
from finetrace.prefix import Prefix

LEAST_ROWS = 16  # below it MKL multiplies by the vocabulary matrix in another way, ten times less exactly


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length; under a causal mask no real token ever sees the padding.

    Attributes:
        ids: (B, T) token ids, zero where padded.
        rows: (R,) positions b * T + t, ordered by example, whose hidden state predicts a token of the loss.
        targets: (R,) the tokens predicted there.
        weights: (R,) their weights in float64, summing to 1 within an example.
        example: (R,) which example of the batch each row belongs to.
        counts: (B,) rows of each example.
        lengths: (B,) unpadded lengths.
        prompt_lengths: (B,) tokens before the last response.
        mask: (B, T) 0 where an example was padded on its left, else 1; `None` where none was.
    """

    ids: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    example: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    mask: Tensor | None = None

    @classmethod
    def of(cls, items: Sequence[Encoded]) -> Batch:
        """Pad `items` to the longest of them, on the CPU."""
        longest = max(len(item.ids) for item in items)
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        weights = torch.zeros(len(items), longest, dtype=torch.float64)
        for b, item in enumerate(items):
            ids[b, : len(item.ids)] = torch.from_numpy(item.ids)
            weights[b, : len(item.ids)] = torch.from_numpy(item.weights)
        mask = None
        if any(item.padding for item in items):
            mask = torch.ones_like(ids)
            for b, item in enumerate(items):
                mask[b, : item.padding] = 0
        weights /= weights.sum(1, keepdim=True)  # float32 left them summing to 1 only to its own rounding
        example, token = torch.nonzero(weights, as_tuple=True)  # (R,), (R,)
        return cls(
            ids=ids,
            rows=example * longest + token - 1,
            targets=ids[example, token],
            weights=weights[example, token],
            example=example,
            counts=tuple(torch.bincount(example, minlength=len(items)).tolist()),
            lengths=tuple(len(item.ids) for item in items),
            prompt_lengths=tuple(item.prompt_length for item in items),
            mask=mask,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        names = ("ids", "rows", "targets", "weights", "example", "mask")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def carrying(self) -> Tensor:
        """(S,) positions b * T + t through which a loss can reach a weight: from an example's first token, padding left out,
        to the last one that predicts a token of its loss, and what else does so.
        """
        count, width = self.ids.shape
        places = torch.arange(width, device=self.ids.device)
        last = torch.full((count,), -1, dtype=torch.long, device=self.ids.device)
        last = last.scatter_reduce(0, self.example, self.rows % width, "amax")
        inside = places <= last[:, None]  # (B, T)
        if self.mask is not None:
            inside = inside & self.mask.bool()
        inside = inside.flatten()
        inside[self.rows] = True  # a loss may look at padding
        return inside.nonzero().squeeze(1)


@contextmanager
def projecting_rows(head: nn.Module, rows: Tensor) -> Iterator[list[Tensor]]:
    """While open, `head` sees only `rows` of its (B, T, d) input, as one (1, R, d) matrix.

    The model's own scaling or soft-capping after the head still applies, being element-wise. Gathering first matters:
    a sliced (B, k, d) input makes bfloat16 on the CPU copy the vocabulary matrix once an example. The list that is
    yielded receives the head's whole (B, T, d) input: the final hidden states.
    """
    seen: list[Tensor] = []

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # (B, T, d)
        seen.append(hidden)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.to(hidden.device))
        return (chosen.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield seen
    finally:
        handle.remove()


def token_logits(
    model: nn.Module, batch: Batch, *, hidden_states: bool = False, prefix: Prefix | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits at the positions that predict a loss token, in the model's precision.

    A `prefix` spares the layers that it covers; it is left aside where their hidden states are asked for.

    Returns:
        (R, vocabulary) logits, aligned with `batch.rows`, and (B, T, d) hidden states by layer counted from the end: -1,
        what the vocabulary projection sees, and with `hidden_states` the others down to the embedding.
    """
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    if batch.mask is not None:
        options["attention_mask"] = batch.mask
    spared = nullcontext() if prefix is None or hidden_states else prefix.sparing(batch.ids, batch.lengths, batch.mask)
    spare = batch.rows.new_zeros(max(0, LEAST_ROWS - len(batch.rows)))
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    with projecting_rows(head, torch.cat([batch.rows, spare])) as final, short_attention(), spared:
        output = model(input_ids=batch.ids, use_cache=False, **options)
    logits = output.logits.squeeze(0)  # (R, vocabulary)
    if len(spare):
        logits = logits[: len(batch.rows)]
    layers = {-1: final[0]}
    if hidden_states:
        layers |= {i - len(output.hidden_states): state for i, state in enumerate(output.hidden_states[:-1])}
    return logits, layers


def token_losses(
    model: nn.Module, batch: Batch, *, hidden_states: bool = False, prefix: Prefix | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """(R,) cross-entropy of every loss token in nats, aligned with `batch.rows`, and hidden states as `token_logits`."""
    logits, layers = token_logits(model, batch, hidden_states=hidden_states, prefix=prefix)
    return cross_entropy(logits, batch.targets), layers


def example_losses(batch: Batch, losses: Tensor) -> Tensor:
    """(B,) each example's own weighted mean of its (R,) token losses."""
    total = torch.zeros(len(batch), dtype=losses.dtype, device=losses.device)
    return total.index_add(0, batch.example, losses * batch.weights.to(losses.dtype))
