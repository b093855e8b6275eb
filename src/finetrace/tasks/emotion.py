"""Emotion: short first-person sentences in five classes, each answered by the name of the emotion it expresses."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from finetrace.columns import Columns
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.reading import read_examples
from finetrace.tasks.task import Task, split

SHIPPED = Path(__file__).parent.parent / "data" / "emotion.jsonl"
EMOTIONS = ("sadness", "joy", "love", "anger", "fear")
LEFT_OUT = "surprise"
# Class numbers without names are read as dair-ai/emotion counts them.
_NAMES = {str(number): name for number, name in enumerate((*EMOTIONS, LEFT_OUT))}


def emotion(
    seed: int = 0,
    train_share: float = 0.8,
    *,
    source: str | Path | None = None,
    source_split: str | None = None,
    id_column: str | None = None,
    per_class: int | None = None,
) -> Task:
    """Which of five emotions a sentence expresses: by default 48 training rows and 12 queries a class.

    Every class counts as many rows as the smallest one, so the task is balanced whatever the source.

    Args:
        seed: Draws the rows and the split.
        train_share: The share of each class that trains; the rest are queries.
        source: Data instead of what ships, see `emotion_rows`.
        source_split: Which split of the source to read.
        id_column: The source's column of ids; guessed if left out.
        per_class: At most this many rows of each class, training rows and queries together.

    Raises:
        FinetraceError: The source cannot be read or lacks rows of a class, or a number makes no sense.
    """
    classes: dict[str | None, list[Example]] = defaultdict(list)
    for row in emotion_rows(source, source_split, id_column):
        classes[row.label].append(row)
    name = SHIPPED.name if source is None else str(source)
    for label in EMOTIONS:
        if len(classes[label]) < 2:
            raise FinetraceError(
                f"{name} has {len(classes[label])} rows of {label!r} and the emotion task needs two or more of each "
                f"of {', '.join(EMOTIONS)}; add rows of that class"
            )
    if per_class is not None and per_class < 2:
        raise FinetraceError(f"per_class={per_class}: give at least 2 rows a class, one to train and one to ask about")
    size = min(len(classes[label]) for label in EMOTIONS)
    size = size if per_class is None else min(size, per_class)
    training = round(train_share * size)
    if not 0 < training < size:
        raise FinetraceError(
            f"train_share={train_share:g} leaves {training} of {size} rows a class to train; "
            "give a share between 0 and 1 that leaves rows on both sides"
        )
    chance = random.Random(seed)
    balanced = [row for label in EMOTIONS for row in chance.sample(classes[label], size)]
    return Task("emotion", *split(balanced, training, seed))


def emotion_rows(
    source: str | Path | None = None, source_split: str | None = None, id_column: str | None = None
) -> list[Example]:
    """The sentences as examples, the emotion as response and label.

    A source has the columns `text` and `label`: names of emotions, or their numbers as in `dair-ai/emotion`.
    Its rows of surprise are left out, for the task is five-way.

    Args:
        source: A JSON Lines, CSV or Parquet file, a saved dataset, or a Hub id such as `dair-ai/emotion`; None reads
            what ships.
        source_split: Which split of the source to read; by default the only one, or `train`.
        id_column: Its column of ids; guessed if left out.

    Raises:
        FinetraceError: The source cannot be read, or a row has another label or none.
    """
    name = SHIPPED.name if source is None else str(source)
    rows = read_examples(
        SHIPPED if source is None else source,
        Columns(prompt="text", label="label", id=id_column),
        split=source_split,
        responses=False,
    )
    examples = []
    for number, row in enumerate(rows, 1):
        label = (row.label or "").strip().lower()
        label = _NAMES.get(label, label)
        if label == LEFT_OUT:
            continue
        if label not in EMOTIONS:
            raise FinetraceError(
                f"{name}, row {number} ({row.prompt[:40]!r}): the label is {row.label!r} and not one of "
                f"{', '.join(EMOTIONS)} or {LEFT_OUT}; mend it or remove the row"
            )
        examples.append(_asked(row, label, EMOTIONS))
    return examples


def _asked(row: Example, label: str, names: Sequence[str]) -> Example:
    question = f"Which emotion does this sentence express: {', '.join(names[:-1])} or {names[-1]}?\n\n{row.prompt}"
    return Example.from_prompt(question, label, id=row.id, label=label, metadata={**row.metadata, "text": row.prompt})
