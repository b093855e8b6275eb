"""Times, sizes and plans in words."""

from __future__ import annotations

from finetrace.planning.plan import Plan


def duration(seconds: float) -> str:
    """45 s, 12 min 10 s, 3 h 20 min, 4.2 days, 6.1 years."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"
    if seconds < 2 * 365.25 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return f"{seconds / (365.25 * 86400):,.1f} years"


def size(count: float) -> str:
    """1.2 GB, in powers of a thousand."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def to_do(plan: Plan) -> str:
    """What there is to do, in a line."""
    left, whole = plan.left, plan.whole
    rows = f"{left.rows:,} examples" if left.rows == whole.rows else f"{left.rows:,} of {whole.rows:,} examples left"
    return (
        f"{rows}, {left.tokens:,} tokens (padding {left.padding:.1%}) in {len(left.pieces):,} batches, "
        f"{len(left.shards):,} shards; the longest is {plan.longest[0]} with {plan.longest[1]:,} tokens"
    )


def disk(plan: Plan) -> str:
    """What it takes on disk, in a line."""
    parts = f"{size(plan.disk.shards)} gradients and representations"
    if plan.disk.factors:
        parts += f", {size(plan.disk.factors)} Kronecker factors and {size(plan.disk.parts)} more until they are done"
    return f"{size(plan.disk.total)} on disk ({parts}), {size(plan.free)} free"


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
