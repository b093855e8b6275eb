"""`finetrace finetune`: a LoRA adapter from a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetrace.cli import options
from finetrace.errors import FinetraceError
from finetrace.units import many


def finetune(
    data: Annotated[str, typer.Argument(help="Training rows: a file, a saved data set, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    model: Annotated[
        str | None,
        typer.Option(help="Base model; that of --config, or `embedded`, if not given."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="default, paper (arXiv 2409.19998, section 3) or released (its code).")
    ] = "default",
    config: Annotated[Path | None, typer.Option(help="A saved finetune.yaml to run again.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; 3 if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; 0.0002 if not given.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step; 8 if not given.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, constant, ...; linear if not given.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of warm-up; 0 if not given.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW weight decay; 0 if not given.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank r; 4 if not given.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; 32 if not given.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout; 0.1 if not given.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names of linear layers, or one regular expression; q_proj,v_proj if not given."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Transformer layers with an adapter: 26,27 or 26-29; all if not given.")
    ] = None,
    validation: Annotated[float | None, typer.Option(help="Share of rows held out; 0 if not given.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without improvement before stopping; 3 if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes initialisation, dropout and order; 0 if not given.")] = None,
    max_length: options.MaxLength = None,
    loss_on: Annotated[
        str | None, typer.Option(help="Tokens of the loss: response, last-turn or all; response if not given.")
    ] = None,
    chat_template: options.Template = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in --out.")] = False,
    prompt_column: options.PromptColumn = None,
    response_column: options.ResponseColumn = None,
    messages_column: options.MessagesColumn = None,
    label_column: options.LabelColumn = None,
    id_column: options.IdColumn = None,
    split: options.Split = None,
) -> None:
    """Fine-tune a LoRA adapter; checkpoints of every epoch are kept for later analyses.

    What is not given has the value that its line says, or that of --preset or --config.
    """
    given: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": parse_names(target_modules),
        "layers": parse_layers(layers),
        "validation": validation,
        "patience": patience,
        "seed": seed,
        "max_length": max_length,
        "loss_on": loss_on,
        "chat_template": chat_template,
    }
    with options.quiet_libraries():
        from finetrace.finetune_config import configure, refuse_schedule, saved_model
        from finetrace.finetuning import begun
        from finetrace.finetuning import finetune as run
        from finetrace.models import EMBEDDED, ModelSpec, load
        from finetrace.reading import read_examples

        settings = configure(preset, config, given)
        if patience is not None and not settings.validation:
            raise FinetraceError(
                f"--patience {patience}: only --validation heeds it; add that option, or leave this one out."
            )
        refuse_schedule(settings)
        begun(out, resume=resume)  # before a model is loaded for nothing
        if model is None:
            model = saved_model(config) if config is not None else EMBEDDED
        chosen = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        examples = read_examples(data, chosen, split=split)
        loaded = load(ModelSpec(model, None, options.dtype(dtype), device, trust_remote_code))
        options.say(
            f"fine-tuning {model} on {many(len(examples), 'example')} ({loaded.spec.dtype}, {loaded.spec.device})"
        )
        done = run(loaded, examples, out, settings, resume=resume, say=options.say)
    losses = [entry["loss"] for entry in done.log if "loss" in entry]
    typer.echo(f"adapter: {out}   training loss {losses[0]:.3f} -> {losses[-1]:.3f} in {many(len(losses), 'epoch')}")


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """The names of --target-modules, or the one regular expression."""
    if text is None:
        return None
    names = tuple(text.split(","))
    if not all(name.strip() for name in names):
        raise FinetraceError(
            f"--target-modules {text!r}: a name is empty; write names of linear layers, for instance q_proj,v_proj, or leave "
            "it out."
        )
    return names


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`26,27` or `26-29` as numbers."""
    if text is None:
        return None
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found = range(int(first), int(last or first) + 1)
            if not found:
                raise FinetraceError(f"--layers {text}: {part} names no layer; write the lower number first.")
            layers += found
    except ValueError as error:
        raise FinetraceError(f"--layers {text}: write numbers and ranges, for instance 0,1 or 26-29.") from error
    if not layers or any(layer < 0 for layer in layers):
        raise FinetraceError(f"--layers {text}: names no layer; write numbers and ranges, for instance 0,1 or 26-29.")
    return tuple(layers)
