"""`finetrace index`: per-example gradients of a training set, kept on disk, checked and mended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from finetrace.cli import options

if TYPE_CHECKING:
    from finetrace.collection.factors import Labels
    from finetrace.index.manifest import Manifest
    from finetrace.moments import Moment

BUILD = "build"


class _BuildsByDefault(TyperGroup):
    """`finetrace index DATA` builds; a file that is called like a command is written ./verify."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `build` before anything that is no command of its own."""
        if args and args[0] not in self.commands:
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BuildsByDefault,
    help="Collect gradients of a training set (build, or nothing), add rows (append), check (verify) and mend (repair).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out rows whose values are not finite, and note them in the manifest.")
]


def say_left_out(about: Manifest) -> None:
    """Say which rows are left out, if any are."""
    from finetrace.index.build import left_out_sentence

    if about.left_out:
        options.say(left_out_sentence(about))


@app.command(BUILD)
def index(
    data: Annotated[str, typer.Argument(help="The rows the adapter was trained on: a file, a saved set, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    model: options.Model = "embedded",
    adapter: options.Adapter = None,
    modules: Annotated[
        list[str] | None, typer.Option(help="Regular expression of plain linear layers to track; may repeat.")
    ] = None,
    representations: Annotated[
        list[str] | None,
        typer.Option(help="POOLING[@LAYER], pooling last-prompt, last-token or mean-response; may repeat."),
    ] = None,
    loss_on: options.LossOn = "response",
    at: options.At = "end",
    max_length: options.MaxLength = None,
    chat_template: options.Template = None,
    kronecker: Annotated[
        str | None,
        typer.Option(help="Fit K-FAC and EK-FAC factors now: labels drawn from the `model`, or those of the `data`."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens a batch holds at most.")] = 2048,
    skip_bad: SkipBad = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    messages_column: options.MessagesColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
) -> None:
    """Collect gradients and representations of a training set; run it again to finish a killed run.

    `build` may be left out. See also: finetrace index append, finetrace index verify, finetrace index repair.
    """
    with options.quiet_libraries():
        from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation
        from finetrace.encoding import Encoder, read_template
        from finetrace.index import build_index
        from finetrace.models import ModelSpec, load
        from finetrace.positions import Positions
        from finetrace.reading import read_examples

        Positions.parse(loss_on)
        labels = options.one_of("--kronecker", kronecker, ("model", "data")) if kronecker is not None else None
        wanted = tuple(map(Representation.parse, representations)) if representations else DEFAULT_REPRESENTATIONS
        template = read_template(chat_template)
        chosen = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        examples = read_examples(data, chosen, split=split)
        loaded = load(ModelSpec(model, adapter, options.dtype(dtype), device, trust_remote_code))
        encoder = Encoder(loaded.tokenizer, loss_on, max_length, template)
        built, lengths = build_index(
            loaded,
            examples,
            out,
            encoder,
            modules=modules,
            representations=wanted,
            batch_tokens=batch_tokens,
            kronecker=cast("Labels | None", labels),
            at=cast("Moment", options.one_of("--at", at, ("end", "start"))),
            skip_bad=skip_bad,
            say=options.say,
        )
    options.say_lengths(lengths)
    say_left_out(built.manifest)
    for name, reason in list(built.manifest.skipped.items())[:5]:
        options.say(f"not tracked: {name} ({reason})")
    width = sum(block.size for block in built.blocks)
    typer.echo(
        f"index: {out}   {len(built)} examples, {built.manifest.tokens:,} tokens, {len(built.blocks)} matrices, "
        f"{width:,} gradient entries an example"
    )


@app.command("append")
def append(
    data: Annotated[str, typer.Argument(help="The rows to add: a file, a saved set, or a Hub id.")],
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out rows whose ids the index holds, in place of refusing them.")
    ] = False,
    skip_bad: SkipBad = False,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    messages_column: options.MessagesColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
) -> None:
    """Add rows to a finished index, with its own model, adapter and settings; run it again to finish a killed run.

    Old shards stay as they are, and the index answers as before until all new rows are there.
    """
    with options.quiet_libraries():
        from finetrace.index import append as add
        from finetrace.index import open_index
        from finetrace.reading import read_examples

        chosen = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        examples = read_examples(data, chosen, split=split)
        opened = open_index(index)
        opened.model(None, device, trust_remote_code)
        grown, lengths = add(opened, examples, skip_known=skip_known, skip_bad=skip_bad, say=options.say)
    options.say_lengths(lengths)
    say_left_out(grown.manifest)
    typer.echo(f"index: {index}   {len(grown) - len(opened)} examples added, {len(grown)} in all")


Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]


@app.command("verify")
def verify(folder: Folder) -> None:
    """Look whether every file of an index is whole, and name what is broken; exit code 1 if anything is.

    Shards and factors are compared with their checksums, examples with their fingerprint; the adapter is read.
    """
    with options.quiet_libraries():
        from finetrace.index.checking import verify as check

        damage = check(folder)
    for each in damage:
        typer.echo(f"broken: {each.what}")
    if damage:
        typer.echo(f"finetrace index repair {folder} computes again what can be.")
        raise typer.Exit(1)
    typer.echo(f"{folder}: every file is whole")


@app.command("repair")
def repair(folder: Folder) -> None:
    """Compute broken shards again, and remove broken factors and views, which are made when asked for.

    Exit code 1 if some damage is left.
    """
    with options.quiet_libraries():
        from finetrace.index.checking import repair as mend

        left = mend(folder, options.say)
    for each in left:
        typer.echo(f"left: {each.what}")
    if left:
        typer.echo("Run finetrace index with the data and the adapter on this folder again.")
        raise typer.Exit(1)
    typer.echo(f"{folder}: every file is whole")
