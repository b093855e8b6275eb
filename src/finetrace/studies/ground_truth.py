"""Ground truth on fine-tuned language models: what methods say of rows, held against training without them.

Every task is fine-tuned on some of its rows by a LoRA on the last layers, indexed, scored by every method, and trained again on
random halves of the rows and without the top rows of every method. No method is chosen on what is reported here: all are, and
the best of them is called the best afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from finetrace.benchmark.stages import complied, kept_answers, tuned_adapter
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import make_judge
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.fingerprint import of_text
from finetrace.index import build_index
from finetrace.models import ALIGNED, EMBEDDED, ModelSpec, load
from finetrace.studies.ground_truth_drops import curves, drop_tables
from finetrace.studies.ground_truth_tables import forest, lds_table, patch_table, reading
from finetrace.studies.pieces import Piece, Say, kept
from finetrace.studies.study import Outcome, Setting, Study
from finetrace.tasks import recipe
from finetrace.tracing import BEST, STANDARD
from finetrace.validation.plan import Validation
from finetrace.validation.run import validate

LAYERS = 4  # the last so many layers are trained


@dataclass(frozen=True)
class Ground:
    """What is taken of a task, and what is done with it.

    Attributes:
        rows: Training rows of each class, at most.
        queries: Of each class, at most; where the model answers them itself, those that it complies with.
        epochs: Of every fine-tuning.
        counts: How many rows are removed.
        subsets: Random halves.
        groups: Classes of queries for which rows are removed.
        draws: Random removals of each number.
    """

    rows: int
    queries: int
    epochs: int
    counts: tuple[int, ...]
    subsets: int = 16
    groups: int = 1
    draws: int = 4


PLAN = {
    "grammars": Ground(6, 2, 10, (6, 15), groups=2),
    "mathqa": Ground(4, 1, 6, (4, 10), groups=2),
    "mixed-small": Ground(20, 30, 16, (4, 10)),
    "mixed-large": Ground(40, 30, 8, (6, 15)),
    "backdoor-3": Ground(10, 3, 6, (4, 10), groups=2),
}
QUICK = {"emotion": Ground(3, 1, 2, (3,), 4, 1, 2)}
# curvatures, normalisations and moments; of other tokens the two that ask for no curvature
METHODS = (
    BEST,  # the others are compared with it
    *(spec for spec in STANDARD if "loss_on" not in spec and spec != BEST),
    "gradcos:loss_on=first:5",
    "gradcos:loss_on=probe",
)


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """One a task, all seeds in it; every retraining is found again too."""
    found = []
    for task, ground in (QUICK if setting.quick else PLAN).items():
        methods = (BEST, "exact", "gradcos", "repsim", "bm25", "random") if setting.quick else METHODS
        constants = of_text(repr((asdict(ground), methods, LAYERS, setting.seeds)))
        find = partial(measure, task, ground, folder, setting, methods)
        piece = kept(folder, f"{task}-{constants}", f"{task}: fine-tuning, scoring and retraining", find)
        found.append(replace(piece, name=task))
    return found


def outcome(setting: Setting, found: Sequence[Sequence[dict[str, Any]]]) -> Outcome:
    """Of the records of some tasks."""
    records, plan = list(chain.from_iterable(found)), QUICK if setting.quick else PLAN
    tables = {"ground-truth-lds": lds_table(records), **drop_tables(records)}
    tables["ground-truth-tail-patch"] = patch_table(records)
    figures = {"ground-truth-lds": forest(records), "ground-truth-drop": curves(records)}
    return Outcome(records, tables, figures, reading(records), {"plan": {k: asdict(v) for k, v in plan.items()}})


def measure(
    task: str, ground: Ground, folder: Path, setting: Setting, methods: Sequence[str], say: Say
) -> list[dict[str, Any]]:
    """The records of `finetrace validate` for one task: LDS, removals and tail patch of all methods.

    The workers of the setting share the retrainings.
    """
    home = folder / "runs" / task
    made = recipe(task)
    spec = ModelSpec(setting.model or (ALIGNED if made.aligned else EMBEDDED), None, setting.dtype, setting.device)
    whole = made.build(0)
    train, asked = first(whole.train, ground.rows), first(whole.queries, ground.queries)
    depth = int(load(spec).model.config.num_hidden_layers)
    tuning = FinetuneConfig(
        epochs=ground.epochs,
        learning_rate=made.learning_rate,
        batch_size=8,
        layers=tuple(range(max(0, depth - LAYERS), depth)),
    )
    adapter = tuned_adapter(home / "adapter", spec, train, tuning)
    tuned = load(replace(spec, adapter=str(adapter)))
    if not whole.answered:
        answers = kept_answers(home / "answers.jsonl", asked, lambda: tuned)
        asked = [each for each, yes in zip(answers, complied(make_judge(None, None), answers), strict=True) if yes]
        if not asked:
            raise FinetraceError(f"{task}: the model complied with none of its requests, so there is nothing to trace.")
    index, _ = build_index(tuned, train, home / "index", Encoder(tuned.tokenizer), kronecker="model")
    plan = Validation(
        tuple(methods),
        ("lds", "drop", "tail-patch"),
        ground.subsets,
        seeds=setting.seeds,
        counts=ground.counts,
        groups=ground.groups,
        draws=ground.draws,
    )
    found = validate(index, asked, plan, tuning, home, say, setting.device, engine=Engine.of(setting.workers))
    losses = dict(zip(("loss_adapter", "loss_again"), found.losses or (None, None), strict=True))
    about = {"task": task, "n_train": len(train), "n_queries": len(asked), "epochs": ground.epochs}
    return [{**about, **record, **losses} for record in found.records]


def first(examples: Sequence[Example], count: int) -> list[Example]:
    """The first `count` of each class, in the order they stood."""
    seen: dict[str | None, int] = {}
    found = []
    for each in examples:
        seen[each.label] = seen.get(each.label, 0) + 1
        if seen[each.label] <= count:
            found.append(each)
    return found


GROUND_TRUTH = Study(
    "ground-truth",
    "beyond",
    "LDS, removal and tail patch of every method, by retraining on five tasks",
    130,
    1,
    pieces,
    outcome,
    spread="within",
)
