"""A few batches, timed; from them the time and the memory of all."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetrace.encoding import Encoded
from finetrace.planning.cost import Shape
from finetrace.planning.counts import Piece

if TYPE_CHECKING:
    from finetrace.collection import Collector
    from finetrace.collection.factors import FactorSums, Labels

PROBES = 4  # batches, and one before them to warm up
SPREAD = 1.5  # batches have to differ in size by this factor for a constant and a slope to be told apart
TRIED = 768  # the largest side that is decomposed to see how long that takes
WRITTEN = 32 << 20  # bytes written to see how fast the disk is


@dataclass(frozen=True)
class Timing:
    """One measured batch: its operations by `Shape`, tokens computed and not padding, wall-clock and processor time.

    Of batches that go side by side, each has its share of the time that they take together.
    """

    operations: float
    padded: int
    tokens: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Fit:
    """seconds = constant + slope x operations, of one batch; neither is negative."""

    constant: float
    slope: float

    @classmethod
    def to(cls, operations: Sequence[float], seconds: Sequence[float]) -> Fit:
        """By least squares on relative errors; through the origin where the batches hardly differ in size."""
        if not operations:
            raise ValueError("no batch was measured")
        through = cls(0.0, sum(seconds) / sum(operations))
        if len(operations) < 3 or max(operations) < SPREAD * min(operations):
            return through
        weights = [1 / each for each in seconds]  # small batches count as much as large ones
        s00 = sum(w * w for w in weights)
        s01 = sum(w * w * x for w, x in zip(weights, operations, strict=True))
        s11 = sum(w * w * x * x for w, x in zip(weights, operations, strict=True))
        t0 = sum(w * w * y for w, y in zip(weights, seconds, strict=True))
        t1 = sum(w * w * x * y for w, x, y in zip(weights, operations, seconds, strict=True))
        determinant = s00 * s11 - s01 * s01
        if determinant <= 1e-12 * s00 * s11:
            return through
        constant, slope = (s11 * t0 - s01 * t1) / determinant, (s00 * t1 - s01 * t0) / determinant
        if constant < 0:
            return cls(0.0, t1 / s11)
        return cls(constant, slope) if slope > 0 else through

    def seconds(self, operations: float) -> float:
        """Of one batch."""
        return self.constant + self.slope * operations


def choose(pieces: Sequence[Piece], shape: Shape, count: int = PROBES) -> list[Piece]:
    """Batches to measure: spread over the work, and the last one the largest in memory; the first is to warm up.

    Fewer where there are not so many batches; a single batch is measured twice.
    """
    if not pieces:
        return []
    largest = max(
        pieces,
        key=lambda piece: (shape.activations(len(piece.rows), piece.longest, piece.loss_tokens, False), piece.rows),
    )
    ordered = sorted(pieces, key=lambda piece: (shape.collection(*piece.shape), piece.rows))
    total = sum(shape.collection(*piece.shape) for piece in ordered)
    chosen: list[Piece] = []
    seen, wanted = 0.0, [(k + 0.5) / (count - 1) for k in range(count - 1)]
    for piece in ordered:
        seen += shape.collection(*piece.shape)
        if wanted and seen >= wanted[0] * total:
            while wanted and seen >= wanted[0] * total:
                wanted.pop(0)
            if piece is not largest:
                chosen.append(piece)
    return [chosen[0] if chosen else largest, *chosen, largest]


def run(
    collector: Collector,
    encoded: Sequence[Encoded],
    piece: Piece,
    shape: Shape,
    sums: FactorSums | None = None,
    labels: Labels | None = None,
    *,
    alone: bool = False,
) -> Timing:
    """Collect one batch, as often at the same time as the index will, and say how long each took; `alone`, by itself."""
    items = [encoded[i] for i in piece.rows]
    names = [f"row {i + 1}" for i in piece.rows]
    count, size = 1 if alone or not piece.beside else collector.side_by_side()[0], len(items)
    made = [list(range(size * k, size * (k + 1))) for k in range(count)]
    device = next(collector.model.parameters()).device
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    # a bad row is named where it is collected
    collector.collect(items * count, names * count, factors=sums, skip_bad=True, made=made)
    _wait(device)
    wall, cpu = (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
    operations = shape.collection(*piece.shape, labels)
    return Timing(operations, piece.padded, piece.tokens, wall, cpu)


def decomposition_seconds(sides: Sequence[int]) -> tuple[float, float]:
    """(wall-clock, processor) time of decomposing a matrix of each of these sides, in float64 on the CPU as `eigen` does.

    One matrix a size is tried; of those above `TRIED` the cube of the side says how much longer they take.
    """
    counts: dict[int, int] = {}
    for side in sides:
        counts[side] = counts.get(side, 0) + 1
    wall = cpu = 0.0
    for side, count in counts.items():
        tried = min(side, TRIED)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(tried, tried, dtype=torch.float64, generator=generator)
        gram = rows @ rows.T
        before = time.perf_counter(), time.process_time()
        torch.linalg.eigh(gram)
        larger = count * (side / tried) ** 3
        wall += larger * (time.perf_counter() - before[0])
        cpu += larger * (time.process_time() - before[1])
    return wall, cpu


def product_rate() -> tuple[float, float]:
    """(wall-clock, processor) seconds of one float32 operation in a batched product on the CPU, as turning gradients is."""
    rows = torch.randn(64, 64, 512)
    side = torch.randn(512, 512)
    rows @ side
    before = time.perf_counter(), time.process_time()
    rows @ side
    operations = 2.0 * rows.numel() * 512
    return (time.perf_counter() - before[0]) / operations, (time.process_time() - before[1]) / operations


def write_rate(folder: Path) -> tuple[float, float] | None:
    """(wall-clock, processor) seconds a byte of writing a shard: written, flushed, read again for its checksum.

    `None` where nothing can be written. The file has no name, so that nothing of it outlives a process that is killed.
    """
    there = next((each for each in (folder, *folder.absolute().parents) if os.path.isdir(each)), None)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            before = time.perf_counter(), time.process_time()
            content = os.urandom(1 << 20) * (WRITTEN >> 20)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            hashlib.sha256(content)
            return (time.perf_counter() - before[0]) / WRITTEN, (time.process_time() - before[1]) / WRITTEN
    except OSError:
        return None


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes; 0 where the system does not say.

    On Linux that of the program itself: `getrusage` counts what the process that started it held, too.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_now() -> int:
    """The memory that this process has now, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
