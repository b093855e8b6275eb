"""Encoded examples in batches of similar length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetrace.encoding import Encoded

BATCH_TOKENS = {"cpu": 2048, "cuda": 4096}  # padded tokens a batch: a GPU waits for work in small ones


def batch_budget(device: torch.device) -> int:
    """Padded tokens a batch holds at most on a device, where nothing else is asked for."""
    return BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def batches(items: Sequence[Encoded], budget: int) -> list[list[int]]:
    """Positions of `items` in batches by `length_batches`; rows padded on the left share one with their equals alone.

    Where a row has only masked positions to look at, some attention kernels look at all of them, the batch's own padding
    included.
    """
    lengths = [len(item.ids) for item in items]
    if not any(item.padding for item in items):
        return length_batches(lengths, budget)
    made = []
    for length in sorted(set(lengths)):
        alike = [i for i, each in enumerate(lengths) if each == length]
        made += [[alike[k] for k in batch] for batch in length_batches([length] * len(alike), budget)]
    return made


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions grouped into batches of similar length whose padded size stays within `budget` tokens.

    An item longer than the budget travels alone, and a batch that is half full takes nothing that would make more than
    a sixteenth of it padding. Of all that take as many batches, the tightest budget is kept to, which makes them alike, and
    the largest comes first, so that those who share them out are done at the same time. The result depends on the lengths
    alone (ties by position), so the same rows always share the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    made, low, high = _filled(order, lengths, budget), 0, budget
    most = len(made)
    while high - low > max(1, budget // 64):
        middle = (low + high) // 2
        tighter = _filled(order, lengths, middle)
        if len(tighter) <= most:
            made, high = tighter, middle
        else:
            low = middle
    return sorted(made, key=lambda batch: -len(batch) * lengths[batch[-1]])


def _filled(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Batches that are filled one after another."""
    batches: list[list[int]] = []
    current: list[int] = []
    tokens = 0
    for i in order:
        padded = (len(current) + 1) * lengths[i]
        wasteful = padded > budget / 2 and padded - tokens - lengths[i] > padded / 16
        if current and (padded > budget or wasteful):
            batches.append(current)
            current, tokens = [], 0
        current.append(i)
        tokens += lengths[i]
    if current:
        batches.append(current)
    return batches
