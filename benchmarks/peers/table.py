"""The runs as a table in Markdown, and how far the tools' scores agree with finetrace's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

OURS = "finetrace"


@dataclass(frozen=True)
class Run:
    """One run of one tool, or why there is none.

    Attributes:
        tool: Its name.
        tuned: Which of its two configurations.
        work, dtype: What was done, and in what.
        folder: Where it wrote.
        failed: In words, where it did not come to an end.
    """

    tool: str
    tuned: bool
    work: str
    dtype: str
    folder: Path
    failed: str = ""

    @property
    def found(self) -> dict[str, Any]:
        """Its `result.json`."""
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.found["seconds"].values())

    @property
    def scores(self) -> NDArray[np.float64]:
        """(queries, rows)."""
        return np.load(self.folder / "scores.npy")


def table(runs: Sequence[Run], work: str, dtype: str, exact: NDArray[np.float64]) -> list[str]:
    """Lines of one work's table: medians over rounds, tools in the order in which they ran.

    Args:
        runs: Of all works.
        work, dtype: Which of them.
        exact: (queries, rows) finetrace's scores of that work in float32.
    """
    chosen = [run for run in runs if (run.work, run.dtype) == (work, dtype)]
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in chosen:
        groups.setdefault((run.tool, run.tuned), []).append(run)
    ours = groups[OURS, False]
    if any(run.failed for run in ours):
        return [f"finetrace did not finish: {next(run.failed for run in ours if run.failed)}"]
    base, base_cpu = statistics.median(run.total for run in ours), _cpu(ours)
    against = "" if dtype == "float32" else " | with float32"
    lines = [
        "| tool | collection s | scoring s | total s | CPU s | times finetrace, by CPU | peak MB | "
        f"Spearman with finetrace{against} |",
        "|---|---|---|---|---|---|---|---|" + ("---|" if against else ""),
    ]
    for (tool, tuned), members in groups.items():
        name = tool if tool == OURS else f"{tool}, {'tuned' if tuned else 'as documented'}"
        reason = next((run.failed for run in members if run.failed), "")
        if reason:
            lines.append(f"| {name} | {reason.replace('|', '/')} |" + " |" * (7 if against else 6))
            continue
        total = statistics.median(run.total for run in members)
        cells = [
            name,
            *(_stage(members, stage) for stage in ("collection", "scoring")),
            f"{total:.1f}",
            f"{_cpu(members):.1f}",
            f"{total / base:.2f}, {_cpu(members) / base_cpu:.2f}",
            f"{statistics.median(run.found['peak_mb'] for run in members):,.0f}",
            "" if tool == OURS else agreement(members[0].scores, ours[0].scores),
        ]
        if against:
            cells.append(agreement(members[0].scores, exact))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cpu(runs: Sequence[Run]) -> float:
    return statistics.median(run.found["cpu_seconds"] for run in runs)


def _stage(runs: Sequence[Run], name: str) -> str:
    """Median seconds of a stage; empty where the tool has none of that name."""
    times = [run.found["seconds"].get(name) for run in runs]
    return "" if None in times else f"{statistics.median(times):.1f}"


def agreement(scores: NDArray[np.float64], ours: NDArray[np.float64]) -> str:
    """Spearman's correlation over rows, of the queries the median and the least; a reversed sign is turned back and said."""
    if not np.isfinite(scores).all():
        return f"{int((~np.isfinite(scores)).sum())} scores are not finite"
    found = [float(spearmanr(a, b).statistic) for a, b in zip(scores, ours, strict=True)]
    sign, word = (-1, " (sign reversed)") if np.median(found) < 0 else (1, "")
    found = [sign * each for each in found]
    return f"{np.median(found):.4f}, least {min(found):.4f}{word}"


def configurations(runs: Sequence[Run]) -> list[str]:
    """A line for each configuration: what was chosen, and the versions."""
    lines: dict[str, None] = {}
    for run in runs:
        if not run.failed:
            versions = ", ".join(f"{name} {number}" for name, number in run.found["versions"].items())
            lines[f"- {run.tool}{', tuned' if run.tuned else ''}: {'; '.join(run.found['how'])} ({versions})"] = None
    return list(lines)
