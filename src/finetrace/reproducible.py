"""The same numbers from the same work on a GPU, as far as torch has kernels for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """While open, torch takes kernels on a GPU that add in one order, wherever it has them.

    It has none for the backward pass of fused attention short of refusing all operations that lack one, so in half precision
    two runs on a GPU may still differ by rounding. Who has asked torch for such a refusal keeps it. On a CPU nothing changes:
    there two runs agree in every bit.
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*non-deterministic algorithm")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        settings.fill_uninitialized_memory = fills
