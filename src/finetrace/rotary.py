"""Rotary frequencies that depend on the longest text of a pass, so that a row's loss would hang on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.learned_positions import refuse_beyond


def batch_tokens_within(model: nn.Module, items: Sequence[Encoded], budget: int, names: Sequence[str] = ()) -> int:
    """Padded tokens a batch may hold so that every row has the frequencies that it has by itself.

    `longrope` takes other frequencies for a whole batch as soon as its longest row exceeds the original context. With no more
    tokens a batch than that context has, such a row travels alone. `dynamic` keeps the frequencies of the longest text that it
    has seen so far, so that no order of batches is right.

    Args:
        model: The model.
        items: The rows.
        budget: Padded tokens a batch holds at most otherwise.
        names: The rows' ids, for messages.

    Raises:
        FinetraceError: A row is longer than the original context of a model with dynamic frequencies, or than the table of
            one that looks positions up.
    """
    refuse_beyond(model, items, [f"example {name}" for name in names])
    longest = max((len(item.ids) for item in items), default=0)
    for kind, original in _changing(model):
        if longest <= original:
            continue
        if kind == "longrope":
            budget = min(budget, original)
            continue
        row = next(i for i, item in enumerate(items) if len(item.ids) == longest)
        name = f"example {names[row]}" if names else f"row {row + 1}"
        raise FinetraceError(
            f"{name}: it has {longest} tokens, and beyond {original} this model's rotary frequencies ({kind}) are those of the "
            f"longest text before, so that its numbers would hang on other rows; cut them with --max-length {original}."
        )
    return budget


def _changing(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Kinds of frequencies that change with a text's length, and the tokens up to which they do not."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, Mapping) else {None: kinds}
        for layer, kind in by_layer.items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                given = getattr(module.config, "rope_parameters", None) or {}
                given = given if layer is None else given.get(layer, {})
                original: Any = given.get("original_max_position_embeddings") or module.original_max_seq_len
                yield kind, int(original)
