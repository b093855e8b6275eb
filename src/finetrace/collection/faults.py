"""What can befall a batch: memory that does not suffice, and values that are not finite."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from finetrace.collection.features import Features

Result = TypeVar("Result")

# how torch's allocators on the CPU and libraries below them say it; on accelerators it is torch.OutOfMemoryError
_WORDS = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def unless_out_of_memory(work: Callable[[], Result], forget: Callable[[], None] = lambda: None) -> Result | None:
    """What `work` returns, or `None` where memory did not suffice; `forget` then lets go of what it had allocated."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    forget()
    gc.collect()  # outside the handler, whose traceback holds the pass's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halves(chosen: list[int]) -> tuple[list[int], list[int]]:
    """Two batches in place of one."""
    middle = (len(chosen) + 1) // 2
    return chosen[:middle], chosen[middle:]


def not_finite(found: Features) -> dict[int, str]:
    """What is not finite, by row; empty where everything is."""
    tensors = [("loss", found.losses), ("gradient", found.gradients)]
    tensors += [("gradient of drawn labels", found.sampled)] if found.sampled is not None else []
    tensors += [(f"hidden state {name}", each) for name, each in found.representations.items()]
    bad: dict[int, str] = {}
    for what, values in tensors:
        for row in _rows(values.reshape(len(values), -1)):
            bad.setdefault(row, f"its {what} is not finite")
    return bad


def _rows(values: Tensor) -> list[int]:
    """Rows of (B, d) that hold an infinity or a NaN; the sum, which finds them all, may itself overflow."""
    doubtful = torch.nonzero(~torch.isfinite(values.sum(1))).flatten().tolist()
    return [row for row in doubtful if not bool(torch.isfinite(values[row]).all())]
