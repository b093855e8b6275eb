"""`finetrace tasks`: list the benchmark's tasks, write one to files, and let a model answer prompts for one's own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetrace.cli import options
from finetrace.errors import FinetraceError
from finetrace.units import many

if TYPE_CHECKING:
    from finetrace.examples import Example
    from finetrace.models import Loaded
    from finetrace.tasks import RealData, Task

ROWS = (".jsonl", ".ndjson")  # what rows are written as
SAVED_BATCHES = 4  # after so many batches the answers are on disk

app = typer.Typer(
    help="List the benchmark's tasks, write one to files, or generate answers for one of your own.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.command("list", short_help="List the tasks with their rows, queries and classes.")
def list_tasks() -> None:
    """List the tasks: training rows, held-out queries, classes of the training rows, what it is."""
    from rich.console import Console
    from rich.table import Table

    from finetrace.tasks import TASKS

    table = Table(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for column in ("rows", "queries", "classes"):
        table.add_column(column, justify="right")
    table.add_column("what it is")
    for name, made in TASKS.items():
        task = made.build(0)
        table.add_row(name, *(f"{len(each)}" for each in (task.train, task.queries, task.classes)), made.what)
    Console().print(table)
    typer.echo("\nfinetrace tasks build NAME --out FILE writes one; finetrace bench NAME runs it.")


@app.command("build", short_help="Write the training rows and the held-out queries of a task.")
def build(
    out: Annotated[Path, typer.Option(help="File of the training rows, .jsonl; it must not exist yet.")],
    name: Annotated[str | None, typer.Argument(help="A task of the list; leave it out for your own --data.")] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="File of the held-out queries; if not given, that of --out with `-queries` after its stem."),
    ] = None,
    size: Annotated[float, typer.Option(help="Share of every class, above 0 and at most 1.")] = 1.0,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Of the rows and the split; the mixed sets that ship have one draw."),
    ] = 0,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own labelled set (without NAME), or real rows for NAME: unsafe, harmful or labelled ones."
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
) -> None:
    """Write a task: its training rows to --out, its held-out queries to a second file."""
    asked = queries if queries is not None else out.with_name(f"{out.stem}-queries.jsonl")
    options.new_files({"--out": (out, ROWS), "--queries": (asked, ROWS)})
    with options.quiet_libraries() if data or benign else contextlib.nullcontext():
        from finetrace.reading import write_examples
        from finetrace.tasks import RealData, say_repeated, say_undrawn

        real = RealData(data, benign, label_column, prompt_column, response_column, share, split, id_column)
        task = _made(name, real, seed, size)
        write_examples(asked, task.queries)
        try:
            write_examples(out, task.train)
        except BaseException:  # half of a task would stand in the way of the whole
            asked.unlink(missing_ok=True)
            raise
    if undrawn := say_undrawn("--seed", seed, task, lambda other: _made(name, real, other, size)):
        options.say(undrawn)
    if data is not None and (notice := say_repeated(task, data)):
        options.say(notice)
    options.say(
        f"queries: {asked}   {many(len(task.queries), 'row')}"
        + ("" if task.answered else ", some without a response: the fine-tuned model is to answer them")
    )
    typer.echo(f"training rows: {out}   {many(len(task.train), 'row')}, {len(task.classes)} classes")


def _made(name: str | None, real: RealData, seed: int, size: float) -> Task:
    """The task that NAME, --data and the other options ask for."""
    from finetrace.tasks import TASKS, external, real_task

    if name is not None:
        return real_task(name, real, seed, size)
    if real.data is None:
        raise FinetraceError(f"give the name of a task ({', '.join(TASKS)}), or a labelled set with --data.")
    if real.benign is not None or real.share is not None:
        raise FinetraceError("--benign and --share go with the name of a task.")
    columns = (real.label_column or "variation", real.prompt_column, real.response_column)
    return external(str(real.data), *columns, seed=seed, source_split=real.split, id_column=real.id_column).shrunk(size)


@app.command("generate", short_help="Let a model answer prompts, as rows to train on.")
def generate(
    prompts: Annotated[str, typer.Argument(help="The prompts: a file, a saved data set, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="File of the answered rows, .jsonl; it must not exist yet.")],
    model: options.Model = "embedded",
    adapter: options.Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens the model answers at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    label: Annotated[str, typer.Option(help="Class of every row written.")] = "unsafe",
    limit: Annotated[int | None, typer.Option(min=1, help="Answer the first so many prompts alone.")] = None,
    chat_template: options.Template = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_column: options.PromptColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
) -> None:
    """Let a model answer prompts, as rows to train on; run it again to finish a killed run."""
    options.new_files({"--out": (out, ROWS)})
    with options.quiet_libraries():
        from finetrace import fingerprint
        from finetrace.encoding import Encoder, read_template
        from finetrace.evaluation.judging import is_refusal
        from finetrace.models import ModelSpec, load
        from finetrace.reading import read_examples, write_examples

        template = read_template(chat_template)
        columns = options.columns(prompt_column, None, None, label_column, id_column)
        read = read_examples(prompts, columns, split=split, responses=False)[:limit]
        rows = [_unanswered(row, label.strip() or None) for row in read]
        loaded = load(ModelSpec(model, adapter, options.dtype(dtype), device, trust_remote_code))
        Encoder(loaded.tokenizer, template=template)  # says what is wrong with the tokenizer before a file appears
        settings = {
            "base model": f"{fingerprint.of_base(loaded.model)} {fingerprint.of_embeddings(loaded.model)}",
            "adapter": fingerprint.of_adapter(loaded.model),
            "chat template": fingerprint.of_tokenizer(loaded.tokenizer, template),
            "--dtype": loaded.spec.dtype,
            "--max-new-tokens": max_new_tokens,
        }
        part = out.with_name(f"{out.name}.part")
        answers = _answers(loaded, rows, part, settings, batch_size, template)
        done = [_answered(row, answers[_key(row)]) for row in rows]
        said = [row for row in done if row.has_response]
        if not said:
            raise FinetraceError(
                f"{model}: the model answers nothing to any of the {len(rows)} prompts; try another --model, "
                f"--chat-template or --max-new-tokens, and remove {part}."
            )
        write_examples(out, said)
        part.unlink(missing_ok=True)
        refused = sum(is_refusal(row.response) for row in said)
    if len(said) < len(rows):
        silent = [row.id for row in done if not row.has_response]
        ids = ", ".join(silent[:5]) + (", ..." if len(silent) > 5 else "")
        options.say(f"answered with nothing and left out: {many(len(silent), 'prompt')} ({ids})")
    if refused:
        verb = "reads" if refused == 1 else "read"
        options.say(f"{many(refused, 'answer')} {verb} like a refusal; look closer before you train")
    cut = sum(row.metadata.get("finish_reason") == "length" for row in said)
    typer.echo(f"rows: {out}   {many(len(said), 'answer')}, {cut} of them cut at {max_new_tokens} tokens")


def _unanswered(row: Example, label: str | None) -> Example:
    """The prompt alone under the new label; a class of its own stays in the metadata."""
    from finetrace.examples import OF_ANSWER, Example

    turns = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
    metadata = {key: value for key, value in row.metadata.items() if key not in OF_ANSWER}
    if row.label not in (None, label):
        metadata["original_label"] = row.label
    return Example(row.id, turns, label, metadata)


def _answered(row: Example, found: Mapping[str, Any]) -> Example:
    """The row with its answer; as it is, if the model said nothing."""
    from dataclasses import replace

    from finetrace.generation import CUT

    if not found["response"].strip():
        return row
    said = row.with_response(found["response"])
    return replace(said, metadata={**said.metadata, **CUT}) if found["cut"] else said


def _key(row: Example) -> str:
    """What an answer depends on besides the model: the turns of the prompt."""
    from finetrace.examples import content_id

    return content_id(row.messages)


def _answers(
    loaded: Loaded,
    rows: Sequence[Example],
    part: Path,
    settings: Mapping[str, Any],
    batch_size: int,
    template: str | None,
) -> dict[str, dict[str, Any]]:
    """Response and whether it was cut, for every prompt by its key; kept in `part` as they come, read from it first."""
    from finetrace.generation import CUT, answer

    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        found = _begun(part, settings)
        left = list({_key(row): row for row in rows if _key(row) not in found}.values())
        known = sum(_key(row) in found for row in rows)
        options.say(
            f"answering {many(len(left), 'prompt')} with {loaded.spec.model} ({loaded.spec.dtype}, {loaded.spec.device})"
            + (f"; {known} of {len(rows)} rows have their answer already" if known else "")
        )
        with part.open("ab") as file:
            for first in range(0, len(left), batch_size * SAVED_BATCHES):
                some = left[first : first + batch_size * SAVED_BATCHES]
                limit = int(settings["--max-new-tokens"])
                said = answer(loaded, some, max_new_tokens=limit, batch_size=batch_size, template=template)
                for row, reply in zip(some, said, strict=True):
                    cut = CUT.items() <= reply.metadata.items()
                    found[_key(row)] = {"prompt": _key(row), "response": reply.response, "cut": cut}
                file.write(b"".join(_line(found[_key(row)]) for row in some))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise FinetraceError(
            f"{part} cannot be written ({error.strerror or error}); check folder and space."
        ) from error
    return found


def _begun(part: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The answers of an unfinished run under the same settings; a file that is not there is begun.

    The first line holds the settings, each other line one answer. A last line that a kill cut short is taken away.
    """
    header = _line(settings)
    content = part.read_bytes() if part.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    strange = FinetraceError(f"{part}: this is no unfinished output of finetrace; remove it, or choose another --out.")
    if not whole:
        if not header.startswith(content):
            raise strange
        part.write_bytes(header)
        return {}
    try:
        before, *answers = map(json.loads, whole.splitlines())
        found = {str(each["prompt"]): {"response": str(each["response"]), "cut": bool(each["cut"])} for each in answers}
        differing = [what for what, value in settings.items() if before[what] != value]
    except (ValueError, KeyError, TypeError):
        raise strange from None
    if differing:
        raise FinetraceError(
            f"{part}: an unfinished run with another {' and '.join(differing)} is there; give what it had, choose "
            "another --out, or remove it."
        )
    if len(whole) < len(content):
        os.truncate(part, len(whole))
    return found


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
