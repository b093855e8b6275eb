"""Flat records of a study: picked, put in the order of a panel, and written as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.seeds import over_seeds

Records = Sequence[dict[str, Any]]


def where(records: Records, **values: Any) -> list[dict[str, Any]]:
    """Those with these values."""
    return [r for r in records if all(r.get(key) == value for key, value in values.items())]


def one(records: Records, **values: Any) -> dict[str, Any] | None:
    """The first of those with these values, if there is one."""
    return next(iter(where(records, **values)), None)


def tasks_of(records: Records) -> list[str]:
    """In the order they come."""
    return list(dict.fromkeys(r["task"] for r in records))


def settings(records: Records) -> list[tuple[str, str]]:
    """Every task and protocol, in the order they come."""
    return list(dict.fromkeys((r["task"], r["protocol"]) for r in records))


def percent(record: dict[str, Any], metric: str) -> str:
    """A metric between 0 and 1 with its interval: `43 30-57`; without one where none is known."""
    mean, low, high = (record[f"{metric}{end}"] for end in ("", "_low", "_high"))
    if mean is None:
        return "-"
    return f"{100 * mean:.0f}" + (f" {100 * low:.0f}-{100 * high:.0f}" if low is not None else "")


def cell(record: dict[str, Any] | None, name: str = "value", sign: str = "", places: int = 2) -> str:
    """`0.91 [0.85, 0.97]`, the value alone where it has no interval, `-` where there is none."""
    if record is None or record.get(name) is None:
        return "-"
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    form = f"{sign}.{places}f"
    ends = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{record[name]:{form}}{ends}"


def reach(records: Records, metric: str, scale: float = 1.0) -> list[list[float]]:
    """From each mean down and up to the ends of its interval, as error bars have them; 0 where none is known."""
    found = []
    for end, sign in (("low", -1), ("high", 1)):
        pairs = [(r[metric], r.get(f"{metric}_{end}")) for r in records]
        found.append([0.0 if None in pair else max(0.0, sign * scale * (pair[1] - pair[0])) for pair in pairs])
    return found


def of_seeds(values: Sequence[float | None], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate | None:
    """Mean and t interval of one value a seed; `None` where no seed has one."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return over_seeds(known, bounds=bounds) if known else None


def spread(estimate: Estimate | None, form: str = ".2f") -> str:
    """`0.91 [0.85, 0.97]`, the mean alone of one seed, `-` of none."""
    if estimate is None:
        return "-"
    if not np.isfinite(estimate.low):
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
