"""`finetrace index`: per-example gradients of a training set, kept on disk, checked and mended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from finetrace.cli import options

if TYPE_CHECKING:
    from finetrace.collection.factors import Labels
    from finetrace.index.manifest import Manifest
    from finetrace.index.stored import FeatureDtype
    from finetrace.moments import Moment

BUILD = "build"
STORED = ("float32", "bfloat16", "float16")


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
    add_completion=False,
    rich_markup_mode=None,
)


SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out rows whose values are not finite, and note them in the manifest.")
]


def say_left_out(about: Manifest) -> None:
    """Say which rows are left out, if any are."""
    from finetrace.index.manifest import left_out_sentence

    if about.left_out:
        options.say(left_out_sentence(about))


@app.command(BUILD, short_help="Collect gradients and representations; finish a killed run.")
@options.command
def index(
    data: Annotated[str, typer.Argument(help="The rows the adapter was trained on: a file, a saved set, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    model: options.Model = "embedded",
    adapter: options.Adapter = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Regular expression of plain linear layers to track, or all-linear; may repeat."),
    ] = None,
    representations: Annotated[
        list[str] | None,
        typer.Option(
            help="POOLING[@LAYER]: last-prompt, last-token or mean-response; a number, or a share of the depth; may repeat."
        ),
    ] = None,
    loss_on: options.LossOn = "response",
    at: options.At = "end",
    max_length: options.MaxLength = None,
    chat_template: options.Template = None,
    kronecker: Annotated[
        str | None,
        typer.Option(help="Fit K-FAC and EK-FAC factors now: labels drawn from the `model`, or those of the `data`."),
    ] = None,
    feature_dtype: Annotated[
        str | None,
        typer.Option(help="Store gradients in float32, bfloat16 or float16; as they are computed if not given."),
    ] = None,
    projection: Annotated[
        str | None,
        typer.Option(
            help="none, two-sided:KOUTxKIN, rademacher:K, sparse:K, or auto: what fits --disk and --memory; auto if not given "
            "and there is no adapter and no --modules, else none."
        ),
    ] = None,
    projection_seed: Annotated[int, typer.Option(min=0, help="Seed of the projection's random matrices.")] = 0,
    disk: Annotated[
        str | None,
        typer.Option(help="What auto may take on the disk, such as 20GB; half of what is free if not given."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What auto may take of memory; half of what is available if not given.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Padded tokens a batch holds at most; 2048 on a CPU and 4096 on a GPU if not given."),
    ] = None,
    skip_bad: SkipBad = False,
    engine: options.EngineOption = None,
    workers: options.Workers = None,
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    messages_column: options.MessagesColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
    announcer: Any = None,  # of `finetrace plan`, which stops where the work begins
) -> None:
    """Collect gradients and representations of a training set; run it again to finish a killed run.

    `build` may be left out. See also: finetrace plan, finetrace index append, finetrace index verify, finetrace index
    repair.
    """
    began = time.perf_counter()
    with options.quiet_libraries():
        from finetrace.collection.projection import Projection
        from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation
        from finetrace.encoding import Encoder, read_template
        from finetrace.finetune_config import other_base, other_rows, other_template
        from finetrace.index import build_index
        from finetrace.index.sizing import AUTO, parse_bytes
        from finetrace.models import ModelSpec, load
        from finetrace.placement import refuse_workers
        from finetrace.planning.announce import Announcer
        from finetrace.positions import Positions
        from finetrace.reading import read_examples

        chosen_engine = options.engine(engine, workers, address, gpus_per_task)
        if announcer is None:  # of a plan, workers are machines
            refuse_workers(device_map, chosen_engine.name)
        Positions.parse(loss_on)
        labels = options.one_of("--kronecker", kronecker, ("model", "data")) if kronecker is not None else None
        stored = options.one_of("--feature-dtype", feature_dtype, STORED) if feature_dtype is not None else None
        if projection not in (None, AUTO):
            Projection.parse(projection)
        disk_bytes, memory_bytes = parse_bytes("--disk", disk), parse_bytes("--memory", memory)
        wanted = tuple(map(Representation.parse, representations)) if representations else DEFAULT_REPRESENTATIONS
        template = read_template(chat_template)
        chosen = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        reading = time.perf_counter()
        examples = read_examples(data, chosen, split=split)
        read = time.perf_counter()
        loaded = load(ModelSpec(model, adapter, options.dtype(dtype), device, trust_remote_code, device_map))
        if note := other_base(loaded):
            options.say(note)
        if adapter is not None and template is None and (note := other_template(Path(adapter), loaded)):
            options.say(note)
        startup = (reading - began) + (time.perf_counter() - read)  # what every worker has to do
        encoder = Encoder(loaded.tokenizer, loss_on, max_length, template)
        announcer = announcer or Announcer(options.say, chosen_engine)
        with announcer.announcing(examples, out, labels, began, startup):
            built, _ = build_index(
                loaded,
                examples,
                out,
                encoder,
                modules=modules,
                representations=wanted,
                batch_tokens=batch_tokens,
                kronecker=cast("Labels | None", labels),
                at=cast("Moment", options.one_of("--at", at, ("end", "start"))),
                feature_dtype=cast("FeatureDtype | None", stored),
                projection=projection,
                projection_seed=projection_seed,
                disk=disk_bytes,
                memory=memory_bytes,
                skip_bad=skip_bad,
                say=options.say,
                begin=announcer.begin,
                engine=chosen_engine,
            )
    say_left_out(built.manifest)
    if adapter is not None and (note := other_rows(Path(adapter), built.manifest.data_fingerprint)):
        options.say(note)
    for reason in dict.fromkeys(built.manifest.skipped.values()):
        names = [name for name, each in built.manifest.skipped.items() if each == reason]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        options.say(f"not tracked: {', '.join(names[:5])}{more} ({reason})")
    width = sum(block.size for block in built.blocks)
    typer.echo(
        f"index: {out}   {len(built)} examples, {built.manifest.tokens:,} tokens, {len(built.blocks)} matrices, "
        f"{width:,} gradient entries an example"
    )
    if built.manifest.projection != "none":
        typer.echo(f"gradients projected by {built.manifest.projection} (seed {built.manifest.projection_seed})")
    if built.manifest.rounding:
        typer.echo(
            f"stored in {built.manifest.feature_dtype}: no gradient moved by more than {built.manifest.rounding:.2%} of its "
            "length, so no cosine of whole gradients by more"
        )


@app.command("append", short_help="Add rows to a finished index; what is there stays.")
def append(
    data: Annotated[str, typer.Argument(help="The rows to add: a file, a saved set, or a Hub id.")],
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out rows whose ids the index holds, in place of refusing them.")
    ] = False,
    skip_bad: SkipBad = False,
    engine: options.EngineOption = None,
    workers: options.Workers = None,
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
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
    """Add rows to a finished index, with its own model, adapter and settings; run it again to finish a killed run.

    Old shards stay as they are, and the index answers as before until all new rows are there.
    """
    with options.quiet_libraries():
        from finetrace.index import append as add
        from finetrace.index import open_index
        from finetrace.placement import refuse_workers
        from finetrace.reading import read_examples

        chosen_engine = options.engine(engine, workers, address, gpus_per_task)
        refuse_workers(device_map, chosen_engine.name)
        chosen = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        examples = read_examples(data, chosen, split=split)
        opened = open_index(index)
        opened.model(None, device, trust_remote_code, device_map)
        grown, _ = add(
            opened, examples, skip_known=skip_known, skip_bad=skip_bad, say=options.say, engine=chosen_engine
        )
    say_left_out(grown.manifest)
    typer.echo(f"index: {index}   {len(grown) - len(opened)} examples added, {len(grown)} in all")


Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]


@app.command("verify", short_help="Check every checksum, and name what is broken.")
def verify(folder: Folder) -> None:
    """Look whether every file of an index is whole, and name what is broken; exit code 1 if anything is.

    Shards and factors are compared with their checksums, examples and adapter with their fingerprints.
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


@app.command("repair", short_help="Compute anew what is missing or broken, and nothing else.")
def repair(
    folder: Folder,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compute broken shards again, and remove broken factors and views, which are made when asked for.

    Exit code 1 if some damage is left.
    """
    with options.quiet_libraries():
        from finetrace.index.checking import repair as mend

        left = mend(folder, options.say, device, device_map, trust_remote_code)
    for each in left:
        typer.echo(f"left: {each.what}")
    if left:
        typer.echo("Run finetrace index with the data and the adapter on this folder again.")
        raise typer.Exit(1)
    typer.echo(f"{folder}: every file is whole")
