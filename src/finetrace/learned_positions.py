"""Models that look positions up in a table, as GPT-2 and OPT do: a text longer than the table cannot pass at all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError

TABLES = ("wpe", "embed_positions")  # what models call it


def known_positions(model: nn.Module) -> int | None:
    """How many positions the model's table has; `None` where it has none, and any length can pass."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            return module.num_embeddings - int(getattr(module, "offset", 0))  # OPT's begins with rows for no position
    return None


def refuse_beyond(model: nn.Module, items: Sequence[Encoded], names: Sequence[str]) -> None:
    """Stop where a row is longer than the model's table of positions.

    Args:
        model: The model.
        items: The rows.
        names: What messages call them; by number where it is empty.

    Raises:
        FinetraceError: The first such row, its length, and that of the table.
    """
    positions = known_positions(model)
    for row, item in enumerate(items if positions is not None else ()):
        if len(item.ids) > (positions or 0):
            raise FinetraceError(
                f"{names[row] if names else f'row {row + 1}'}: it has {len(item.ids)} tokens, and this model has positions for "
                f"{positions}; cut it with --max-length {positions}, or shorten or remove the row."
            )
