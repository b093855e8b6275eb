"""`finetrace study`: the paper's analyses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetrace.cli import options
from finetrace.errors import FinetraceError


def study(
    name: Annotated[str | None, typer.Argument(help="A study by name; --list shows them.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the studies and stop.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; a run that stopped goes on there. study-NAME by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small version, within three minutes on two cores.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Repetitions: other digits, or another fine-tuning of the same rows; 3, or 1 with --quick."
        ),
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(help="Folder of fine-tuned and indexed tasks that several studies share.")
    ] = None,
    workers: options.Workers = None,
    engine: options.EngineOption = None,
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
    model: Annotated[str | None, typer.Option(help="Another base model than the embedded one.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Run one of the paper's analyses: results.json, tables and figures, written after every seed; a stopped run goes on."""
    if list_ or name is None:
        if not list_:
            raise FinetraceError("which study? Give a name; finetrace study --list shows them.")
        from finetrace.studies.registry import STUDIES

        options.listing([(each.name, each.exhibit, each.what) for each in STUDIES.values()])
        return
    with options.quiet_libraries():
        from finetrace.studies.registry import study as find
        from finetrace.studies.study import Setting
        from finetrace.studies.write import run

        chosen = find(name)
        if chosen.digits:
            asked = {"--dtype": None if dtype == "auto" else dtype, "--device": None if device == "auto" else device}
            options.refuse_given(
                {"--model": model, **asked}, f"{name} is of digits; choose a study of a language model"
            )
        if not chosen.cells:
            options.refuse_given({"--cells": cells}, f"{name} shares no fine-tuned tasks; choose a study that does")
        side_by_side = options.engine(engine, workers, address, gpus_per_task)
        repeated = seeds or (1 if quick else 3)
        setting = Setting(quick, repeated, model, options.dtype(dtype), device, cells, side_by_side)
        folder = out or Path(f"study-{name}")
        less = "" if side_by_side.in_process else ", one piece after another"
        options.say(f"{name}: {chosen.cost(setting)} on two cores{less}")
        outcome = run(chosen, folder, setting, options.say, typer.echo)
    for sentence in outcome.reading:
        typer.echo(sentence)
    typer.echo(f"results: {folder / 'results.json'}   tables and figures: {folder}")
