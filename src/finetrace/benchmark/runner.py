"""Many cells, one after another or side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from finetrace.benchmark.cell import Cell
from finetrace.benchmark.finished import finished, refuse_mixed, refuse_other
from finetrace.benchmark.protocol import protocol
from finetrace.benchmark.run import Run
from finetrace.evaluation.judging import make_judge
from finetrace.execution import Engine
from finetrace.models import DType, known_dtype
from finetrace.tasks import RealData, Recipe, Task, build, external, real_task, recipe


@dataclass(frozen=True)
class Source:
    """An external labelled set in place of a task that ships.

    Attributes:
        data: File, folder or Hub id.
        label_column, prompt_column, response_column, split, id_column: As `tasks.external` takes them.
        epochs, learning_rate: Of the fine-tuning.
    """

    data: str
    label_column: str
    prompt_column: str | None = None
    response_column: str | None = None
    epochs: int = 5
    learning_rate: float = 1e-3
    split: str | None = None
    id_column: str | None = None

    def task(self, seed: int, size: float) -> Task:
        """The set as a task."""
        columns = (self.label_column, self.prompt_column, self.response_column)
        made = external(self.data, *columns, seed=seed, source_split=self.split, id_column=self.id_column)
        return made.shrunk(size)

    def recipe(self) -> Recipe:
        """How the embedded model learns it."""
        return Recipe(lambda seed: self.task(seed, 1.0), "an external labelled set", self.epochs, self.learning_rate)


@dataclass(frozen=True)
class Plan:
    """What to run, and how.

    Attributes:
        cells: One a task, protocol and seed.
        judge: Model or `None` for refusal phrases; its harmful label.
        source: An external set that every cell takes its rows from, or `None`.
        real: Real rows for the tasks by their names, or `None`.
        keep: Keep the indexes, which take the most disk.
        workers: Processes, each with its share of the cores, or an engine.
    """

    cells: tuple[Cell, ...]
    judge: tuple[str | None, str | None] = (None, None)
    source: Source | None = None
    keep: bool = False
    workers: int | Engine = 1
    real: RealData | None = None


def run_all(folder: Path, plan: Plan, say: Callable[[str], None]) -> None:
    """Bring every cell to its end; a finished one is found again.

    Raises:
        FinetraceError: The folder holds another command's results, or the same tasks' seeds under other settings.
    """
    refuse_other(folder)
    refuse_mixed(folder, [*finished(folder), *plan.cells])
    engine = Engine.of(plan.workers)
    if len(plan.cells) == 1 and not isinstance(plan.workers, Engine):
        engine = Engine()
    alone = engine.in_process  # then the cell itself says how far it has come
    work = partial(_run, folder if alone else folder.resolve(), plan, say if alone else silent)
    # side by side the longest of a seed come first, so that no worker is left with one at the end
    order = (
        plan.cells if alone else sorted(plan.cells, key=lambda cell: (cell.seed, -length(cell, plan.source, plan.real)))
    )
    for place, _ in engine.run_each(work, order, name=attrgetter("name"), shared=folder):
        if not alone:
            say(f"{order[place].name}: done")


def task_of(cell: Cell, source: Source | None, real: RealData | None = None) -> tuple[Task, Recipe]:
    """The rows of a cell, and how they are learnt."""
    if source is not None:
        return source.task(cell.task_seed, cell.size), source.recipe()
    if real is not None:
        return real_task(cell.task, real, cell.task_seed, cell.size), recipe(cell.task)
    return build(cell.task, size=cell.size, seed=cell.task_seed), recipe(cell.task)


def cells(
    tasks: Sequence[str],
    protocols: Sequence[str],
    seeds: int,
    *,
    methods: Sequence[str] = (),
    size: float = 1.0,
    task_seed: int = 0,
    model: str | None = None,
    epochs: int | None = None,
    dtype: DType = "auto",
    device: str = "auto",
    chat_template: str | None = None,
    target_modules: Sequence[str] = (),
    modules: Sequence[str] = (),
) -> tuple[Cell, ...]:
    """Tasks x protocols x seeds; the protocol's own methods unless others are given. All first seeds come first."""
    precision = known_dtype(dtype, device)
    return tuple(
        Cell(
            task,
            name,
            seed,
            size,
            task_seed,
            tuple(methods) or protocol(name).methods,
            model,
            epochs,
            precision,
            device,
            chat_template,
            tuple(target_modules),
            tuple(modules),
        )
        for seed in range(seeds)
        for name in protocols
        for task in tasks
    )


def _run(folder: Path, plan: Plan, say: Callable[[str], None], cell: Cell) -> None:
    task, made = task_of(cell, plan.source, plan.real)
    judge = make_judge(*plan.judge)
    Run(folder / cell.folder, cell, task, made, protocol(cell.protocol), judge, plan.keep)(say)


def length(cell: Cell, source: Source | None = None, real: RealData | None = None) -> int:
    """How much there is to do, roughly: characters, once an epoch and a dozen times for views of the gradients."""
    task, made = task_of(cell, source, real)
    epochs = cell.epochs or protocol(cell.protocol).finetuning(made, cell.seed, None).epochs
    return (epochs + 12) * sum(len(row.prompt) + len(row.response) for row in (*task.train, *task.queries))


def silent(text: str) -> None:
    """A worker process says nothing of its stages."""
