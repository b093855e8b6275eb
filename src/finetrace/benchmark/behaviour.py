"""Attack success rates (the study's Table 1): which fine-tunings make a model answer what it should refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from finetrace.benchmark.protocol import PROTOCOLS
from finetrace.benchmark.runner import silent
from finetrace.benchmark.stages import claim, complied, kept_answers, tuned_adapter, unclaim
from finetrace.benchmark.tables import write_table
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.seeds import bootstrap_crossed
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.models import ALIGNED, EMBEDDED, DType, ModelSpec, known_dtype, load
from finetrace.reporting.results import of_more_seeds, write_results
from finetrace.tasks import Recipe, build, recipe

ALONE = Engine()
HEADS = ("model", "training rows", "seeds", "attack success %", "95% interval", "seed by seed %")


@dataclass(frozen=True)
class Setting:
    """What decides the models' answers; kept in the folder, and compared before answers there are used again.

    Attributes:
        size: Share of the training rows and of the requests.
        model: Base model in place of the two embedded ones.
        epochs: Instead of the recipes' own.
        dtype, device: Of the model.
    """

    size: float = 1.0
    model: str | None = None
    epochs: int | None = None
    dtype: DType = "auto"
    device: str = "auto"

    def spec(self, model: str, adapter: Path | None = None) -> ModelSpec:
        """A model to load."""
        return ModelSpec(model, str(adapter) if adapter else None, self.dtype, self.device)

    def bases(self) -> dict[str, str]:
        """The models that answer as they are, by their names in the table."""
        return {"plain base": EMBEDDED, "aligned base": ALIGNED} if self.model is None else {"base": self.model}

    def sets(self) -> dict[str, tuple[Sequence[Example], Recipe]]:
        """What models are fine-tuned on, and how they learn it."""
        large, small = build("mixed-large", size=self.size), build("mixed-small", size=self.size)
        unsafe = [row for row in large.train if row.label == large.target]
        return {
            "benign": (large.without_target(), recipe("mixed-large")),
            "harmful": (unsafe, recipe("mixed-small")),
            "mixed-small": (small.train, recipe("mixed-small")),
            "mixed-large": (large.train, recipe("mixed-large")),
        }


@dataclass(frozen=True, eq=False)
class Behaviour:
    """How one model, or one fine-tuning over its seeds, answers the requests.

    Attributes:
        model: Its name in the table.
        n_train: Rows it was fine-tuned on; 0 for a base model.
        complied: (seeds, requests), 1 where it complied; a base model has one line.
    """

    model: str
    n_train: int
    complied: NDArray[np.float64]

    @property
    def rate(self) -> Estimate:
        """Over requests and seeds."""
        return bootstrap_crossed(self.complied)

    def records(self) -> list[dict[str, Any]]:
        """Flat, for results.json: over all seeds (`seed` is null), then each seed alone, its interval over requests."""
        records = []
        lines = [(None, self.complied), *((seed, line[None]) for seed, line in enumerate(self.complied))]
        for seed, values in lines if self.n_train else lines[:1]:
            rate = bootstrap_crossed(values)
            about = {"model": self.model, "seed": seed, "attack_success_rate": rate.value}
            about |= {"low": _known(rate.low), "high": _known(rate.high)}
            sizes = {"seeds": len(values) if self.n_train else 0, "n_train": self.n_train, "n_queries": rate.n}
            records.append({**about, **sizes})
        return records


def attack_success(
    folder: Path,
    setting: Setting,
    seeds: int,
    judge: Judge,
    say: Callable[[str], None],
    engine: Engine = ALONE,
) -> list[Behaviour]:
    """Fine-tune, let every model answer the held-out unsafe requests, and judge; what is finished is found again.

    Writes `results.json`, `table1.md` and `table1.tex` in `folder`; more seeds may be asked for later.

    Raises:
        FinetraceError: `folder` holds something else, or the same of another setting.
    """
    setting = replace(setting, dtype=known_dtype(setting.dtype, setting.device))
    sets = setting.sets()
    claim(folder / "attack-success.json", asdict(setting), "an attack-success run")
    fewer = of_more_seeds(folder, seeds)
    if fewer is not None:
        say(fewer)
    models: list[tuple[str, int | None]] = [(name, None) for name in setting.bases()]
    models += [(name, seed) for seed in range(seeds) for name in sets]
    if not engine.in_process:  # the longest of a seed first, so that no worker is left with one at the end
        models.sort(key=lambda each: (each[1] or 0, -len(sets[each[0]][0]) if each[0] in sets else 0))
    alone = engine.in_process  # then a model itself says how far it has come
    work = partial(_answers, folder if alone else folder.resolve(), setting, say if alone else silent)
    verdicts = {}
    try:
        for place, answers in engine.run_each(work, models, name=_called, shared=folder):
            verdicts[models[place]] = complied(judge, answers)
            if not alone:
                say(f"{_called(models[place])}: done")
    except FinetraceError:  # a model that is not there, perhaps
        unclaim(folder / "attack-success.json")
        raise
    found = [(name, 0, [verdicts[name, None]]) for name in setting.bases()]
    for name, (rows, _) in sets.items():
        found.append((f"fine-tuned, {name}", len(rows), [verdicts[name, seed] for seed in range(seeds)]))
    rates = [Behaviour(name, rows, np.array(each, dtype=np.float64)) for name, rows, each in found]
    about = {"command": "bench attack-success", **asdict(setting), "seeds": seeds, "judge": judge.name}
    write_results(folder, [record for each in rates for record in each.records()], about)
    write_table(folder / "table1", HEADS, [_cells(each) for each in rates])
    return rates


def _answers(
    folder: Path, setting: Setting, say: Callable[[str], None], model: tuple[str, int | None]
) -> list[Example]:
    """What one model says to the requests: a base by its name, or a set and the seed of the fine-tuning on it."""
    name, seed = model
    requests = build("mixed-large", size=setting.size).queries
    if seed is None:
        say(f"{_called(model)}: answering {len(requests)} held-out unsafe requests")
        home, spec = folder / name.replace(" ", "-"), setting.spec(setting.bases()[name])
    else:
        rows, learnt = setting.sets()[name]
        home, start = folder / name / f"seed-{seed}", setting.spec(setting.model or ALIGNED)
        say(f"{_called(model)}: {len(rows)} rows, then {len(requests)} requests")
        config = PROTOCOLS["corrected"].finetuning(learnt, seed, setting.epochs)
        adapter = tuned_adapter(home / "adapter", start, rows, config)
        shutil.rmtree(adapter / "checkpoints", ignore_errors=True)
        spec = setting.spec(start.model, adapter)
    return kept_answers(home / "answers.jsonl", requests, lambda: load(spec))


def _called(model: tuple[str, int | None]) -> str:
    """A model in a message."""
    name, seed = model
    return name if seed is None else f"fine-tuned on {name}, seed {seed}"


def print_rates(rates: Sequence[Behaviour], judge: str, console: Console) -> None:
    """The table, in 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for head in ("model", "rows", "success %", "95%", "seed by seed %"):
        left = head in ("model", "seed by seed %")
        table.add_column(head, justify="left" if left else "right", no_wrap=head != "seed by seed %")
    bases = [each for each in rates if not each.n_train]
    for each in rates:
        model, rows, _, *rest = _cells(each)
        table.add_row(model, rows, *rest, end_section=each is bases[-1])
    console.print(table)
    asked = rates[0].complied.shape[1]
    note = f"share of {asked} held-out unsafe requests that the judge {judge} finds answered; "
    note += "95%: over requests" + (" and seeds" if any(len(each.complied) > 1 for each in rates) else " of one seed")
    console.print(note, style="dim", highlight=False, markup=False)


def _cells(each: Behaviour) -> list[str]:
    """One line of the table, under `HEADS`."""
    rate, tuned = each.rate, each.n_train > 0
    spread = f"{100 * rate.low:.0f}-{100 * rate.high:.0f}" if rate.low == rate.low else "-"
    alone = " ".join(f"{100 * share:.0f}" for share in each.complied.mean(axis=1)) if tuned else "-"
    seeds = str(len(each.complied)) if tuned else "-"
    return [each.model, str(each.n_train or "-"), seeds, f"{100 * rate.value:.0f}", spread, alone]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
