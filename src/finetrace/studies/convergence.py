"""Every method at every epoch of the fine-tuning, with losses and gradient norms (Fig. 5 of arXiv 2409.19998)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from finetrace.atomic import write_atomically
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.runner import length
from finetrace.benchmark.stages import tuned_adapter
from finetrace.fingerprint import of_text
from finetrace.index.factors import FORMAT
from finetrace.models import ModelSpec, load
from finetrace.studies.cells import SPECS, Plan, indexed, name_of, of_cell, run_of, scored, summary
from finetrace.studies.controls import control_line, controls, table
from finetrace.studies.pieces import Piece, Say
from finetrace.studies.plots import facets, line, logarithmic, whole
from finetrace.studies.records import percent, settings, where
from finetrace.studies.study import Outcome, Setting, Study

PLAN = Plan({"mixed-small": 1.0, "grammars": 0.05, "mathqa": 0.05, "backdoor-1": 0.05}, epochs=8)  # paper: its own
QUICK = Plan({"emotion": 0.05}, ("corrected",), epochs=2)
LOSSES = {"train_loss": "training rows", "query_loss": "queries, held out"}
STATE = (*LOSSES, "gradient_norm")
METRICS = ("accuracy", "coverage", "auprc")
WHOLE = "epochs.parquet"  # beside a file an epoch


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Fine-tune each cell with a checkpoint an epoch, then index and score each of these."""
    found = []
    for cell in (QUICK if setting.quick else PLAN).cells(setting):
        name = of_text(repr((cell, SPECS[cell.protocol], "from epoch 0", FORMAT)))
        place = folder / "parts" / f"{cell.task}-{cell.protocol}-{cell.seed}-{name}"
        kept = (place / WHOLE,)
        found.append(Piece(cell.name, kept, partial(_cell, cell, place), cell.seed, partial(length, cell)))
    return found


def _cell(cell: Cell, place: Path, say: Say) -> pd.DataFrame | None:
    """What a cell's epochs give, in one file; `None` where its model complies with nothing."""
    if not (place / WHOLE).exists():
        frame = _epochs(place, run_of(cell, place / "run"), say)
        if frame is None:
            return None
        write_atomically(place / WHOLE, of_cell(frame, cell).to_parquet(index=False))
        shutil.rmtree(place / "run", ignore_errors=True)
    return pd.read_parquet(place / WHOLE)


def outcome(setting: Setting, found: Sequence[pd.DataFrame]) -> Outcome:
    """Of each cell's epochs."""
    plan = QUICK if setting.quick else PLAN
    frame = pd.concat(found)
    words = controls(plan.cells(setting), frame)
    records = summary(frame, ("task", "protocol", "spec", "epoch"), METRICS, STATE)
    return Outcome(
        [*records, *words],
        {f"convergence-{name}": _table(records, name) for name in METRICS} | {"controls": table(words)},
        {f"convergence-{name}": _figure(records, name, words) for name in METRICS}
        | {
            "losses": _state(records, LOSSES, "loss, nats a token"),
            "gradient-norms": _state(
                records, {"gradient_norm": "training rows"}, "mean L2 norm of gradients,\nnats per unit of weight"
            ),
        },
        [*_reading(records), *plan.left_out()],
        {"sizes": plan.sizes, "epochs": plan.epochs},
    )


def _epochs(place: Path, made: Any, say: Say) -> pd.DataFrame | None:
    """Of one fine-tuning: values query by query, a frame an epoch; queries keep the answers of the last epoch's model.

    Epoch 0 is the start of the fine-tuning: the last adapter with its B at zero.
    """
    cell = made.cell
    base = ModelSpec(made.base, None, cell.dtype, cell.device)
    say(f"{made.name}: fine-tuning on {len(made.task.train)} rows, a checkpoint an epoch")
    made.claim_folder()
    adapter = tuned_adapter(made.folder / "adapter", base, made.task.train, made.finetuning())
    queries = made.queries()
    if not queries:
        return None
    checkpoints = sorted((adapter / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    frames = []
    for epoch, checkpoint in enumerate([adapter, *checkpoints]):
        kept = place / f"epoch-{epoch}.parquet"
        if not kept.exists():
            say(f"{made.name}: epoch {epoch} of {len(checkpoints)}")
            tuned = load(ModelSpec(made.base, str(checkpoint), cell.dtype, cell.device))
            specs = SPECS[cell.protocol]
            found = indexed(made, tuned, queries, place / "work", specs, at="end" if epoch else "start")
            frame = scored(found, specs).assign(
                epoch=epoch,
                train_loss=float(found.problem.index.losses.mean()),
                query_loss=float(found.problem.features.losses.mean()),
                gradient_norm=float(found.problem.train_norms.mean()),
            )
            write_atomically(kept, frame.to_parquet(index=False))
            shutil.rmtree(place / "work")
        frames.append(pd.read_parquet(kept))
    return pd.concat(frames)


def _table(records: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """A metric in % with its interval, methods x epochs."""
    epochs = sorted({r["epoch"] for r in records})
    heads = ["task", "protocol", "method", *(f"epoch {epoch}" for epoch in epochs)]
    lines = []
    for task, protocol, spec in dict.fromkeys((r["task"], r["protocol"], r["spec"]) for r in records):
        found = {r["epoch"]: r for r in where(records, task=task, protocol=protocol, spec=spec)}
        cells = [percent(found[e], metric) if e in found else "-" for e in epochs]
        lines.append([task, protocol, name_of(spec), *cells])
    return heads, lines


def _figure(records: Sequence[dict[str, Any]], metric: str, words: Sequence[dict[str, Any]]) -> Any:
    """A metric over epochs, a panel a task and protocol; a method looks the same in all of them."""
    places = {spec: place for place, spec in enumerate(dict.fromkeys(r["spec"] for r in records))}

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for spec in dict.fromkeys(r["spec"] for r in here):
            found = sorted(where(here, spec=spec), key=lambda r: r["epoch"])
            line(axis, places[spec], [r["epoch"] for r in found], found, metric, name_of(spec), 100)
        control_line(axis, words, here[0]["task"], here[0]["protocol"], metric)
        whole(axis)

    return facets(records, draw, "epoch", f"{metric if metric != 'auprc' else 'AUPRC'}, %")


def _state(records: Sequence[dict[str, Any]], names: dict[str, str], head: str) -> Any:
    """Losses, or the mean norm of the training gradients, over epochs.

    The loss is that of the protocol: of the response, or of all 128 positions. Queries of a mixed set have no answer but
    the one that the model of the last epoch gives.
    """

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        found = sorted(where(here, spec=here[0]["spec"]), key=lambda r: r["epoch"])
        for place, (name, words) in enumerate(names.items()):
            mixed = name == "query_loss" and here[0]["task"].startswith("mixed")
            label = "the last epoch's own answers" if mixed else words
            line(axis, 3 * place + mixed, [r["epoch"] for r in found], found, name, label, apart=False)
        logarithmic(axis)
        whole(axis)

    return facets(records, draw, "epoch", head)


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in settings(records):
        here = where(records, task=task, protocol=protocol)
        curves = {spec: {r["epoch"]: r for r in where(here, spec=spec)} for spec in SPECS[protocol]}
        first, last = min(curves["gradsim"]), max(curves["gradsim"])
        losses = [curves["gradsim"][epoch]["train_loss"] for epoch in (first, last)]
        moves = [
            f"of {name_of(spec)} from {100 * curve[first]['coverage']:.0f} to {100 * curve[last]['coverage']:.0f}%"
            for spec, curve in curves.items()
        ]
        lines.append(
            f"{task}, {protocol}: from epoch {first} to {last} the training loss goes from {losses[0]:.2f} to {losses[1]:.2f} "
            f"nats and coverage {', '.join(moves)}."
        )
    return lines


CONVERGENCE = Study(
    "convergence",
    "Fig. 5",
    "accuracy of every method at every epoch of the fine-tuning, with losses and norms",
    35,
    1,
    pieces,
    outcome,
)
