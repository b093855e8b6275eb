"""Markdown, LaTeX and terminal tables of the benchmark, laid out like the study's."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finetrace.atomic import write_atomically
from finetrace.attribution import make
from finetrace.benchmark.protocol import INPUTS
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate

if TYPE_CHECKING:
    from finetrace.benchmark.row import Row

HEADS = {
    "accuracy": "Acc %",
    "coverage": "Cover %",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "recall@10": "R@10",
    "mrr": "MRR",
}
PERCENT = ("accuracy", "coverage")
MOST, SHOWN = 64, 40  # more methods than the first do not fit a screen, which then has the best and the controls

# the study's tables of attribution; its first, of attack success rates, is a run of its own
STUDY = {
    "table2": ("mixed-small", "mixed-large"),
    "table3": ("grammars", "grammars-apply", "mathqa", "harmfulcheck"),
    "table4": ("backdoor-1", "backdoor-3", "backdoor-5"),
}


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """`summary-PROTOCOL` over tasks, `table2-PROTOCOL` to `table4-PROTOCOL` as the study has them, `inputs-PROTOCOL` by what
    methods see, `TASK-PROTOCOL` with every metric; .md and .tex.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{folder}: cannot be written ({error}).") from error
    for protocol in dict.fromkeys(row.protocol for row in rows):
        here = [row for row in rows if row.protocol == protocol]
        tasks = list(dict.fromkeys(row.task for row in here))
        write_table(folder / f"summary-{protocol}", ["method", *tasks], _summary(here, tasks))
        for name, wanted in STUDY.items():
            if there := [task for task in wanted if task in tasks]:
                heads = [f"{task} {HEADS[metric]}" for task in there for metric in PERCENT]
                of_these = [row for row in here if row.task in there]
                write_table(folder / f"{name}-{protocol}", ["method", *heads], _apart(of_these, there))
        alike = [[seen, *line] for seen, specs in INPUTS.items() for line in _summary(_of(here, specs), tasks)]
        if alike:
            write_table(folder / f"inputs-{protocol}", ["input", "method", *tasks], alike)
        for task in tasks:
            mine = [row for row in here if row.task == task]
            heads = ["method", *HEADS.values(), "AUPRC over lexical", "hub %", "hub", "sec"]
            write_table(folder / f"{task}-{protocol}", heads, [_cells(row) for row in mine])


def print_summary(rows: Sequence[Row], console: Console) -> None:
    """Each task's methods in 80 columns: accuracy, coverage, AUROC, AUPRC, and the gap to lexical search."""
    for task, protocol in dict.fromkeys((row.task, row.protocol) for row in rows):
        mine = [row for row in rows if (row.task, row.protocol) == (task, protocol)]
        count = len(mine)
        if count > MOST:
            ranked = sorted((r for r in mine if r.metrics and not r.control), key=lambda r: -r.metrics["auprc"].value)
            mine = [*ranked[:SHOWN], *(row for row in mine if row.control)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
        seeds = f"{mine[0].seeds} seed{'s' * (mine[0].seeds != 1)}"
        queries = f"{mine[0].n_queries} {'query' if mine[0].n_queries == '1' else 'queries'}"
        table.title = escape(f"{task}, {protocol}: {mine[0].n_train} rows, {queries}, {seeds}")
        if len(mine) < count:
            table.title += f"; the {SHOWN} best by AUPRC of {count} methods, and the controls"
        table.add_column("method", overflow="fold")
        for head in ("acc %", "cover %", "AUROC", "AUPRC", "over lexical"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in mine:
            values = [_value(row, name) for name in ("accuracy", "coverage", "auroc")]
            gap = f"{row.beats_lexical.value:+.2f}" if row.beats_lexical else "-"
            cells = [*values, _cell(row, "auprc"), gap]
            table.add_row(
                escape(row.title) + (" (control)" if row.control else ""), *cells, style="dim" if row.control else ""
            )
        console.print(table)
    over = "queries and seeds" if any(row.seeds > 1 for row in rows) else "queries of one seed"
    console.print(
        f"low-high: 95% over {over}; the tables in files have every interval",
        style="dim",
        highlight=False,
    )


def _summary(rows: Sequence[Row], tasks: Sequence[str]) -> list[list[str]]:
    """Accuracy / coverage of every method on every task, in one cell."""
    return [[name, *(" / ".join(each) if each else "-" for each in found)] for name, found in _means(rows, tasks)]


def _apart(rows: Sequence[Row], tasks: Sequence[str]) -> list[list[str]]:
    """Accuracy and coverage of every method on every task, in a cell each, as in the study's Tables 2 to 4."""
    return [[name, *(cell for each in found for cell in each or ("-", "-"))] for name, found in _means(rows, tasks)]


def _means(rows: Sequence[Row], tasks: Sequence[str]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every method with its accuracy and coverage in % on each task; empty where it has none."""
    found = {(row.spec, row.task): row.metrics for row in rows}
    named = dict.fromkeys((row.spec, row.title + (" (control)" if row.control else "")) for row in rows)
    return [
        (
            name,
            [
                tuple(f"{100 * metrics[each].value:.1f}" for each in PERCENT)
                if (metrics := found.get((spec, task)))
                else ()
                for task in tasks
            ],
        )
        for spec, name in named
    ]


def _of(rows: Sequence[Row], specs: Sequence[str]) -> list[Row]:
    """The rows of some methods, in their order."""
    order = {make(spec).label: place for place, spec in enumerate(specs)}
    return sorted((row for row in rows if row.spec in order), key=lambda row: order[row.spec])


def _cells(row: Row) -> list[str]:
    name = row.title + (" (control)" if row.control else "")
    return [
        name,
        *(_cell(row, metric) for metric in HEADS),
        _gap(row.beats_lexical),
        f"{100 * row.hub_share:.0f}",
        row.hub if row.hub_share < 1 or row.n_queries != "1" else "-",
        f"{row.seconds:.2f}",
    ]


def _cell(row: Row, metric: str) -> str:
    estimate = row.metrics.get(metric)
    if estimate is None:
        return "-"
    if metric in PERCENT:
        return _with_interval(estimate, lambda value: f"{100 * value:.0f}")
    return _with_interval(estimate, _short)


def _value(row: Row, metric: str) -> str:
    """The mean alone."""
    if metric not in row.metrics:
        return "-"
    value = row.metrics[metric].value
    return f"{100 * value:.0f}" if metric in PERCENT else _short(value)


def _with_interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    text = form(estimate.value)
    known = estimate.low == estimate.low and estimate.high == estimate.high
    return f"{text} {form(estimate.low)}-{form(estimate.high)}" if known else text


def _gap(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    text = f"{estimate.value:+.2f}"
    return f"{text} [{estimate.low:+.2f}, {estimate.high:+.2f}]" if estimate.low == estimate.low else text


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def write_table(path: Path, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """`path` with .md and with .tex added."""
    markdown = ["| " + " | ".join(map(_plain, heads)) + " |", "|" + "---|" * len(heads)]
    markdown += ["| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines]
    write_atomically(path.with_name(path.name + ".md"), ("\n".join(markdown) + "\n").encode())
    columns = "l" + "r" * (len(heads) - 1)
    made = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(latex, heads)) + r" \\",
        r"\midrule",
    ]
    for line in lines:  # a [ or * after the end of a row would be an argument of it
        made.append(("{}" if line[0][:1] in ("[", "*") else "") + " & ".join(map(latex, line)) + r" \\")
    made += [r"\bottomrule", r"\end{tabular}"]
    write_atomically(path.with_name(path.name + ".tex"), ("\n".join(made) + "\n").encode())


def _plain(cell: str) -> str:
    """A cell of Markdown that shows the text as it is: no line of its own, column, link, image, HTML or emphasis."""
    text = " ".join(cell.split()).replace("\\", r"\\").replace("](", r"]\(")
    text = _EMPHASIS.sub(r"\\\g<0>", text)
    return text.replace("|", r"\|").replace("`", r"\`").replace("<", "&lt;")


# signs beside a word that may open or close emphasis; an underscore within a word does not
_EMPHASIS = re.compile(r"[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])")


def latex(text: str) -> str:
    """Text as LaTeX shows it: its ten special signs escaped, and <, > and | kept from turning into others."""
    return " ".join(text.split()).translate(_ESCAPES)


_ESCAPES = str.maketrans(
    {sign: "\\" + sign for sign in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)
