"""Padding on the left to a window, as the study's released code has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetrace.errors import FinetraceError


def padded(
    ids: NDArray[np.int32], weights: NDArray[np.float64], padding: int, filler: int | None, *, in_loss: bool
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """`padding` fillers before the tokens; with `in_loss` every token but the first then counts, fillers among them.

    Args:
        ids: (T,) tokens.
        weights: (T,) of the loss.
        padding: How many.
        filler: The end-of-text token, `None` where the tokenizer has none.
        in_loss: Whether the loss is on all tokens.

    Raises:
        FinetraceError: There is no filler.
    """
    if filler is None:
        raise FinetraceError(
            "the tokenizer has no end-of-text token to pad with; give it one (eos_token in its tokenizer_config.json), or do "
            "without padding."
        )
    longer = np.concatenate([np.full(padding, filler, dtype=np.int32), ids])
    if in_loss:
        seen = np.ones(len(longer))
        seen[0] = 0
        return longer, seen
    return longer, np.concatenate([np.zeros(padding), weights])
