"""From finished cells to one set of results: records, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from finetrace.atomic import write_atomically
from finetrace.attribution.lexical import LEXICAL
from finetrace.benchmark import finished
from finetrace.benchmark.example_figure import draw_examples
from finetrace.benchmark.figures import draw_ablation, draw_heat_maps, drawable
from finetrace.benchmark.pages import write_pages
from finetrace.benchmark.paired import difference, joined, matrix, paired, write_paired
from finetrace.benchmark.row import Row
from finetrace.benchmark.tables import write_tables
from finetrace.errors import FinetraceError
from finetrace.evaluation.seeds import bootstrap_crossed
from finetrace.reporting.results import write_results

METRICS = ("accuracy", "coverage", "auroc", "auprc", "recall@10", "mrr")


def report(folder: Path) -> list[Row]:
    """Summarise every finished cell of `folder`: `results.json`, `seeds.parquet`, `paired.parquet`, tables, figures and pages.

    Raises:
        FinetraceError: Nothing is finished or could be traced, seeds of a task were run with other settings, or a file cannot
            be read or written.
    """
    records, frames = [], []
    cells = finished.finished(folder)
    finished.refuse_mixed(folder, cells)
    for cell in cells:
        document = finished.document(folder / cell.folder)
        if document["records"]:
            records += document["records"]
            frames.append(finished.values(folder / cell.folder))
    if not frames:
        raise FinetraceError(f"{folder}: no cell has anything to report; the fine-tuned models complied with nothing.")
    frame = pd.concat(frames, ignore_index=True)
    rows = summarise(records, frame)
    config = {"command": "bench", "cells": {cell.folder: finished.settings(cell) for cell in cells}}
    write_results(folder, [row.record() for row in rows], config)
    write_atomically(folder / "seeds.parquet", pd.DataFrame.from_records(records).to_parquet(index=False))
    pairs = paired(frame)
    write_atomically(folder / "paired.parquet", pd.DataFrame.from_records(pairs).to_parquet(index=False))
    write_tables(folder / "tables", rows)
    write_paired(folder / "tables", rows, pairs)
    pictured = drawable(folder, cells)
    draw_heat_maps(folder, pictured, folder / "figures")
    draw_examples(folder, pictured, folder / "figures")
    write_pages(folder, pictured, folder / "reports")
    if any(row.spec.count("loss_on=") for row in rows) and len({row.spec for row in rows}) > 100:
        draw_ablation(rows, folder / "figures")
    return rows


def summarise(records: Sequence[dict[str, Any]], frame: pd.DataFrame) -> list[Row]:
    """One row a (task, protocol, method), in the order the records have."""
    table = pd.DataFrame.from_records(list(records))
    rows = []
    for (task, protocol), here in table.groupby(["task", "protocol"], sort=False):
        values = frame[(frame["task"] == task) & (frame["protocol"] == protocol)]
        by_spec = dict(list(values.groupby("spec", sort=False)))
        matrices = {
            spec: {name: matrix(group, name) for name in METRICS if name in group} for spec, group in by_spec.items()
        }
        lexical = _best_lexical(here, matrices)
        for spec, group in here.groupby("spec", sort=False):
            found = matrices[spec]
            judged = np.isfinite(found["auprc"]).any()
            first = group.iloc[0]
            rows.append(
                Row(
                    str(task),
                    str(protocol),
                    str(spec),
                    str(first["title"]),
                    bool(first["control"]),
                    {name: bootstrap_crossed(each) for name, each in found.items()} if judged else {},
                    difference(joined(by_spec[spec], by_spec[lexical]), "auprc")
                    if judged and lexical is not None and lexical != spec
                    else None,
                    float(group["seconds"].mean()),
                    str(group["hub"].mode().iloc[0]),
                    float(group["hub_share"].mean()),
                    len(group),
                    int(first["n_train"]),
                    _counted(group["n_queries"]),
                )
            )
    return rows


def _best_lexical(here: pd.DataFrame, matrices: dict[str, dict[str, NDArray[np.float64]]]) -> str | None:
    """The lexical search with the highest mean AUPRC."""
    known = [s for s in here["spec"].unique() if s.split(":")[0] in LEXICAL]
    known = [s for s in known if np.isfinite(matrices[s]["auprc"]).any()]
    return max(known, key=lambda spec: float(np.nanmean(matrices[spec]["auprc"]))) if known else None


def _counted(counts: pd.Series[int]) -> str:
    least, most = int(counts.min()), int(counts.max())
    return str(least) if least == most else f"{least} to {most}"
