"""`finetrace trace`: which training examples are behind an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetrace.cli import options
from finetrace.cli.traced import show, write_page, write_ranked
from finetrace.errors import FinetraceError
from finetrace.examples import refuse_no_text
from finetrace.units import many, size

if TYPE_CHECKING:
    from finetrace.attribution import Method, Problem
    from finetrace.examples import Example
    from finetrace.index.store import Index
    from finetrace.tracing import RankedResult, Result

TRACED = "ekfac:normalise=cosine,layers=last-half,at=start"  # tracing.BEST, without its imports


def trace(
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    ask: Annotated[str | None, typer.Option(help="A prompt; the model answers, and its answer is traced.")] = None,
    answer: Annotated[str | None, typer.Option(help="Trace this answer to --ask instead of the model's.")] = None,
    queries: Annotated[
        str | None, typer.Option(help="A file or data set of queries; the model answers rows without a response.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method, NAME or NAME:parameter=value,...; may repeat; default {TRACED}; `all` for all."),
    ] = None,
    normalise: Annotated[str | None, typer.Option(help="none, cosine or relatif, for influence methods.")] = None,
    damping: Annotated[float | None, typer.Option(help="Multiple of the damping rule.")] = None,
    damping_rule: Annotated[str | None, typer.Option(help="trace or entry; see finetrace methods exact.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Examples shown a query.")] = 10,
    opponents: Annotated[bool, typer.Option("--opponents", help="Show the strongest opponents too.")] = False,
    format: Annotated[str, typer.Option(help="What is printed: table, json, csv, or parquet with --out.")] = "table",
    out: Annotated[
        Path | None, typer.Option(help="Also write the ranked rows to a .json, .csv or .parquet file.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Also write every score of the first method: .parquet, .csv, .json, .npy or .safetensors."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report page there.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over files of these names that are there already.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="What scoring may use, as 512MB or 4GB; half of what is available if not given.")
    ] = None,
    cache: Annotated[
        str, typer.Option(help="What may be kept in the index's folder for the next query; 0 keeps nothing.")
    ] = "2GB",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing, and use nothing that was kept.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens the model answers at most.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="Another dtype than the index was built in.")] = None,
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
    """Rank the training examples behind an answer: proponents made it more likely, opponents less."""
    options.one_of("--format", format, ("table", "json", "csv", "parquet"))
    if format == "parquet" and out is None:
        raise FinetraceError(
            "--format parquet: a terminal cannot show Parquet; give the file with --out ranked.parquet."
        )
    if (ask is None) == (queries is None):
        raise FinetraceError("give what to trace: either --ask TEXT or --queries FILE.")
    if answer is not None and ask is None:
        raise FinetraceError("--answer goes with --ask: it is the answer to that prompt.")
    for flag, text in (("--ask", ask), ("--answer", answer)):
        if text is not None and not text.strip():
            raise FinetraceError(f"{flag} is empty; give it a text{', or leave it out' if flag == '--answer' else ''}.")
        refuse_no_text(flag, text or "")
    files = {
        "--out": (out, (".json", ".csv", ".parquet")),
        "--scores": (scores, (".json", ".csv", ".parquet", ".npy", ".safetensors")),
        "--report": (report, (".html",)),
    }
    options.new_files(files, overwrite)
    with options.quiet_libraries():
        from finetrace.attribution import Problem
        from finetrace.attribution.ranked import beside, fits
        from finetrace.examples import Example
        from finetrace.index import open_index
        from finetrace.index.sizing import parse_bytes
        from finetrace.reading import read_examples
        from finetrace.tracing import default_method, rank_methods, run_methods, standard

        room = parse_bytes("--memory", memory)
        kept = 0 if no_cache or cache == "0" else parse_bytes("--cache", cache) or 0
        opened = open_index(index)
        asked_for = method or [default_method(opened)]
        specs = [each for name in asked_for for each in (standard(opened) if name == "all" else [name])]
        if not opened.has_start() and (method is None or "all" in method):
            options.say(
                f"{index}: the start of the fine-tuning is not at hand, so methods there (at=start) are left out"
            )
        overrides: dict[str, Any] = {"normalise": normalise, "damping": damping, "damping_rule": damping_rule}
        chosen = list(dict.fromkeys(_made(spec, overrides, default=method is None) for spec in specs))
        for name, value in overrides.items():
            if value is not None and not any(_heeds(spec, name, default=method is None) for spec in specs):
                raise FinetraceError(
                    f"--{name.replace('_', '-')} {value}: none of the methods chosen has this parameter, or they set it "
                    "themselves."
                )
        if queries is None and any((prompt_column, response_column, messages_column, label_column, id_column, split)):
            raise FinetraceError("the column options and --split are of --queries; with --ask leave them out.")
        if queries is not None:
            columns = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
            asked = read_examples(queries, columns, split=split, responses=False)
        else:
            asked = [Example.from_prompt(str(ask), answer, id="ask")]
        if any({"gradients", "representations"} & set(m.needs) for m in chosen) or not all(
            each.has_response for each in asked
        ):
            opened.model(options.dtype(dtype) if dtype else None, device, trust_remote_code, device_map)
        asked = _answered(opened, asked, max_new_tokens)
        problem = Problem(opened, asked, memory=room, cache=kept)
        results: Sequence[Result | RankedResult]
        whole: list[Result] = []
        if fits(problem, len(chosen)):
            problem = beside(problem, len(chosen))
            results = whole = run_methods(problem, chosen)
        else:
            _say_left_out(problem, chosen, top, scores, report)
            results = rank_methods(problem, chosen, top, opponents=opponents, scores=scores)
    options.say_lengths(problem.lengths)
    for result in results:
        _say_computed(result)
    if out is not None:
        write_ranked(results, out, top, opponents)
    if scores is not None and whole:
        whole[0].scores.save(scores)
    if report is not None:
        write_page(opened, whole, report)
    show(results, format, top, opponents)  # last: a pipe that is closed ends the command


def _heeds(spec: str, parameter: str, *, default: bool) -> bool:
    """Whether an option of this parameter makes a difference to the method."""
    from finetrace.attribution.method import make, named

    return parameter in make(spec).parameters and (default or parameter not in named(spec))


def _made(spec: str, overrides: Mapping[str, Any], *, default: bool) -> Method:
    """The method, with the options for what it does not set itself; of the `default` one they replace what it sets."""
    from finetrace.attribution.method import make, named

    if not default:
        return make(spec, **{name: value for name, value in overrides.items() if name not in named(spec)})
    best = make(spec)
    return make(
        best.name, **{**best.parameters, **{name: value for name, value in overrides.items() if value is not None}}
    )


def _say_left_out(
    problem: Problem, methods: Sequence[Method], top: int, scores: Path | None, report: Path | None
) -> None:
    """What needs the whole matrix of scores, where it is not held."""
    of = f"the {problem.m} x {problem.n} scores of {many(len(methods), 'method')}"
    what = f"{of} do not fit the memory of {size(problem.memory)}"
    if report is not None:
        raise FinetraceError(f"--report {report}: {what}, and the page needs them all; give more with --memory.")
    if scores is not None and scores.suffix in (".json", ".csv"):
        raise FinetraceError(
            f"--scores {scores}: {what}, and are written as they are made: to .parquet, .npy or .safetensors."
        )
    options.say(f"{what}: the {top} strongest rows of each query are kept; metrics and their intervals are left out")


def _say_computed(result: Result | RankedResult) -> None:
    """How scores that were streamed or solved were computed."""
    how = result.scores.computed
    said = []
    if how.get("computed") == "streamed":
        said.append(f"streamed, {how['rows_at_once']} rows at a time, in {size(how['memory'])}")
    if "solver" in how:
        rounding = f", and about {how['rounding']:.0e} by rounding of its products" if "rounding" in how else ""
        said.append(f"solver {how['solver']}, relative residual {how['residual']:.0e}{rounding}")
    if said:
        options.say(f"{result.method.title}: {'; '.join(said)}")


def _answered(index: Index, asked: list[Example], max_new_tokens: int) -> list[Example]:
    """The queries, those without a response answered by the index's model."""
    silent = [example for example in asked if not example.has_response]
    if not silent:
        return asked
    from finetrace.generation import answer

    template = index.manifest.encoding.template
    replies = {e.id: e for e in answer(index.model(), silent, max_new_tokens=max_new_tokens, template=template)}
    for id_, reply in replies.items():
        if not reply.has_response:
            raise FinetraceError(
                f"query {id_}: the model answers nothing, so there is nothing to trace; give --answer."
            )
    return [replies.get(example.id, example) for example in asked]
