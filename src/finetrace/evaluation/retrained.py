"""What one retraining did, and the file in which it is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError


@dataclass(frozen=True, eq=False)
class Retrained:
    """What one retraining did to the queries.

    Attributes:
        losses: By name, (m,) mean loss of that answer to each query, in nats; `response` is the queries' own.
        answers: The model's own greedy answers, where they were asked for.
        seconds: How long it took.
        seed, rows: What it was trained under and on.
        verdicts: By a judge's identity, (m,) whether the answer to each query complies.
    """

    losses: Mapping[str, NDArray[np.float64]]
    answers: tuple[str, ...] | None
    seconds: float
    seed: int
    rows: tuple[int, ...]
    verdicts: Mapping[str, Sequence[bool]] = field(default_factory=dict)


def write(path: Path, found: Retrained) -> None:
    """Keep it, in place of what is there."""
    record = {
        "seed": found.seed,
        "rows": list(found.rows),
        "losses": {name: [float(value) for value in values] for name, values in found.losses.items()},
        "answers": None if found.answers is None else list(found.answers),
        "verdicts": {name: [bool(value) for value in values] for name, values in found.verdicts.items()},
        "seconds": found.seconds,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{path.parent}: cannot be written ({error}); choose another folder.") from error
    write_atomically(path, json.dumps(record).encode(), str(os.getpid()))  # another run may be at the same one


def read(path: Path, queries: int) -> Retrained:
    """What was kept of a retraining that measured so many queries.

    Raises:
        FinetraceError: It is not there, or not whole.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        losses = {name: np.array(values, dtype=np.float64) for name, values in found["losses"].items()}
        answers = tuple(found["answers"]) if found["answers"] is not None else None
        verdicts = {
            name: tuple(map(bool, values))
            for name, values in found.get("verdicts", {}).items()
            if len(values) == queries  # else they are given again
        }
        said: list[Sized] = [*losses.values(), *([] if answers is None else [answers])]
        if any(len(values) != queries for values in said) or any(values.ndim != 1 for values in losses.values()):
            raise ValueError("not one loss and answer a query")
        return Retrained(losses, answers, float(found["seconds"]), int(found["seed"]), tuple(found["rows"]), verdicts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FinetraceError(
            f"{path}: this retraining cannot be read ({error}); remove the file and it is done again."
        ) from error
