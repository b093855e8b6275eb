"""Tables in the terminal, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from finetrace.attribution import Top
from finetrace.evaluation.intervals import Estimate
from finetrace.reporting import cells
from finetrace.reporting.cells import flat
from finetrace.reporting.payload import ModelBehaviour
from finetrace.tracing import RankedResult, Result
from finetrace.units import many
from finetrace.verdict import FEW


def print_methods(results: Sequence[Result | RankedResult], console: Console) -> None:
    """A row a method: metrics with 95% intervals where labels allow, and seconds."""
    judged = any(result.metrics for result in results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", max_width=24)  # what the numbers leave of 80 columns
    if judged:
        for name in ("acc %", "cover %", "AUROC", "AUPRC"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sec", justify="right", no_wrap=True)
    groups = ([r for r in results if not r.method.control], [r for r in results if r.method.control])
    for group in groups:
        for i, result in enumerate(group):
            cells = [escape(result.method.title)]
            if judged:
                cells += [_percent(result.metrics.get("accuracy")), _percent(result.metrics.get("coverage"))]
                cells += [_unit(result.metrics.get("auroc")), _unit(result.metrics.get("auprc"))]
            table.add_row(*cells, f"{result.scores.seconds:.1f}", end_section=i == len(group) - 1)
    console.print(table)
    note = "positive score = proponent; below the line: controls"
    if judged:
        counted = max(estimate.n for result in results for estimate in result.metrics.values())
        few = ", too few to tell methods apart" if counted < FEW else ""
        note += f"; low-high: 95% interval over {many(counted, 'query')}{few}"
    console.print(note, style="dim", highlight=False, markup=False)


def print_top(top: Top, row: int, console: Console) -> None:
    """The ranked examples of one query: texts cut to the width of the terminal, ids and labels where texts had no room left."""
    examples = [top.scores.train[column] for column in top.order[row]]
    free = max(45, console.width - 27)  # what rank, score and the spaces leave
    labels = cells.names([example.label or "-" for example in examples], max(9, free // 4))
    ids = cells.names([example.id for example in examples], max(12, free - 20 - max(5, cells.width(labels))))
    room = max(20, free - cells.width(ids) - max(5, cells.width(labels)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("id", overflow="fold", min_width=min(cells.width(ids), free // 2))
    table.add_column("label", overflow="fold", min_width=max(5, min(cells.width(labels), free // 4)))
    table.add_column("prompt / response", no_wrap=True, max_width=room, overflow="ellipsis")
    for place, (example, score) in enumerate(zip(examples, top.values[row], strict=True)):
        texts = Group(
            Text(flat(example.prompt), no_wrap=True, overflow="ellipsis"),
            Text(flat(example.response), no_wrap=True, overflow="ellipsis", style="dim"),
        )
        table.add_row(str(place + 1), _score(float(score)), Text(ids[place]), Text(labels[place]), texts)
    console.print(table)
    ahead = top.kind == "proponent"
    wrong = sum(bool(score <= 0 if ahead else score >= 0) for score in top.values[row])
    if wrong:
        said = (
            "highest scores are not positive: no proponents"
            if ahead
            else "lowest scores are not negative: no opponents"
        )
        console.print(f"{wrong} of these {said}.", style="dim", highlight=False, markup=False)


def print_behaviour(models: Sequence[ModelBehaviour], judge: str, console: Console) -> None:
    """Attack success rate of each model, with its interval, and one answer to look at."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("model", no_wrap=True)
    table.add_column("attack success %", justify="right", no_wrap=True)
    table.add_column("first answer", no_wrap=True, overflow="ellipsis", max_width=max(20, console.width - 55))
    for model in models:
        rate = model.attack_success_rate
        cell = f"{100 * rate.value:.0f}"
        if rate.low is not None and rate.high is not None:
            cell += f" {_interval(100 * rate.low, 100 * rate.high, '.0f')}"
        answer = model.answers[0][1] if model.answers else ""
        table.add_row(escape(model.name), cell, Text(flat(answer), no_wrap=True, overflow="ellipsis"))
    console.print(table)
    if models and models[0].answers:
        prompt = flat(models[0].answers[0][0])
        console.print(f'judge: {judge}; first prompt: "{prompt}"', style="dim", markup=False, highlight=False)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.0f} {_interval(100 * estimate.low, 100 * estimate.high, '.0f')}"


def _unit(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{_short(estimate.value)} {_interval(estimate.low, estimate.high, '.2f')}"


def _interval(low: float, high: float, style: str) -> str:
    if low != low or high != high:
        return ""
    if style == ".2f":
        return f"{_short(low)}-{_short(high)}"
    return f"{low:.0f}-{high:.0f}"


def _short(value: float) -> str:
    """.93 for 0.93: two decimals, the zero left out."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def _score(value: float) -> str:
    return f"{value:+.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:+.2e}"
