"""`finetrace validate`: does removing what a method names change the model? Retraining says."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetrace.cli import options
from finetrace.errors import FinetraceError
from finetrace.reporting.cells import printable

if TYPE_CHECKING:
    from finetrace.finetune_config import FinetuneConfig
    from finetrace.index.store import Index


def validate(
    index: Annotated[Path, typer.Option(help="Folder of the index.")],
    queries: Annotated[str, typer.Option(help="A file or data set of queries, each with the response that is traced.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method, NAME or NAME:parameter=value,...; may repeat; the first is what others are held against."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="lds, drop, tail-patch or loo; may repeat; all but loo if not given.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few methods and subsets, one seed and no removals: a first look.")
    ] = False,
    subsets: Annotated[int | None, typer.Option(min=3, help="Random subsets of the rows, for lds; 30, or 6.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Of the rows that each subset has, for lds; 0.5 if not given.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Fine-tunings of each subset and removal; 2, or 1 with --quick.")
    ] = None,
    remove: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows to remove, for drop; may repeat; a tenth and a quarter if not given."),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Classes of queries to remove rows for, at most; 3 if not given.")
    ] = None,
    left_out: Annotated[
        int | None, typer.Option(min=3, help="Rows left out singly, at most, for loo; 40 if not given.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="For drop, count answers too: refusal-prefix (those that comply) or a text-classification model."
        ),
    ] = None,
    judge_label: Annotated[str | None, typer.Option(help="The judge's label of an answer that counts.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The finetune.yaml of the adapter; found in the index or in --adapter if not given."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter's own folder, where how it was trained is looked for.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that stopped goes on there.")] = Path(
        "validation"
    ),
    workers: options.Workers = None,
    engine: options.EngineOption = None,
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
    """Retrain on random subsets and without the rows that methods name, and say which method to believe."""
    from rich.console import Console

    with options.quiet_libraries():
        from finetrace.benchmark.stages import claim, unclaim
        from finetrace.evaluation.judging import make_judge
        from finetrace.fingerprint import of_examples
        from finetrace.index import open_index
        from finetrace.placement import refuse_retraining
        from finetrace.reading import read_examples
        from finetrace.reporting.results import write_results
        from finetrace.reporting.validated import NAME, keep_verdict, replaced
        from finetrace.validation.plan import QUICK, RETRAINED, Validation, basis, usual
        from finetrace.validation.run import validate as run
        from finetrace.validation.tables import print_validation, write_validation

        chosen_engine = options.engine(engine, workers, address, gpus_per_task)
        retrained = bool(RETRAINED & set(measure or (QUICK if quick else Validation()).measures))
        if retrained:
            refuse_retraining(device_map)
        opened = open_index(index)
        columns = options.columns(prompt_column, response_column, messages_column, label_column, id_column)
        asked = read_examples(queries, columns, split=split)
        finetuning = finetuning_of(opened, config, adapter, retrained=retrained)
        plan = QUICK if quick else Validation()
        plan = replace(plan, methods=usual(plan.methods, opened))
        given = {
            "methods": tuple(method) if method else None,
            "measures": tuple(measure) if measure else None,
            "subsets": subsets,
            "counts": tuple(remove) if remove else None,
            "groups": groups,
            "seeds": seeds,
            "share": share,
            "left_out": left_out,
        }
        plan = replace(plan, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        heeded = {"--subsets": (subsets, "lds"), "--share": (share, "lds"), "--left-out": (left_out, "loo")}
        _refuse_idle(heeded | {"--remove": (remove, "drop"), "--groups": (groups, "drop")}, plan.measures)
        if not retrained:
            idle = {"--seeds": seeds, "--workers": workers, "--engine": engine}
            options.refuse_given(idle, f"{' and '.join(plan.measures)} retrains nothing; add a measure that does")
        judged_by = make_judge(judge, judge_label)
        if judge is not None and "drop" not in plan.measures:
            raise FinetraceError(
                f"--judge {judge}: it counts answers after removals; add --measure drop, or leave it out."
            )
        opened.model(None, device, trust_remote_code, device_map)
        about: dict[str, object] = {
            "finetuning": finetuning.model_dump(mode="json"),
            "queries": [each.id for each in asked],
            "texts": of_examples(asked),
        }
        judging = {"judge": judged_by.name if judge is not None else None, "judge_label": judge_label}
        about |= {"index": opened.manifest.data_fingerprint, "adapter": opened.manifest.model.adapter_fingerprint}
        counting, claimed = judged_by if judge is not None else None, out / "validation.json"

        def begin() -> None:
            claim(claimed, about, "a validation")  # methods may join: what was retrained is found again
            if (less := replaced(out, plan)) is not None:
                options.say(less)

        try:
            found = run(opened, asked, plan, finetuning, out, options.say, device, counting, chosen_engine, begin)
        except FinetraceError:  # a method that the index has nothing for, perhaps
            if claimed.is_file():
                unclaim(claimed)
            raise
        write_results(out, found.records, {**about, **asdict(plan), **judging, "verdict": found.verdict})
        write_validation(found.records, out)
        command = shlex.join(["finetrace", *sys.argv[1:]])
        stronger = keep_verdict(index, found.verdict, command, basis(plan, len(opened)))
    console = Console()
    for sentence in found.verdict:
        console.print(f"- {printable(sentence)}", markup=False, highlight=False)
    print_validation(found.records, console)
    console.print(f"results: {out / 'results.json'}   tables and figures: {out}", highlight=False, markup=False)
    shown = (
        f"report pages of {index} now show this verdict"
        if stronger is None
        else f"report pages of {index} go on showing the verdict of more retrainings ({stronger}); remove "
        f"{index / NAME} and validate again to show this one"
    )
    console.print(shown, highlight=False, markup=False)


def _refuse_idle(given: Mapping[str, tuple[object, str]], measures: Sequence[str]) -> None:
    """Stop where an option was given that only a measure heeds that is not asked for."""
    for option, (value, measure) in given.items():
        if value not in (None, []) and measure not in measures:
            raise FinetraceError(
                f"{option}: only --measure {measure} heeds it; add that measure, or leave the option out."
            )


def finetuning_of(index: Index, config: Path | None, adapter: Path | None, *, retrained: bool = True) -> FinetuneConfig:
    """How the index's adapter was fine-tuned: as told, or as found beside it.

    Where it is to be `retrained`, a model without an adapter, or with one of another kind than plain LoRA, is refused.
    """
    from finetrace.finetune_config import SAVED, configure, found_config
    from finetrace.index.manifest import inside
    from finetrace.index_encoding import as_indexed, with_template
    from finetrace.lora_variants import refuse_variant
    from finetrace.validation.plan import refuse_unadapted

    if config is not None and adapter is not None:
        raise FinetraceError(f"--adapter {adapter}: --config says how it was fine-tuned; leave one of them out.")
    if retrained:
        refuse_unadapted(index)
        refuse_variant(inside(index.folder, str(index.manifest.model.adapter)))
    if retrained and adapter is not None:
        refuse_variant(adapter)

    def said(found: FinetuneConfig, source: Path) -> FinetuneConfig:
        found, note = with_template(found, index.manifest.encoding, source)
        if note:
            options.say(note)
        return found

    if config is not None:
        return said(configure("default", options.existing(config, "--config"), {}), config)
    if adapter is not None:
        folder = options.existing(adapter, "--adapter")
        where = str(adapter)
    else:
        folder = inside(index.folder, index.manifest.model.adapter or "adapter")
        where = f"{index.folder} (indexes built before fine-tunings were kept have none)"
    found = found_config(folder, options.say)
    if found is None:
        raise FinetraceError(
            f"{where}: nothing says how the adapter was fine-tuned; give its finetune.yaml with --config, or the folder that "
            "the Trainer wrote with --adapter."
        )
    if (folder / SAVED).exists():
        found = said(found, folder / SAVED)
    else:
        found, encoded = as_indexed(found, index.manifest.encoding)
        options.say(
            f"by what the Trainer left, the adapter was fine-tuned for {found.epochs} epochs in batches of {found.batch_size} "
            f"with a {found.schedule} learning rate from {found.learning_rate:.3g}; it does not say how rows were encoded, so "
            f"retrainings encode them as the index does ({encoded}); if that is not so, give a finetune.yaml with --config"
        )
    if found.validation:
        options.say(
            f"the fine-tuning held out {found.validation:.0%} of its rows and could stop early by their loss; retrainings take "
            f"all of their rows through all {found.epochs} epochs; if it stopped before, give a finetune.yaml of fewer epochs "
            "without validation with --config"
        )
    return found
