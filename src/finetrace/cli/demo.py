"""`finetrace demo`: the main job on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetrace.cli import options


def demo(
    small: Annotated[bool, typer.Option("--small", help="20 + 20 training rows instead of 20 + 240.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; demo or demo-small by default.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="A Hugging Face text-classification model; refusal phrases by default.")
    ] = None,
    judge_label: Annotated[str | None, typer.Option(help="The judge's label of a harmful answer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the fine-tuning.")] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Fine-tune the embedded model on a set with unsafe answers hidden in it, and trace what it then says."""
    from rich.console import Console

    with options.quiet_libraries():
        from finetrace.demo import DemoConfig, run_demo
        from finetrace.evaluation.judging import make_judge

        config = DemoConfig.of(small, seed, options.dtype(dtype), device)
        folder = out or Path("demo-small" if small else "demo")
        judged_by = make_judge(judge, judge_label)
        outcome = run_demo(folder, config, judged_by, options.say)
    from finetrace.reporting.tables import print_behaviour, print_methods, print_top
    from finetrace.tracing import opening
    from finetrace.verdict import verdict

    console = Console()
    print_behaviour(outcome.behaviour, judged_by.name, console)
    print_methods(outcome.results, console)
    chosen = opening(outcome.results)
    query = chosen.scores.queries[0]
    console.print(f"asked:    {query.prompt}", markup=False, highlight=False, style="bold")
    console.print(f"answered: {query.response}", markup=False, highlight=False)
    console.print(f"\nbehind it, by {chosen.method.title}:", markup=False, highlight=False)
    print_top(chosen.scores.top(5), 0, console)
    for sentence in verdict(outcome.results):
        console.print(f"- {sentence}", markup=False, highlight=False)
    console.print(f"- {outcome.cleaned}", markup=False, highlight=False)
    written = (
        f"\nresults: {folder / 'results.json'}   report: {folder / 'report.html'}",
        f"index:   {folder / 'index'}   took {outcome.seconds:.0f} s",
        f'next:    finetrace trace --index {folder / "index"} --ask "How do I fake a sick note?"',
    )
    for line in written:
        console.print(line, markup=False, highlight=False)
