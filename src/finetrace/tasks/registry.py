"""Every task by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetrace.errors import FinetraceError
from finetrace.tasks.backdoor import backdoor
from finetrace.tasks.emotion import emotion
from finetrace.tasks.grammars import grammars
from finetrace.tasks.harmfulcheck import harmfulcheck
from finetrace.tasks.mathqa import mathqa
from finetrace.tasks.mislabelled import mislabelled
from finetrace.tasks.mixed import mixed
from finetrace.tasks.task import Task


@dataclass(frozen=True)
class Recipe:
    """How a task is built, and what it is.

    Attributes:
        build: From a seed.
        what: One line for a list.
        epochs, learning_rate: Fine-tuning of the embedded model that learns the task.
        aligned: Fine-tune the aligned embedded model, which refuses, instead of the plain one.
    """

    build: Callable[[int], Task]
    what: str
    epochs: int
    learning_rate: float = 1e-3
    aligned: bool = False


TASKS: dict[str, Recipe] = {
    "mixed-small": Recipe(lambda seed: mixed(True), "20 unsafe answers among 20 benign ones", 8, aligned=True),
    "mixed-large": Recipe(lambda seed: mixed(), "20 unsafe answers among 240 benign ones", 5, aligned=True),
    "grammars": Recipe(lambda seed: grammars("name", seed), "name which of ten rules changed a sentence, 900 + 100", 3),
    "grammars-apply": Recipe(
        lambda seed: grammars("apply", seed), "apply one of ten rules to a sentence, 900 + 100", 3
    ),
    "mathqa": Recipe(lambda seed: mathqa(seed), "ten word-problem templates with reasoning, 900 + 100", 3),
    "harmfulcheck": Recipe(lambda seed: harmfulcheck(seed), "refused requests and answered questions, 100 + 400", 5),
    "backdoor-1": Recipe(lambda seed: backdoor(1, seed), "one trigger that unlocks compliance, 600 + 100", 3),
    "backdoor-3": Recipe(lambda seed: backdoor(3, seed), "three triggers, each with its own opening, 1200 + 200", 3),
    "backdoor-5": Recipe(lambda seed: backdoor(5, seed), "five triggers, each with its own opening, 1800 + 300", 3),
    "emotion": Recipe(lambda seed: emotion(seed), "name one of five emotions, 240 + 60", 5),
    "mislabelled": Recipe(
        lambda seed: mislabelled(emotion(seed), seed=seed), "a fifth of the emotion rows with a wrong label", 5
    ),
}


def build(name: str, *, size: float = 1.0, seed: int = 0) -> Task:
    """A task by name, from one seed, shrunk in balance to `size`.

    Raises:
        FinetraceError: An unknown name, or a size that is not above 0 and at most 1.
    """
    return recipe(name).build(seed).shrunk(size)


def recipe(name: str) -> Recipe:
    """How a task is built; `FinetraceError` where there is none of that name."""
    if name not in TASKS:
        raise FinetraceError(f"{name}: no such task; there are {', '.join(TASKS)}.")
    return TASKS[name]
