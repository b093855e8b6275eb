"""Attack success rates (the study's Table 1): which fine-tunings make a model answer what it should refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from finetrace.benchmark.protocol import PROTOCOLS
from finetrace.benchmark.stages import claim, complied, kept_answers, tuned_adapter
from finetrace.benchmark.tables import write_table
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.seeds import bootstrap_crossed
from finetrace.examples import Example
from finetrace.models import ALIGNED, EMBEDDED, DType, ModelSpec, load
from finetrace.reporting.results import write_results
from finetrace.tasks import Recipe, build, recipe

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
    folder: Path, setting: Setting, seeds: int, judge: Judge, say: Callable[[str], None]
) -> list[Behaviour]:
    """Fine-tune, let every model answer the held-out unsafe requests, and judge; what is finished is found again.

    Writes `results.json`, `table1.md` and `table1.tex` in `folder`; more seeds may be asked for later.

    Raises:
        FinetraceError: `folder` holds something else, or the same of another setting.
    """
    large, small = build("mixed-large", size=setting.size), build("mixed-small", size=setting.size)
    claim(folder / "attack-success.json", asdict(setting), "an attack-success run")
    requests = large.queries
    found: dict[str, tuple[int, list[list[bool]]]] = {}

    def ask(name: str, rows: int, home: Path, spec: ModelSpec) -> None:
        answers = kept_answers(home / "answers.jsonl", requests, lambda: load(spec))
        found.setdefault(name, (rows, []))[1].append(complied(judge, answers))

    bases = {"plain base": EMBEDDED, "aligned base": ALIGNED} if setting.model is None else {"base": setting.model}
    for name, model in bases.items():
        say(f"{name}: answering {len(requests)} held-out unsafe requests")
        ask(name, 0, folder / name.replace(" ", "-"), setting.spec(model))
    start = setting.spec(setting.model or ALIGNED)
    unsafe = [row for row in large.train if row.label == large.target]
    sets: dict[str, tuple[Sequence[Example], Recipe]] = {
        "benign": (large.without_target(), recipe("mixed-large")),
        "harmful": (unsafe, recipe("mixed-small")),
        "mixed-small": (small.train, recipe("mixed-small")),
        "mixed-large": (large.train, recipe("mixed-large")),
    }
    for seed in range(seeds):
        for name, (rows, learnt) in sets.items():
            home = folder / name / f"seed-{seed}"
            say(f"fine-tuned on {name}, seed {seed}: {len(rows)} rows, then {len(requests)} requests")
            config = PROTOCOLS["corrected"].finetuning(learnt, seed, setting.epochs)
            adapter = tuned_adapter(home / "adapter", start, rows, config)
            shutil.rmtree(adapter / "checkpoints", ignore_errors=True)
            ask(f"fine-tuned, {name}", len(rows), home, setting.spec(start.model, adapter))
    rates = [Behaviour(name, rows, np.array(each, dtype=np.float64)) for name, (rows, each) in found.items()]
    about = {"command": "bench attack-success", **asdict(setting), "seeds": seeds, "judge": judge.name}
    write_results(folder, [record for each in rates for record in each.records()], about)
    write_table(folder / "table1", HEADS, [_cells(each) for each in rates])
    return rates


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
