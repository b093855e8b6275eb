"""Seconds, bytes and counts in words."""

from __future__ import annotations


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


def many(count: int, thing: str) -> str:
    """1 batch, 1,208 tokens: a count with its noun, in the plural unless there is one."""
    plural = f"{thing[:-1]}ies" if thing.endswith("ry") else f"{thing}es" if thing.endswith("tch") else f"{thing}s"
    return f"{count:,} {thing if count == 1 else plural}"


def size(count: float) -> str:
    """1.2 GB, in powers of a thousand."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"
