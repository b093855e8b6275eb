"""A report page a task and protocol: the first seed's scores, query by query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from finetrace.attribution import Scores, make
from finetrace.attribution.lexical import LEXICAL
from finetrace.benchmark import finished
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.figures import shown
from finetrace.benchmark.protocol import PROTOCOLS, share_of
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import bootstrap_mean
from finetrace.reporting.compose import compose
from finetrace.reporting.page import write_report
from finetrace.tasks import TASKS
from finetrace.tracing import BEST, TABLE, Result
from finetrace.units import many

MOST = 1_000_000  # scores on a page, about 4 MB; of more methods the figures' choice, the default and the best of each kind


def write_pages(folder: Path, cells: Sequence[Cell], out: Path) -> list[Path]:
    """`TASK-PROTOCOL.html` for each cell, which has queries of its own."""
    return [_page(folder / cell.folder, cell, out / f"{cell.task}-{cell.protocol}.html") for cell in cells]


def _page(home: Path, cell: Cell, path: Path) -> Path:
    document = finished.document(home)
    records = {record["spec"]: record for record in document["records"]}
    train, queries = finished.rows(home)
    values, matrices = finished.values(home), finished.scores(home)
    specs = [spec for spec in records if spec in matrices]
    if len(specs) * len(train) * len(queries) > MOST:
        kept = {*shown(specs), make(BEST).label, "random", *_leading(specs, values)}
        specs = [spec for spec in specs if spec in kept]
    results = []
    for spec in specs:
        about = records[spec]
        settings = {
            key.removeprefix("parameter_"): value for key, value in about.items() if key.startswith("parameter_")
        }
        given = matrices[spec].astype(np.float64)
        scored = Scores(given, tuple(queries), tuple(train), spec, about["unit"], settings, about["seconds"])
        results.append(Result(make(spec), scored, _metrics(values[values["spec"] == spec])))
    facts: dict[str, str] = {
        "task": f"{cell.task}: {many(len(train), 'row')}, {many(len(queries), 'query')}",
        "protocol": cell.protocol,
    }
    facts |= {"model": str(document["base"]), "seed": str(cell.seed), "size": f"{cell.size:g}", "dtype": cell.dtype}
    if cell.modules:
        facts["gradients of"] = ", ".join(cell.modules)
    target = "unsafe" if cell.task in TASKS and TASKS[cell.task].aligned else None
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = len({row.label for row in train})
    covered = share_of(len(train), classes) if PROTOCOLS[cell.protocol].coverage == "share" else None
    title = f"{cell.task}, {cell.protocol} protocol"
    return write_report(path, compose(title, results, facts, target=target, covered=covered))


def _leading(specs: Sequence[str], values: pd.DataFrame) -> set[str]:
    """The best of every kind that the verdict speaks of, by AUPRC: it may not call another one the best."""
    means = values.groupby("spec")["auprc"].mean().fillna(-1.0)
    methods = {spec: make(spec) for spec in specs}
    kinds = [
        [spec for spec, each in methods.items() if each.name in LEXICAL],
        [spec for spec, each in methods.items() if each.query_free],
        [spec for spec, each in methods.items() if each.control],
        [spec for spec, each in methods.items() if not each.control],
        [spec for spec, each in methods.items() if not each.control and "gradients" in each.needs],
    ]
    return {max(kind, key=lambda spec: float(means[spec])) for kind in kinds if kind}


def _metrics(values: pd.DataFrame) -> dict[str, Any]:
    found = {}
    for name in TABLE:
        try:
            found[name] = bootstrap_mean(values[name].to_numpy())
        except FinetraceError:  # no query of this task can be judged
            return {}
    return found
