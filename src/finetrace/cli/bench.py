"""`finetrace bench`: the paper's tasks x methods x protocols x seeds, with controls and intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetrace.cli import options
from finetrace.errors import FinetraceError

if TYPE_CHECKING:
    from finetrace.execution import Engine
    from finetrace.models import DType

ATTACK_SUCCESS = "attack-success"


def bench(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks by name, or attack-success alone; all tasks if none is given.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; a run that stopped goes on there. bench or attack-success by default."
        ),
    ] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="corrected or paper; may repeat.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunings of each task: data order and adapter.")] = 3,
    size: Annotated[float, typer.Option(help="Share of every class, above 0 and at most 1.")] = 1.0,
    task_seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of the task's rows: other sentences, other split; the mixed sets that ship have one draw.",
        ),
    ] = 0,
    method: Annotated[list[str] | None, typer.Option(help="NAME or NAME:parameter=value,...; may repeat.")] = None,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Loss positions x similarity x curvature x layers x padding instead; corrected protocol alone.",
        ),
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Another number of epochs than the task's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Another base model than the embedded one.")] = None,
    chat_template: options.Template = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="Layers that get an adapter; q_proj and v_proj if not given; may repeat.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Plain linear layers whose gradients are taken in place of the adapter's: regular expressions; may repeat."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="An external labelled set, or with one task's name real rows for it: file, folder or Hub id."
        ),
    ] = None,
    benign: options.Benign = None,
    share: options.Share = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the class in --data; `variation` if not given.")
    ] = None,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
    judge: Annotated[str | None, typer.Option(help="A text-classification model; refusal phrases by default.")] = None,
    judge_label: Annotated[str | None, typer.Option(help="The judge's label of a harmful answer.")] = None,
    workers: options.Workers = None,
    engine: options.EngineOption = None,
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every index (the most disk).")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Run the benchmark: fine-tune, index, score and compare, for every task, protocol and seed."""
    from rich.console import Console

    if list_:
        from finetrace.tasks import TASKS

        rates = "how often models answer 30 unsafe requests, by what they were fine-tuned on"
        options.listing([*((name, made.what) for name, made in TASKS.items()), (ATTACK_SUCCESS, rates)])
        return
    if ATTACK_SUCCESS in (tasks or ()):
        others: dict[str, object] = {"--protocol": protocol, "--method": method, "--ablation": ablation, "--data": data}
        others |= {
            "--task-seed": task_seed or None,
            "--keep": keep,
            "--chat-template": chat_template,
        }
        others |= {"--target-modules": target_modules, "--modules": modules, "--label-column": label_column}
        others |= {
            "--benign": benign,
            "--share": share,
            "--prompt-column": prompt_column,
            "--response-column": response_column,
            "--id-column": id_column,
            "--split": split,
        }
        unused = [
            *sorted({*(tasks or ())} - {ATTACK_SUCCESS}),
            *(flag for flag, value in others.items() if not (value is None or value is False)),
        ]
        if unused:
            raise FinetraceError(
                f"{' '.join(unused)}: {ATTACK_SUCCESS} runs alone and does not take that; leave it out."
            )
        folder = out or Path(ATTACK_SUCCESS)
        at = options.engine(engine, workers, address, gpus_per_task)
        _attack_success(folder, seeds, size, model, epochs, options.dtype(dtype), device, (judge, judge_label), at)
        return
    if ablation and method:
        raise FinetraceError("--ablation has methods of its own; leave --method out.")
    if ablation and "paper" in (protocol or ()):
        raise FinetraceError(
            "--ablation compares padded with unpadded rows, and the paper protocol pads every row; leave --protocol paper out."
        )
    if chat_template is not None and "paper" in (protocol or ()):
        raise FinetraceError("--chat-template: the paper protocol has a template of its own; leave one of the two out.")
    if data is None and (label_column or prompt_column or response_column or id_column or split):
        raise FinetraceError(
            "--label-column, --prompt-column, --response-column, --id-column and --split go with --data."
        )
    if not tasks and (benign is not None or share is not None):
        raise FinetraceError("--benign and --share go with the name of a task.")
    if modules and "paper" in (protocol or ()):
        raise FinetraceError(
            "--modules: the paper protocol takes the gradients of the adapter; leave one of the two out."
        )
    given = data is not None or benign is not None or share is not None
    if given and tasks and len(tasks) > 1:
        raise FinetraceError(
            f"{' '.join(tasks)}: --data, --benign and --share bring the rows of one task; name that one."
        )
    chosen_engine = options.engine(engine, workers, address, gpus_per_task)
    folder = out or Path("bench")
    with options.quiet_libraries():
        from finetrace.attribution import make
        from finetrace.benchmark.ablation import ABLATION
        from finetrace.benchmark.protocol import beside
        from finetrace.benchmark.report import report
        from finetrace.benchmark.runner import Plan, Source, cells, run_all
        from finetrace.tasks import TASKS, RealData, real_task, recipe, say_repeated, say_undrawn

        source = real = None
        undrawn = ""
        names = list(dict.fromkeys(tasks or TASKS))
        if given and tasks:
            real = RealData(data, benign, label_column, prompt_column, response_column, share, split, id_column)
            made = real_task(names[0], real, task_seed, size)
            undrawn = say_undrawn("--task-seed", task_seed, made, lambda seed: real_task(names[0], real, seed, size))
        elif data is not None:
            source = Source(
                data, label_column or "variation", prompt_column, response_column, split=split, id_column=id_column
            )
            made = source.task(task_seed, size)
            undrawn = say_undrawn("--task-seed", task_seed, made, lambda seed: source.task(seed, size))
            names = [made.name]
            if not names[0]:
                raise FinetraceError(f"--data {data}: give a file or a folder that has a name.")
        if undrawn:
            options.say(undrawn)
        if data is not None and (notice := say_repeated(made, data)):
            options.say(notice)
        found = [recipe(name) for name in names] if source is None else []
        if judge is not None and not any(each.aligned for each in found):
            raise FinetraceError(
                f"--judge {judge}: it judges the model's own answers, which only queries of mixed-small and mixed-large are; "
                "leave it out."
            )
        wanted = [*ABLATION, "repsim"] if ablation else method or []
        specs = list(dict.fromkeys(make(spec).label for spec in beside(wanted)))
        planned = cells(
            names,
            list(dict.fromkeys(protocol or ["corrected"])),
            seeds,
            methods=specs,
            size=size,
            task_seed=task_seed,
            model=model,
            epochs=epochs,
            dtype=options.dtype(dtype),
            device=device,
            chat_template=chat_template,
            target_modules=target_modules or (),
            modules=modules or (),
        )
        run_all(folder, Plan(planned, (judge, judge_label), source, keep, chosen_engine, real), options.say)
        asked = {(cell.task, cell.protocol) for cell in planned}
        written = [row for row in report(folder) if (row.task, row.protocol) in asked]
    from finetrace.benchmark.tables import print_summary

    print_summary(written, Console())
    typer.echo(f"results: {folder / 'results.json'}   tables: {folder / 'tables'}   figures: {folder / 'figures'}")
    typer.echo(f"pages: {folder / 'reports'}")


def _attack_success(
    folder: Path,
    seeds: int,
    size: float,
    model: str | None,
    epochs: int | None,
    dtype: DType,
    device: str,
    judge: tuple[str | None, str | None],
    engine: Engine,
) -> None:
    """The table of attack success rates."""
    from rich.console import Console

    with options.quiet_libraries():
        from finetrace.benchmark.behaviour import Setting, attack_success, print_rates
        from finetrace.evaluation.judging import make_judge

        judged_by = make_judge(*judge)
        setting = Setting(size, model, epochs, dtype, device)
        rates = attack_success(folder, setting, seeds, judged_by, options.say, engine)
    print_rates(rates, judged_by.name, Console())
    typer.echo(f"results: {folder / 'results.json'}   table: {folder / 'table1.md'}, {folder / 'table1.tex'}")
