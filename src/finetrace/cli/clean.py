"""`finetrace clean`: take out the training rows behind a few bad answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetrace.cli import options
from finetrace.cli.trace import TRACED
from finetrace.cli.validate import finetuning_of
from finetrace.errors import FinetraceError
from finetrace.units import many

if TYPE_CHECKING:
    from finetrace.cleaning.rank import Outcome, Ranked
    from finetrace.evaluation.intervals import Estimate
    from finetrace.evaluation.judging import Judge
    from finetrace.examples import Example
    from finetrace.index.store import Index


def clean(
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    bad: Annotated[
        str,
        typer.Option(
            help="Bad answers with their prompts; prompts alone are answered by the model, and those the judge calls bad count."
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="The training set, to write its rows as they stand there; else the index's own.")
    ] = None,
    kept: Annotated[Path, typer.Option(help="File of the kept rows: .jsonl, .json, .csv, .tsv or .parquet.")] = Path(
        "kept.jsonl"
    ),
    removed: Annotated[Path, typer.Option(help="File of the removed rows, with rank, value and reason.")] = Path(
        "removed.jsonl"
    ),
    ranking: Annotated[
        Path | None,
        typer.Option(help="File of all rows by rank, the kept ones too, with id and value; none if not given."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Method; may repeat, then they vote; default {TRACED}.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Remove the first so many rows.")] = None,
    share: Annotated[float | None, typer.Option(help="Remove this share of the rows.")] = None,
    expected: Annotated[
        float | None,
        typer.Option(
            help="Without --top and --share: rows that would go by chance if none had to do with the answers; 1 if not given."
        ),
    ] = None,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain",
            help="Fine-tune on the kept rows, and without as many random or self-influential ones, and ask again.",
        ),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Fine-tunings of each, with --retrain; 1 if not given.")
    ] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Random removals, with --retrain; 1 if not given.")] = None,
    workers: options.Workers = None,
    engine: options.EngineOption = None,
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The finetune.yaml of the adapter, for --retrain; found in the index if not given."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter's own folder, for --retrain.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of what --retrain finds; a run that stopped goes on there; `cleaning` if not given."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="A text-classification model that says which answers are bad; refusal phrases if not given."),
    ] = None,
    judge_label: Annotated[str | None, typer.Option(help="The judge's label of a bad answer.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens the model answers at most; 40 if not given.")
    ] = None,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    messages_column: options.MessagesColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
) -> None:
    """Rank the training set against bad answers, and write the rows to keep and those to remove."""
    from rich.console import Console

    with options.quiet_libraries():
        from finetrace.attribution import Problem, make
        from finetrace.benchmark.stages import claim, unclaim
        from finetrace.cleaning.files import data_rows, index_rows, ranking_rows, reasons, refuse_path, write_files
        from finetrace.cleaning.rank import Cut, rank
        from finetrace.cleaning.rank import retrain as train_again
        from finetrace.evaluation.judging import make_judge
        from finetrace.evaluation.own_loss import own_loss, said_of
        from finetrace.fingerprint import of_examples
        from finetrace.generation import ANSWER_TOKENS
        from finetrace.index import open_index
        from finetrace.placement import refuse_retraining
        from finetrace.reading import Columns, read_examples
        from finetrace.reporting.results import of_more_seeds, write_results
        from finetrace.sources import read_table
        from finetrace.tracing import default_method

        files = {"--kept": kept, "--removed": removed} | ({} if ranking is None else {"--ranking": ranking})
        for option, path in files.items():
            refuse_path(path)
            if same := [
                other for other, there in files.items() if there.resolve() == path.resolve() and other != option
            ]:
                raise FinetraceError(f"{option} and {same[0]} are both {path}; give them different names.")
        chosen_engine = options.engine(engine, workers, address, gpus_per_task)
        if retrain:
            refuse_retraining(device_map)
        else:
            alone: dict[str, object] = {"--config": config, "--adapter": adapter, "--seeds": seeds, "--draws": draws}
            alone |= {"--out": out, "--workers": workers, "--engine": engine}
            options.refuse_given(alone, "only --retrain heeds it; add --retrain")
        if split is not None and data is None:
            raise FinetraceError(f"--split {split}: that is of --data; give it, or leave --split out.")
        seeds, draws, out = seeds or 1, draws or 1, out or Path("cleaning")
        if top is not None or share is not None:
            options.refuse_given({"--expected": expected}, "--top or --share says how many rows go; leave that one out")
        cut = Cut(top, share, 1.0 if expected is None else expected)
        for spec in method or []:
            make(spec)  # refused before the model is loaded
        opened = open_index(index)
        cut.removed(len(opened))
        finetuning = finetuning_of(opened, config, adapter) if retrain else None
        columns = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        examples = list(opened.rows.examples)
        if data is None:
            rows = index_rows(examples, str(index))
        else:
            every, found = opened.all_rows.examples, read_examples(data, columns, split=split)
            rows = data_rows(read_table(data, split, None), columns, found, every).chosen(list(opened.data_rows))
        if opened.manifest.left_out:
            options.say(f"in neither file: {many(len(opened.manifest.left_out), 'row')} that the index left out")
        asked = read_examples(bad, columns if data is None else Columns(), responses=False)
        if not retrain and all(each.has_response for each in asked):
            given = {"--judge": judge, "--judge-label": judge_label, "--max-new-tokens": max_new_tokens}
            options.refuse_given(given, f"{bad} holds all answers, so the model gives none; add --retrain")
        judged_by, max_new_tokens = make_judge(judge, judge_label), max_new_tokens or ANSWER_TOKENS
        if finetuning is not None:
            told: dict[str, object] = {"finetuning": finetuning.model_dump(mode="json")}
            told |= {"index": opened.manifest.data_fingerprint, "adapter": opened.manifest.model.adapter_fingerprint}
            told |= {"bad": [each.id for each in asked], "texts": of_examples(asked)}
            claim(out / "cleaning.json", told, "a cleaning")  # other methods and cuts may join
            if (fewer := of_more_seeds(out, seeds)) is not None:
                options.say(fewer)
        try:
            opened.model(None, device, trust_remote_code, device_map)
            answers = _bad(opened, asked, judged_by, max_new_tokens)
            options.say(f"ranking {many(len(examples), 'row')} against {many(len(answers), 'bad answer')}")
            problem = Problem(opened, answers)
            ranked = rank(problem, cut, method or [default_method(opened)])
        except FinetraceError:  # nothing that is bad, or no row that stands out, perhaps
            if finetuning is not None:
                unclaim(out / "cleaning.json")
            raise
        outcomes: list[Outcome] = []
        settings: str | None = None
        if finetuning is not None:
            outcomes = train_again(
                opened,
                answers,
                ranked,
                finetuning,
                out,
                judged_by,
                seeds=seeds,
                draws=draws,
                answer_tokens=max_new_tokens,
                workers=chosen_engine,
                device=device,
                say=options.say,
            )
            settings = said_of(own_loss(problem), outcomes[0].loss.value)
        gone = rows.chosen(ranked.gone).beside(reasons(ranked, answers))
        written = {kept: rows.chosen(ranked.kept), removed: gone}
        write_files(written if ranking is None else {**written, ranking: ranking_rows(ranked, examples, answers)})
        if outcomes:
            about: dict[str, object] = {"index": str(index), "removed": ranked.removed, "methods": list(ranked.methods)}
            about |= {"judge": judged_by.name, "seeds": seeds, "draws": draws, "settings": settings}
            write_results(out, [_record(each) for each in outcomes], about)
    console = Console()
    _print(ranked, examples, outcomes, judged_by, console)
    if settings is not None:
        console.print(settings, style="dim", highlight=False, markup=False)
    console.print(
        f"kept: {kept} ({many(len(ranked.kept), 'row')})   removed: {removed} ({ranked.removed})",
        highlight=False,
        markup=False,
    )


def _bad(index: Index, asked: list[Example], judge: Judge, max_new_tokens: int) -> list[Example]:
    """The answers that are given, and of the model's own to prompts alone those that the judge calls bad."""
    from finetrace.generation import answer

    silent = [each for each in asked if not each.has_response]
    given = {each.id: each for each in asked if each.has_response}
    if silent:
        template = index.manifest.encoding.template
        replies = answer(index.model(), silent, max_new_tokens=max_new_tokens, template=template)
        verdicts = judge.complied([each.prompt for each in replies], [each.response for each in replies])
        given |= {each.id: each for each, yes in zip(replies, verdicts, strict=True) if yes and each.has_response}
        options.say(
            f"the model answered {many(len(silent), 'prompt')}; {judge.name} calls {sum(verdicts)} of the answers bad"
        )
    found = [given[each.id] for each in asked if each.id in given]
    if not found:
        raise FinetraceError(
            f"none of {many(len(asked), 'answer')} is bad by the judge {judge.name}, so there is nothing to clean."
        )
    return found


def _record(outcome: Outcome) -> dict[str, object]:
    record: dict[str, object] = {"trained_on": outcome.name, "rows": outcome.rows}
    for name, each in (("loss", outcome.loss), ("rate", outcome.rate)):
        ends = {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
        record |= {key: None if value != value else value for key, value in ends.items()}  # JSON has no NaN
    return record


def _interval(of: Estimate, scale: float, form: str) -> str:
    """A mean with its interval, which a single answer of a single training does not have."""
    known = of.low == of.low and of.high == of.high
    return f"{scale * of.value:{form}}" + (f" [{scale * of.low:{form}}, {scale * of.high:{form}}]" if known else "")


def _print(ranked: Ranked, examples: list[Example], outcomes: list[Outcome], judge: Judge, console: object) -> None:
    """The first rows that go and, after retraining, what became of the bad answers; 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from finetrace.evaluation.judging import RefusalPrefixJudge
    from finetrace.reporting import cells

    assert isinstance(console, Console)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=escape(f"behind them, by {' and '.join(ranked.methods)}"),
        title_justify="left",
    )
    first = ranked.gone[:10]
    free = max(34, console.width - 22)  # what rank, value and the spaces leave
    ids = cells.names([examples[row].id for row in first], free - 20)
    for head in ("rank", "value"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("id", overflow="fold", min_width=min(cells.width(ids), free // 2))
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=max(20, free - cells.width(ids)))
    for place, (row, name) in enumerate(zip(first, ids, strict=True), 1):
        prompt = cells.flat(examples[row].prompt)
        table.add_row(str(place), f"{ranked.values[row]:.2f}", Text(name), Text(prompt))
    console.print(table)
    note = "value: mean over the bad answers of the score in robust standard deviations"
    if ranked.threshold is not None:
        note += f"; rows above {ranked.threshold:.2f} go"
    if ranked.tied:
        note += f"; {many(ranked.tied, 'kept row')} with the same value as the last that goes: the data's order decided"
    console.print(note, style="dim", highlight=False, markup=False)
    if ranked.below:
        said = f"{ranked.below} of the {ranked.removed} removed have no value above 0"
        said += ": no more behind the answers than most rows; remove fewer."
        console.print(said, style="dim", highlight=False, markup=False)
    if not outcomes:
        return
    after = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    after.title = escape(f"asked again (judge: {judge.name})")
    after.add_column("trained on")
    for head in ("rows", "bad answers, %", "loss of the bad answers, nats"):
        after.add_column(head, justify="right")
    for each in outcomes:
        after.add_row(each.name, str(each.rows), _interval(each.rate, 100, ".0f"), _interval(each.loss, 1, ".2f"))
    console.print(after)
    note = "loss: higher = the old bad answers are less likely"
    if judge.name == RefusalPrefixJudge.name:
        note += (
            "; by refusal phrases every answer that does not refuse is bad: if bad means something else, give --judge"
        )
    console.print(note, style="dim", highlight=False, markup=False)
