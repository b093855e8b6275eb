"""The same numbers from the same work on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """While open, backward passes on a GPU add in one order, so that a second run ends with the same bits.

    Attention's fused backward kernels add in whatever order their blocks finish, unless torch is asked not to. What torch has
    no such kernel for it does all the same, and warns. On a CPU nothing is changed: there it is so already.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(CUBLAS, ":4096:8")  # torch wants it said; a fixed workspace for each stream
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its only setting is known to torch alone, not to its types
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=not enabled or warns)
    settings.fill_uninitialized_memory = False  # what is not written is not read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        settings.fill_uninitialized_memory = fills
