"""The number and the place of the layers: those that are trained, and those that attribution looks at.

Fig. 8 of arXiv 2409.19998 trains adapters on 1, 2, 4, 8 and all layers, and asks how accurate each method is. Beside it stands
the other question: of one adapter on all layers, which layers' gradients and which layers' hidden states say most?
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from finetrace.atomic import write_atomically
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.run import Run
from finetrace.benchmark.runner import length
from finetrace.benchmark.stages import tuned_adapter
from finetrace.collection import Representation
from finetrace.fingerprint import of_text
from finetrace.index.factors import FORMAT
from finetrace.models import ModelSpec, load
from finetrace.studies.cells import SPECS, Plan, indexed, name_of, of_cell, run_of, scored, summary
from finetrace.studies.controls import control_line, controls, table
from finetrace.studies.pieces import Piece, Say
from finetrace.studies.plots import facets, line
from finetrace.studies.records import percent, settings, where
from finetrace.studies.study import Outcome, Setting, Study
from finetrace.units import many

PLAN = Plan({"mixed-small": 1.0, "grammars": 0.05, "mathqa": 0.05})
QUICK = Plan({"emotion": 0.05}, ("corrected",), epochs=1)
METRICS = ("accuracy", "coverage", "auprc")
LOOKS = {"gradient, cosine": "gradcos:layers={}", "gradient, product": "gradsim:layers={}"}
STATES = "hidden state (RepSim)"
ALL = "all"  # the last choice


def choices(depth: int, quick: bool) -> dict[str, tuple[int, ...]]:
    """Which layers carry an adapter, by name: `last 4`, `first 4`, `middle 4`, `all`."""
    every = tuple(range(depth))
    found = {}
    for count in (1,) if quick else (1, 2, 4, 8):
        if count < depth:
            found[f"last {count}"] = every[-count:]
    for place, start in (("middle", lambda count: (depth - count) // 2), ("first", lambda count: 0)):
        for count in (1,) if quick else (1, 4):
            if count < depth:
                found[f"{place} {count}"] = every[start(count) : start(count) + count]
    return {**found, ALL: every}


def in_order(names: Iterable[str]) -> list[str]:
    """Each choice once, in the order of `choices`, whichever the first task has."""
    places = ("last", "middle", "first", ALL)

    def key(name: str) -> tuple[int, int]:
        place, _, count = name.partition(" ")
        return places.index(place), int(count or 0)

    return sorted(set(names), key=key)


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """Fine-tune each choice on each cell, score each, and look at each layer of the last."""
    found = []
    for cell in (QUICK if setting.quick else PLAN).cells(setting):
        name = of_text(repr((cell, SPECS[cell.protocol], FORMAT)))
        place = folder / "parts" / f"{cell.task}-{cell.protocol}-{cell.seed}-{name}"
        last = (_kept(place, ALL),)
        find = partial(_cell, cell, place, setting.quick)
        found.append(Piece(cell.name, last, find, cell.seed, partial(length, cell)))
    return found


def outcome(setting: Setting, found: Sequence[pd.DataFrame]) -> Outcome:
    """Of the choices on each cell."""
    plan = QUICK if setting.quick else PLAN
    frame = pd.concat(found)
    words = controls(plan.cells(setting), frame)
    records = summary(frame, ("task", "protocol", "what", "trained", "layer", "spec"), METRICS)
    trained = [r for r in records if r["what"] == "trained"]
    looks = [r for r in records if r["what"] != "trained"]
    return Outcome(
        [*records, *words],
        {f"layers-{name}": _table(trained, name) for name in METRICS}
        | {"layers-looked-at": _best(looks), "controls": table(words)},
        {f"layers-{name}": _trained(trained, name, words) for name in METRICS[:2]}
        | ({"layers-looked-at": _looked(looks)} if looks else {}),  # none where no model with all layers complied yet
        [*_reading(trained, looks), *plan.left_out()],
        {"sizes": plan.sizes},
    )


def _cell(cell: Cell, place: Path, quick: bool, say: Say) -> pd.DataFrame | None:
    """Every choice of layers; `None` where no model of theirs complies with anything."""
    made, frames = run_of(cell, place), []
    base = ModelSpec(made.base, None, cell.dtype, cell.device)
    depth = int(load(base).model.config.num_hidden_layers)
    for name, layers in choices(depth, quick).items():
        kept = _kept(place, name)
        if not kept.exists():
            say(f"{made.name}: an adapter on {name} of {depth} layers")
            work = place / name.replace(" ", "-")
            config = made.finetuning().model_copy(update={"layers": None if name == ALL else layers})
            tuned_adapter(work / "adapter", base, made.task.train, config)
            tuned = load(ModelSpec(made.base, str(work / "adapter"), cell.dtype, cell.device))
            queries = made.queries_of(lambda tuned=tuned: tuned, work)  # type: ignore[misc]
            frame = _scores(made, tuned, queries, work, name, depth) if queries else pd.DataFrame()
            frame = of_cell(frame, cell).assign(trained=name)
            write_atomically(kept, frame.to_parquet(index=False))
            shutil.rmtree(work)
        frame = pd.read_parquet(kept)
        if len(frame):
            frames.append(frame)
    return pd.concat(frames) if frames else None


def _kept(place: Path, name: str) -> Path:
    """The file of a choice."""
    return place / f"{name.replace(' ', '-')}.parquet"


def _scores(made: Run, tuned: Any, queries: Sequence[Any], work: Path, name: str, depth: int) -> pd.DataFrame:
    """Every method; for the adapter on all layers, every layer by itself too. `layer` counts from 1, -1 for all."""
    specs = SPECS[made.cell.protocol]
    states = [Representation(layer) for layer in (range(1, depth + 1) if name == ALL else (-1,))]
    found = indexed(made, tuned, queries, work / "scored", specs, [each.resolve(depth) for each in states])
    frames = [scored(found, specs).assign(what="trained", layer=-1)]
    for layer in range(1, depth + 1) if name == ALL else ():
        for look, spec in LOOKS.items():
            frames.append(scored(found, [spec.format(layer - 1)]).assign(what=look, layer=layer, spec=look))
        frames.append(scored(found, [f"repsim:layer={layer}"]).assign(what=STATES, layer=layer, spec=STATES))
    return pd.concat(frames)


def _table(records: Sequence[dict[str, Any]], metric: str) -> tuple[list[str], list[list[str]]]:
    """A metric in % with its interval, methods x choices of layers."""
    names = in_order(r["trained"] for r in records)
    heads = ["task", "protocol", "method", *names]
    lines = []
    for task, protocol, spec in dict.fromkeys((r["task"], r["protocol"], r["spec"]) for r in records):
        here = {r["trained"]: r for r in where(records, task=task, protocol=protocol, spec=spec)}
        cells = [percent(here[n], metric) if n in here else "-" for n in names]
        lines.append([task, protocol, name_of(spec), *cells])
    return heads, lines


def _best(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = [
        "task",
        "protocol",
        "what is looked at",
        "best layer",
        "AUPRC there, %",
        "of the last layer",
        "median of layers",
    ]
    lines = []
    for task, protocol, what in dict.fromkeys((r["task"], r["protocol"], r["what"]) for r in records):
        here = where(records, task=task, protocol=protocol, what=what)
        (best, layer), last = _highest(here), max(here, key=lambda r: r["layer"])
        middle = median(r["auprc"] for r in here)
        cells = [percent(best, "auprc"), percent(last, "auprc"), f"{100 * middle:.0f}"]
        lines.append([task, protocol, what, layer, *cells])
    return heads, lines


def _highest(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The first layer with the best AUPRC, and its number with how many others have the same."""
    best = max(records, key=lambda r: r["auprc"])
    alike = sum(r["auprc"] == best["auprc"] for r in records) - 1
    return best, str(best["layer"]) + (f" and {many(alike, 'other')}" if alike else "")


def _trained(records: Sequence[dict[str, Any]], metric: str, words: Sequence[dict[str, Any]]) -> Any:
    """A metric over the choice of trained layers, a panel a task and protocol."""
    names = in_order(r["trained"] for r in records)
    places = {spec: place for place, spec in enumerate(dict.fromkeys(r["spec"] for r in records))}

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for spec in dict.fromkeys(r["spec"] for r in here):
            found = {names.index(r["trained"]): r for r in where(here, spec=spec)}
            for place in dict.fromkeys(name.split()[0] for name in names):  # no line from one place to the next
                x = [k for k, name in enumerate(names) if name.split()[0] == place and k in found]
                line(axis, places[spec], x, [found[k] for k in x], metric, name_of(spec), 100)
        control_line(axis, words, here[0]["task"], here[0]["protocol"], metric)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")

    return facets(records, draw, "layers with an adapter", f"{metric}, %", height=2.6)


def _looked(records: Sequence[dict[str, Any]]) -> Any:
    """AUPRC by each layer alone, of an adapter on all layers."""

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        for place, what in enumerate(dict.fromkeys(r["what"] for r in here)):
            found = sorted(where(here, what=what), key=lambda r: r["layer"])
            line(axis, place, [r["layer"] for r in found], found, "auprc", what, side_by_side=len(LOOKS) + 1)

    return facets(records, draw, "layer", "AUPRC")


def _reading(trained: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for task, protocol in settings(looks):
        parts = []
        for what in dict.fromkeys(r["what"] for r in looks):
            here = where(looks, task=task, protocol=protocol, what=what)
            best, layer = _highest(here)
            parts.append(f"{what}: layer {layer} ({best['auprc']:.2f})")
        whole = where(trained, task=task, protocol=protocol, spec="gradcos", trained=ALL)[0]
        lines.append(
            f"{task}, {protocol}: the single layer with the best AUPRC, picked on the same queries, is by {'; '.join(parts)}; "
            f"the cosine over all layers has {whole['auprc']:.2f}."
        )
    return lines


LAYERS = Study(
    "layers",
    "Fig. 8",
    "the number and the place of the trained layers, and what each layer by itself says",
    60,
    1,
    pieces,
    outcome,
)
