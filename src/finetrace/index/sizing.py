"""How large an index becomes, and the projection that makes it fit."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from finetrace.batching import batches
from finetrace.collection.factor_sizes import LARGEST_SIDE, factor_bytes, finishing_bytes, held_bytes, too_wide
from finetrace.collection.factors import Labels
from finetrace.collection.modules import Tracking, track
from finetrace.collection.projection import Projection
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.host_memory import available_memory
from finetrace.index import sums

SHARD_BYTES = 128 << 20
AUTO = "auto"
STEP = 8  # sizes that are tried are multiples of it
DRAWING = 8  # bytes that an entry of a matrix takes in float64, beside its own, while the matrix is drawn
UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Budget:
    """Bytes that an index and its collection may take, and whether they were given or found."""

    disk: int
    memory: int | None
    disk_given: bool = False
    memory_given: bool = False

    @classmethod
    def of(cls, folder: Path, disk: int | None = None, memory: int | None = None) -> Budget:
        """What is given; else half of what is free on the disk, and half of the memory that is available."""
        found = available_memory()
        half = None if found is None else found // 2
        return cls(
            disk if disk is not None else free_disk(folder) // 2,
            memory if memory is not None else half,
            disk is not None,
            memory is not None,
        )


@dataclass(frozen=True)
class Plan:
    """What will be collected.

    Attributes:
        items: Encoded rows.
        batch_tokens: Padded tokens a batch holds at most.
        computed: Bytes of an entry while it is collected.
        stored: Bytes of an entry on disk.
        per_shard: Rows a shard where they are given.
        labels: Of the Kronecker factors, where they are made on the way; `model` gives a row a second gradient.
        beside: Bytes of a row's hidden states and loss.
        workers: How many collect side by side.
    """

    items: Sequence[Encoded]
    batch_tokens: int
    computed: int
    stored: int
    per_shard: int | None = None
    labels: Labels | None = None
    beside: int = 0
    workers: int = 1

    @property
    def gradients(self) -> int:
        """How many a row has: 1, or 2 with those of the labels that are drawn."""
        return 2 if self.labels == "model" else 1

    def rows_per_shard(self, tracking: Tracking) -> int:
        """As many as fit 128 MB, 16 at least."""
        return self.per_shard or max(16, SHARD_BYTES // max(1, tracking.width * self.stored + self.beside))

    def disk(self, tracking: Tracking) -> int:
        """Bytes on disk, at most: all rows, the Kronecker factors, and what these are made of."""
        rows = len(self.items) * (tracking.width * self.stored * self.gradients + self.beside)
        if self.labels is None:
            return rows
        shards = -(-len(self.items) // self.rows_per_shard(tracking))
        made_of = sums.disk(tracking.blocks, shards, self.computed, self.workers)
        return rows + made_of + factor_bytes(_matrices(tracking), self.computed)

    def memory(self, tracking: Tracking, *, device: bool) -> int:
        """Bytes that a collection holds beside the model: on its `device`, or in the memory of the machine.

        The device has a batch of rows, the largest block of that batch, the matrices and the sums of Kronecker factors; the
        machine a shard, as it is computed and as it is written, and a matrix of the projection while it is drawn.
        """
        rows = min(len(self.items), self.rows_per_shard(tracking))
        drawn = [k * d for each in tracking.sides.values() for d, k in (each.outputs, each.inputs) if k < d]
        if not device:
            narrow = self.stored if self.stored != self.computed else 0
            shard = rows * (tracking.width * (self.computed * self.gradients + narrow) + self.beside)
            return shard + DRAWING * max(drawn, default=0)
        largest = min(rows, max(len(batch) for batch in batches(self.items, self.batch_tokens)))
        # projected after it was formed, a block is whole in memory first
        whole = max(
            block.size if block.name not in tracking.flat else _size(block.original) for block in tracking.blocks
        )
        summed = held_bytes(_matrices(tracking), self.computed) if self.labels is not None else 0
        return self.computed * (largest * (tracking.width + whole) + sum(drawn)) + summed

    def finishing(self, tracking: Tracking) -> int:
        """Bytes that making the Kronecker factors holds in the memory of the machine, once all is collected."""
        return finishing_bytes(_matrices(tracking), self.computed) if self.labels is not None else 0


def fit(
    model: nn.Module, modules: Sequence[str] | None, seed: int, plan: Plan, budget: Budget
) -> tuple[Projection, str]:
    """No projection where that fits the budget, else the largest two-sided one that does, and a sentence that says why.

    Raises:
        FinetraceError: Not even the smallest fits.
    """
    whole = track(model, modules)
    why = _too_large(model, whole, plan, budget)
    factors = " with their Kronecker factors" if plan.labels is not None else ""
    size = f"{len(plan.items):,} rows of {whole.width:,} entries{factors}, {_gb(plan.disk(whole))}"
    if why is None:
        return Projection(seed=seed), f"projection: none; {size}, fit on the disk and in memory"
    low, high = 0, max(max(block.matrix) for block in whole.blocks) // STEP  # in steps; low fits, high + 1 does not
    while low < high:
        middle = (low + high + 1) // 2
        if _too_large(model, track(model, modules, _square(middle * STEP, seed)), plan, budget) is None:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        smallest = track(model, modules, _square(STEP, seed))
        raise FinetraceError(
            f"the index does not fit even with --projection {_square(STEP, seed).text}: "
            f"{_too_large(model, smallest, plan, budget)}; free some, give more (--disk, --memory), or track fewer layers "
            "(--modules)."
        )
    chosen = _square(low * STEP, seed)
    width = track(model, modules, chosen).width
    return chosen, (
        f"projection: {chosen.text}, the largest of its kind that fits, {width:,} entries a row; unprojected, {size}: {why}"
    )


def parse_bytes(flag: str, text: str | None) -> int | None:
    """A number of bytes from `20GB`, `500 MB` or `1.5TB` (powers of 1000), or `GiB` and so on (of 1024)."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise FinetraceError(f"{flag} {text}: not a size; write it as 20GB or 500MB.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]])


def _too_large(model: nn.Module, tracking: Tracking, plan: Plan, budget: Budget) -> str | None:
    """Which part of the budget is too small, or what cannot be done at all; `None` where all fits."""
    if plan.labels is not None and (wide := too_wide(tracking.blocks)) is not None:
        return f"Kronecker factors of {wide.name} would have a side of {max(wide.matrix):,}, and {LARGEST_SIDE:,} can be made"
    disk = plan.disk(tracking)
    if disk > budget.disk:
        whose = "--disk" if budget.disk_given else "half of what is free"
        return f"{_gb(disk)} on the disk, where {_gb(budget.disk)} are allowed ({whose})"
    device = next(model.parameters()).device
    here, there = plan.memory(tracking, device=False), plan.memory(tracking, device=True)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] // 2
        if there > free:
            return f"{_gb(there)} on the device, where {_gb(free)} are allowed (half of what is free)"
    else:
        here += there
    here = max(here, plan.finishing(tracking))
    if budget.memory is not None and here > budget.memory:
        whose = "--memory" if budget.memory_given else "half of what is available"
        return f"{_gb(here)} of memory, where {_gb(budget.memory)} are allowed ({whose})"
    return None


def _square(size: int, seed: int) -> Projection:
    return Projection("two-sided", size, size, seed)


def _matrices(tracking: Tracking) -> list[tuple[int, int]]:
    return [block.matrix for block in tracking.blocks]


def _size(shape: tuple[int, ...] | None) -> int:
    size = 1
    for each in shape or ():
        size *= each
    return size


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is or will be."""
    there = folder.absolute()
    while not os.path.exists(there):  # where nobody may look, there is nothing, either
        there = there.parent
    return shutil.disk_usage(there).free


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.3f} MB"
