"""Plans in words."""

from __future__ import annotations

from collections.abc import Sequence

from finetrace.planning.plan import Plan
from finetrace.planning.schedule import Schedule
from finetrace.units import duration, many, size


def to_do(plan: Plan) -> str:
    """What there is to do, in a line."""
    left, whole = plan.left, plan.whole
    of = f" of {whole.rows:,}" if left.rows != whole.rows else ""
    rows = many(left.rows, "example") if not of else f"{left.rows:,}{of} examples left"
    return (
        f"{rows}, {left.tokens:,} tokens (padding {left.padding:.1%}) in {many(len(left.pieces), 'batch')}, "
        f"{many(len(left.shards), 'shard')}; the longest is {plan.longest[0]} with {plan.longest[1]:,} tokens"
    )


def disk(plan: Plan) -> str:
    """What it takes on disk, in a line."""
    parts = f"{size(plan.disk.shards)} gradients and representations"
    # which layers see the same input, and have one eigenbasis of it, is seen once a batch was measured
    most = "at most " if plan.labels is not None and plan.measured is None else ""
    if plan.disk.factors:
        until = f" and {size(plan.disk.parts)} more until they are done" if plan.disk.parts else ""
        parts += f", {most}{size(plan.disk.factors)} Kronecker factors{until}"
    return f"{most}{size(plan.disk.total)} on disk ({parts}), {size(plan.free)} free"


def tight(plan: Plan, names: Sequence[str], free: int | None) -> str:
    """That the largest batch may not fit in a CPU's memory, by the shapes alone; empty where it fits, or nothing is known.

    Args:
        plan: What there is to do.
        names: Ids of the examples, in the data's order.
        free: Bytes that are available once the model is loaded.
    """
    if plan.device != "cpu" or free is None or not plan.left.pieces:
        return ""
    half = plan.about.model.dtype in ("bfloat16", "float16")
    needed = [
        (plan.at_once if piece.beside else 1) * plan.shape.activations(*piece.shape, half) for piece in plan.left.pieces
    ]
    most = max(needed)
    if most <= free:
        return ""
    piece = plan.left.pieces[needed.index(most)]
    of = names[piece.rows[0]] if len(piece.rows) == 1 else f"the batch of {names[piece.rows[0]]}"
    beside = f", {plan.at_once} of its kind at a time," if plan.at_once > 1 and piece.beside else ""
    return (
        f"memory may not suffice: {of} ({piece.longest:,} tokens long){beside} takes about {size(most)} by its shapes, "
        f"{size(free)} are free; if the process is ended without a word, cut with --max-length, lower --batch-tokens, or "
        "leave the row out"
    )


def time(plan: Plan) -> str:
    """How long what is left takes, in a line; empty where no batch was measured."""
    measured = plan.measured
    if measured is None or not measured.timings:
        return ""
    rate = plan.left.tokens / measured.seconds if measured.seconds else 0.0
    words = f"about {duration(measured.seconds)} at {rate:,.0f} tokens/s"
    if measured.memory is not None:
        words += f"; peak memory about {size(measured.memory.peak)}"
        words += f", {size(measured.memory.device)} on the device" if measured.memory.device else ""
    return words


def shared(plan: Plan, by: Schedule) -> str:
    """How long what is left takes with several workers, in a line."""
    rate = plan.left.tokens / by.seconds if by.seconds else 0.0
    words = f"about {duration(by.seconds)} with {many(by.workers, 'worker')}, loading included, at {rate:,.0f} tokens/s"
    if by.workers > len(plan.left.shards):
        words += f", {by.workers - len(plan.left.shards):,} of them idle"
    if plan.measured is not None and plan.measured.memory is not None:
        words += f"; peak memory of each about {size(plan.measured.memory.peak)}"
        words += f", {size(plan.measured.memory.device)} on its device" if plan.measured.memory.device else ""
    return words
