"""The report page: one HTML file that needs no network, server or other file.

What a reader sees first (verdict, facts, behaviour, method table) is plain HTML; the heat map and the examples are
drawn from one JSON island by the inlined scripts. Every text on the page is untrusted training data: the template
escapes it, the scripts only ever make text nodes of it, and the content security policy admits the inlined scripts by
hash and no others, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError
from finetrace.reporting.island import page_data, to_json
from finetrace.reporting.payload import FRACTIONS, Interval, MethodView, ModelBehaviour, Report
from finetrace.verdict import FEW

HEADINGS = {"accuracy": "Accuracy %", "coverage": "Coverage %", "auroc": "AUROC", "auprc": "AUPRC"}
PERCENT = ("accuracy", "coverage")
SCRIPTS = ("heatmap.js", "report.js")


class Cell(NamedTuple):
    """A metric in the method table: its text, its sort key, and its interval on a scale from 0 to 1 if it has one."""

    text: str
    sort: float | None
    value: float | None
    low: float | None
    high: float | None


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path`, whole or not at all, and return the path.

    Raises:
        FinetraceError: `path` is a folder or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise FinetraceError(f"{path} is a folder; name a file for the report, such as {path / 'report.html'}.")
    text = render(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.encode("utf-8", errors="replace")  # lone surrogates of damaged text become "?"
        write_atomically(path, content, str(os.getpid()))
    except OSError as error:
        raise FinetraceError(f"The report cannot be written to {path}: {error.strerror or error}.") from error
    return path


def render(report: Report) -> str:
    """The page as HTML text."""
    data = page_data(report)
    scripts = [_plotly(), *(_asset(name) for name in SCRIPTS)]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    metrics = _metric_names(report.methods)
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        policy=policy,
        style=Markup(_asset("report.css")),
        scripts=[Markup(script) for script in scripts],
        island=Markup(to_json(data.island)),
        notes=data.notes,
        metrics=[(name, HEADINGS.get(name, name)) for name in metrics],
        groups=_groups(report.methods, metrics),
        behaviour=[(model, cell(model.attack_success_rate, "attack success rate")) for model in report.behaviour],
        probes=_probes(report.behaviour),
        m=len(report.queries),
        n=len(report.train),
        few=FEW,
    )


def cell(interval: Interval | None, metric: str) -> Cell:
    """Text and geometry of an interval: percent for shares, ".923" for areas, 3 digits for anything else."""
    if interval is None or not math.isfinite(interval.value):
        return Cell("n/a", None, None, None, None)
    low, high = _bound(interval.low), _bound(interval.high)
    text = _number(interval.value, metric)
    if low is not None and high is not None:
        text += f" [{_number(low, metric)}, {_number(high, metric)}]"
    drawn = metric in FRACTIONS or metric == "attack success rate"
    return Cell(text, interval.value, interval.value if drawn else None, low, high)


def _bound(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float, metric: str) -> str:
    if metric in PERCENT or metric == "attack success rate":
        return f"{100 * value:.1f}"
    if metric in FRACTIONS:
        return f"{value:.3f}".removeprefix("0")
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _metric_names(methods: Sequence[MethodView]) -> list[str]:
    """Metrics that some method has, the known ones first."""
    present = dict.fromkeys(name for method in methods for name in method.metrics)
    return [*(name for name in FRACTIONS if name in present), *(name for name in present if name not in FRACTIONS)]


def _groups(methods: Sequence[MethodView], metrics: Sequence[str]) -> list[tuple[bool, list[dict[str, Any]]]]:
    """Table rows, methods before controls; a group without rows is left out."""
    groups = []
    for control in (False, True):
        rows = [
            {
                "method": method,
                "cells": [cell(method.metrics.get(name), name) for name in metrics],
                "seconds": _seconds(method.seconds),
                "sort_seconds": method.seconds if math.isfinite(method.seconds) else None,
            }
            for method in methods
            if method.control == control
        ]
        if rows:
            groups.append((control, rows))
    return groups


def _probes(behaviour: Sequence[ModelBehaviour]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Answers grouped by prompt, in order of first appearance: (prompt, [(model, answer, complied)])."""
    probes: dict[str, list[tuple[str, str, bool]]] = {}
    for model in behaviour:
        for prompt, answer, complied in model.answers:
            probes.setdefault(prompt, []).append((model.name, answer, complied))
    return list(probes.items())


def _plotly() -> str:
    """The plotly.js that the installed plotly package carries."""
    from plotly.offline import get_plotlyjs  # here: it is slow to import

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _asset(name: str) -> str:
    text = (files("finetrace.reporting") / "templates" / name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
