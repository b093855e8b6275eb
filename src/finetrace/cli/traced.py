"""What `finetrace trace` writes and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from finetrace.json_values import json_value

if TYPE_CHECKING:
    from finetrace.index.store import Index
    from finetrace.tracing import RankedResult, Result


def show(results: Sequence[Result | RankedResult], format: str, top: int, opponents: bool) -> None:
    """Print the ranked rows: tables, JSON or CSV; Parquet is not printed."""
    import json

    from rich.console import Console

    from finetrace.reporting.cells import printable
    from finetrace.reporting.tables import print_methods, print_top

    if format == "json":
        config, asked = [r.scores.describe() for r in results], _asked(results)
        document = {"config": config, "queries": asked, "records": _records(results, top, opponents)}
        typer.echo(json.dumps(document, indent=1))
        return
    if format == "csv":
        import pandas as pd

        from finetrace.attribution.scores import as_csv

        typer.echo(as_csv(pd.DataFrame.from_records(_records(results, top, opponents))), nl=False)
        return
    if format == "parquet":
        return
    console = Console()
    for row, query in enumerate(results[0].scores.queries):
        console.print(f"\nasked:    {printable(query.prompt)}", markup=False, highlight=False, style="bold")
        console.print(f"answered: {printable(query.response)}", markup=False, highlight=False)
        for result in results:
            console.print(f"\n{result.method.title}: proponents ({result.scores.unit})", markup=False, highlight=False)
            print_top(result.scores.top(top), row, console)
            if opponents:
                console.print(f"{result.method.title}: opponents", markup=False, highlight=False)
                print_top(result.scores.bottom(top), row, console)
    if len(results) > 1:
        print_methods(results, console)


def _records(results: Sequence[Result | RankedResult], top: int, opponents: bool) -> list[dict[str, Any]]:
    records = []
    for result in results:
        records += result.scores.top(top).records()
        if opponents:
            records += result.scores.bottom(top).records()
    return records


def _asked(results: Sequence[Result | RankedResult]) -> list[dict[str, Any]]:
    """The queries with their answers, the model's own ones too, as `read_examples` reads them again."""
    from finetrace.reading import rows_of

    return [json_value(row) for row in rows_of(results[0].scores.queries, "the queries")]


def write_ranked(results: Sequence[Result | RankedResult], out: Path, top: int, opponents: bool) -> None:
    """The ranked rows as a file."""
    import pandas as pd

    from finetrace.attribution.scores import write_frame

    frame = pd.DataFrame.from_records(_records(results, top, opponents))
    write_frame(frame, out, [result.scores.describe() for result in results], queries=_asked(results))
    typer.echo(f"ranked rows: {out}", err=True)


def write_page(index: Index, results: list[Result], path: Path) -> None:
    """The report page."""
    from finetrace.reporting.compose import compose
    from finetrace.reporting.facts import index_facts
    from finetrace.reporting.page import write_report
    from finetrace.reporting.validated import kept_verdict

    verdict = kept_verdict(index.folder)
    write_report(path, compose(f"Trace of {index.folder.name}", results, index_facts(index), validated=verdict))
    typer.echo(f"report: {path}", err=True)
