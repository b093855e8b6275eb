"""The time and memory of an index, extrapolated from a few batches that are measured here and now."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetrace import placement
from finetrace.collection.factor_sizes import finishing_bytes
from finetrace.collection.factors import FactorSums
from finetrace.moments import at_moment
from finetrace.planning import measure
from finetrace.planning.cost import Shape, decomposition
from finetrace.planning.disk import shard_sizes
from finetrace.planning.measure import Fit, Timing
from finetrace.planning.plan import Measured, Memory, Plan

LITTLE = 0.1  # of the work, for which no batch is measured by itself

if TYPE_CHECKING:
    from finetrace.collection import Collector
    from finetrace.encoding import Encoded


def measure_plan(
    plan: Plan,
    collector: Collector,
    encoded: Sequence[Encoded],
    folder: Path,
    *,
    startup: float = 0.0,
    encoding: float = 0.0,
    workers: Sequence[int] = (1,),
    probes: int = measure.PROBES,
) -> Plan:
    """`plan` with time and memory from `probes` of its batches, measured here and now after one to warm up.

    Args:
        plan: From `plan_index`.
        collector: The index's.
        encoded: All examples, in order.
        folder: Where the index will go; a file is written there, or in the nearest folder that is there, and removed.
        startup: Seconds that loading took.
        encoding: Seconds that reading and encoding the data took.
        workers: Numbers of machines to reckon with.
        probes: Batches to measure.
    """
    labels, shape, model = plan.labels, plan.shape, collector.model
    chosen = measure.choose(plan.left.pieces, shape, probes)
    device = next(model.parameters()).device
    cards = [each for each in placement.devices(model) if each.type == "cuda"]
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    sums = collector.factor_sums(labels) if labels is not None else None
    now, loaded = measure.memory_now(), measure.peak_memory()
    with at_moment(model, plan.about.model.at):
        timings = [measure.run(collector, encoded, piece, shape, sums, labels) for piece in chosen][1:]
        slower = 1.0
        if chosen and plan.rounds.alone(plan.left.shards) > LITTLE and chosen[-1].beside:
            by_itself = measure.run(collector, encoded, chosen[-1], shape, sums, labels, alone=True)
            slower = max(1.0, by_itself.seconds / timings[-1].seconds)
    high = measure.peak_memory()
    activations = high - now if now and high > loaded else 0  # else the system does not say what the batches had
    on_device = max((int(torch.cuda.max_memory_allocated(card)) for card in cards), default=0)
    if device.type == "cpu" and not activations:
        half = plan.about.model.dtype in ("bfloat16", "float16")
        activations = plan.at_once * max((shape.activations(*piece.shape, half) for piece in chosen), default=0)
    disk, sides = plan.disk, [side for matrix in shape.tracked for side in matrix]
    if sums is not None:  # layers that see the same input have one eigenbasis of it
        shared = _shared(sums)
        disk = replace(disk, factors=disk.factors - collector.dtype.itemsize * sum(side**2 for side in shared))
        for side in shared:
            sides.remove(side)
    memory = _memory(plan, collector, now, high, activations, on_device)
    made = replace(
        plan,
        startup=startup,
        encoding=encoding,
        disk=disk,
        measured=extrapolate(plan, timings, folder, memory, sides, slower),
    )
    return replace(made, workers=tuple(made.with_workers(count) for count in workers))


def extrapolate(
    plan: Plan,
    timings: Sequence[Timing],
    folder: Path,
    memory: Memory | None,
    sides: Sequence[int] | None = None,
    slower: float = 1.0,
) -> Measured:
    """Seconds of all that is left, from some batches; how fast the disk and the decompositions are is tried here.

    `sides` are those of the matrices that are decomposed for Kronecker factors; without them, both sides of every block.
    A batch by itself takes `slower` times its share of the time of batches side by side.
    """
    labels, shape = plan.labels, plan.shape
    sides = sides if sides is not None else [side for matrix in shape.tracked for side in matrix]
    write = measure.write_rate(folder) or (0.0, 0.0)
    finishing = _finishing(shape, sides, plan.whole.rows) if labels is not None else (0.0, 0.0)
    operations = [each.operations for each in timings]
    clocks = [each.seconds for each in timings], [each.cpu_seconds for each in timings]
    fits = [Fit.to(operations, clock) if timings else Fit(0.0, 0.0) for clock in clocks]
    alone = (slower, 1.0)  # a batch by itself has all threads, and takes as much of the processor
    passes = [
        [
            sum(
                fit.seconds(shape.collection(*piece.shape, labels))
                * (plan.rounds.share(shard, place, more) if waits else 1.0)
                for place, piece in enumerate(shard)
            )
            for shard in plan.left.shards
        ]
        for fit, more, waits in zip(fits, alone, (True, False), strict=True)
    ]
    row = plan.row.row_bytes() + (plan.row.row_bytes("gradients") if labels == "model" else 0)
    stored = [row * sum(len(piece.rows) for piece in shard) + plan.summed for shard in plan.left.shards]
    return Measured(
        timings=tuple(timings),
        shards=tuple(seconds + size * write[0] for seconds, size in zip(passes[0], stored, strict=True)),
        collecting=sum(passes[0]),
        writing=sum(stored) * write[0],
        finishing=finishing[0],
        cpu=sum(passes[1]) + sum(stored) * write[1] + finishing[1],
        memory=memory,
    )


def _memory(plan: Plan, collector: Collector, now: int, high: int, activations: int, device: int) -> Memory:
    """Peak memory: while the batches of a shard run and the one before it is written, while the last one is, while factors are
    made.
    """
    row = collector.tracking.width * collector.dtype.itemsize
    row *= 2 if plan.labels == "model" else 1  # the drawn labels' gradients beside the data's
    row += plan.row.row_bytes("representation") + plan.row.row_bytes("losses")
    features = row * max(shard_sizes(plan.whole.rows, plan.about.rows_per_shard))
    made = finishing_bytes(plan.shape.tracked, collector.dtype.itemsize) if plan.labels is not None else 0
    shards = (
        1 if plan.labels is not None else min(2, len(plan.left.shards))
    )  # one is written while the next one is collected
    peak = max(high, now + activations + shards * features, now + 2 * features, now + made)
    weights = sum(each.numel() * each.element_size() for each in collector.model.parameters())
    return Memory(peak, weights, activations, features, device)


def _shared(sums: FactorSums) -> list[int]:
    """The sides whose sums are equal to another's, so that they have their eigenbasis from there."""
    seen: set[str] = set()
    spared = []
    for side in (sums.left, sums.right):
        for value in side.values():
            key = hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()
            spared += [len(value)] if key in seen else []
            seen.add(key)
    return spared


def _finishing(shape: Shape, sides: Sequence[int], examples: int) -> tuple[float, float]:
    """(wall-clock, processor) seconds of decomposing the factors and turning the gradients into their eigenbases."""
    wall, cpu = measure.decomposition_seconds(sides)
    turned = decomposition(shape.tracked, examples)[1]
    rate = measure.product_rate()
    return wall + turned * rate[0], cpu + turned * rate[1]
