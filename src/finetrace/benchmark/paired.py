"""Paired differences: every method against the study's own best, the best hidden states and the default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from finetrace.attribution import make
from finetrace.benchmark.tables import write_table
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.seeds import paired_crossed
from finetrace.tracing import BEST, SIMILAR

if TYPE_CHECKING:
    from finetrace.benchmark.row import Row

RIVALS = tuple(make(spec).label for spec in ("repsim", SIMILAR, BEST))
COMPARED = ("accuracy", "coverage", "auroc", "auprc")


def matrix(group: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """(seeds, queries) of one metric; NaN where a seed does not have a query."""
    return np.asarray(group.pivot(index="seed", columns="query", values=name), dtype=np.float64)


def joined(mine: pd.DataFrame, rival: pd.DataFrame) -> pd.DataFrame:
    """Query by query and seed by seed where both methods have them; the rival's metrics end in `_rival`."""
    return mine.merge(rival, on=["seed", "query"], suffixes=("", "_rival"))


def difference(both: pd.DataFrame, name: str) -> Estimate | None:
    """Of one metric of what is `joined`, with a 95% interval over seeds and queries; `None` where nothing can be compared."""
    if both.empty or (both[name] - both[f"{name}_rival"]).isna().all():
        return None
    return paired_crossed(matrix(both, name), matrix(both, f"{name}_rival"))


def paired(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Method minus rival, query by query and seed by seed where both have them, with a 95% interval over both."""
    records = []
    for (task, protocol), here in frame.groupby(["task", "protocol"], sort=False):
        by_spec = dict(list(here.groupby("spec", sort=False)))
        for rival in (spec for spec in RIVALS if spec in by_spec):
            for spec, mine in by_spec.items():
                if spec == rival:
                    continue
                both = joined(mine, by_spec[rival])
                for name in COMPARED:
                    if (found := difference(both, name)) is None:
                        continue
                    record = {"task": task, "protocol": protocol, "spec": spec, "against": rival, "metric": name}
                    records.append(record | {"difference": found.value, "low": found.low, "high": found.high})
    return records


def write_paired(folder: Path, rows: Sequence[Row], pairs: Sequence[dict[str, Any]]) -> None:
    """`paired-PROTOCOL`: differences of AUPRC and of coverage to each rival, task by task."""
    found = {(p["task"], p["protocol"], p["spec"], p["against"], p["metric"]): p for p in pairs}
    for protocol in dict.fromkeys(row.protocol for row in rows):
        here = [row for row in rows if row.protocol == protocol]
        rivals = [rival for rival in RIVALS if any(key[1] == protocol and key[3] == rival for key in found)]
        heads = ["task", "method"]
        heads += [f"{name} over {make(rival).title}" for rival in rivals for name in ("AUPRC", "coverage, points")]
        lines = []
        for row in here:
            cells = [
                _cell(found.get((row.task, protocol, row.spec, rival, metric)), scale)
                for rival in rivals
                for metric, scale in (("auprc", 1), ("coverage", 100))
            ]
            lines.append([row.task, row.title + (" (control)" if row.control else ""), *cells])
        if rivals:
            write_table(folder / f"paired-{protocol}", heads, lines)


def _cell(pair: dict[str, Any] | None, scale: int) -> str:
    if pair is None:
        return "-"
    form = "+.2f" if scale == 1 else "+.0f"
    text = f"{scale * pair['difference']:{form}}"
    known = np.isfinite(pair["low"]) and np.isfinite(pair["high"])
    return f"{text} [{scale * pair['low']:{form}}, {scale * pair['high']:{form}}]" if known else text
