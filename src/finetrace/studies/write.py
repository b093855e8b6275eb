"""A study's folder: what it was run with, its records, tables and figures."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

from finetrace.benchmark.figures import save
from finetrace.benchmark.stages import claim
from finetrace.benchmark.tables import write_table
from finetrace.models import known_dtype
from finetrace.reporting.results import write_results
from finetrace.studies.study import Outcome, Say, Setting, Study


def run(study: Study, folder: Path, setting: Setting, say: Say) -> Outcome:
    """Run a study in `folder` and write `results.json`, `results.parquet`, tables (.md, .tex) and figures (.png, .svg).

    Raises:
        FinetraceError: The folder holds another run, or cannot be written.
    """
    setting = replace(setting, dtype=known_dtype(setting.dtype, setting.device))
    settings = {"study": study.name, **asdict(setting)}
    claim(
        folder / "study.json",
        {key: value for key, value in settings.items() if key not in ("seeds", "cells")},
        "a study",
    )
    began, resumed = time.perf_counter(), (folder / "parts").exists() or setting.home(folder).exists()
    outcome = study.run(folder, setting, say)
    spent = {"seconds": round(time.perf_counter() - began, 1), "resumed": resumed}
    write_results(folder, outcome.records, {**settings, **outcome.config, **spent, "reading": list(outcome.reading)})
    for name, (heads, lines) in outcome.tables.items():
        write_table(folder / name, heads, lines)
    for name, figure in outcome.figures.items():
        save(figure, folder / name)
    return outcome
