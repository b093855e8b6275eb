"""Kronecker factors that are too large to be made: said in a sentence before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from finetrace import placement
from finetrace.collection import Block
from finetrace.collection.factor_sizes import (
    LARGEST_SIDE,
    WITHOUT,
    factor_bytes,
    finishing_bytes,
    held_bytes,
    largest,
    too_wide,
)
from finetrace.collection.factors import Labels
from finetrace.errors import FinetraceError
from finetrace.host_memory import available_memory
from finetrace.index import factors, sums
from finetrace.index.manifest import Manifest
from finetrace.index.sizing import free_disk
from finetrace.units import size


def refuse_without_memory(
    folder: Path, model: nn.Module, blocks: Sequence[Block], labels: Labels, dtype: torch.dtype, *, here: bool = True
) -> None:
    """Stop where the sums or the factors do not fit in what memory is available, or no library can decompose them.

    Args:
        folder: The index.
        model: Where its layers are, their sums are too; factors are made of them in the memory of the machine.
        blocks: All that is tracked.
        labels: Of the factors; nothing is asked of those that the index has.
        dtype: What gradients are computed in.
        here: This process collects; else workers hold the sums, and it makes the factors of them.

    Raises:
        FinetraceError: The factors are too large; it names the block that takes most, the bytes, and what to do.
    """
    if factors.there(folder, labels):
        return
    matrices, entry = [block.matrix for block in blocks], dtype.itemsize
    summed, making = held_bytes(matrices, entry) if here else 0, finishing_bytes(matrices, entry)
    if (wide := too_wide(blocks)) is not None:
        raise FinetraceError(
            _sentence(folder, wide, making, f"of memory, and no side above {LARGEST_SIDE:,} can be decomposed")
        )
    cards = [each for each in placement.devices(model) if each.type == "cuda"]
    if cards and summed > (free := sum(map(_free_on, cards))):
        raise FinetraceError(_sentence(folder, largest(blocks), summed, f"on the device, which has {size(free)} free"))
    need, found = making if cards else max(summed, making), available_memory()
    if found is not None and need > found:
        raise FinetraceError(
            _sentence(folder, largest(blocks), need, f"of memory, of which {size(found)} are available")
        )


def refuse_without_disk(folder: Path, about: Manifest, labels: Labels, workers: int = 1) -> None:
    """Stop where the factors, and what they are made of, do not fit on the disk; what a run before left is there already.

    Args:
        folder: The index, which may not be there yet.
        about: Its manifest.
        labels: Of the factors; nothing is asked of those that the index has.
        workers: How many collect side by side.

    Raises:
        FinetraceError: As in `refuse_without_memory`.
    """
    if factors.there(folder, labels):
        return
    blocks, entry = [record.block() for record in about.blocks], about.computed_dtype.itemsize
    need = sums.disk(blocks, len(about.borders()), entry, workers) + factor_bytes([b.matrix for b in blocks], entry)
    if labels == "model":
        stored: torch.dtype = getattr(torch, about.feature_dtype)
        need += about.kept * sum(block.size for block in blocks) * stored.itemsize
    need -= sum(path.stat().st_size for path in sums.place(folder, labels).glob("*.safetensors"))
    free = free_disk(folder)
    if need > free:
        raise FinetraceError(_sentence(folder, largest(blocks), need, f"on the disk, which has {size(free)} free"))


def _free_on(card: torch.device) -> int:
    """Bytes free on a device, with those that torch keeps for what comes next."""
    free = torch.cuda.mem_get_info(card)[0]
    return int(free + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card))


def _sentence(folder: Path, block: Block, need: int, where: str) -> str:
    rows, columns = block.matrix
    return (
        f"{folder}: Kronecker factors, the largest of {block.name} ({rows:,} x {columns:,}), need {size(need)} {where}; "
        f"{WITHOUT}"
    )
