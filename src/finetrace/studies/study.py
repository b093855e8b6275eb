"""What a study is: an exhibit of the paper's analyses, run, drawn and put in a table by one command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetrace.errors import FinetraceError
from finetrace.execution import Engine
from finetrace.models import DType
from finetrace.studies.pieces import Piece


@dataclass(frozen=True)
class Setting:
    """How a study is run.

    Attributes:
        quick: A small version of everything, within three minutes on two cores.
        seeds: Repetitions: other digits, or for language models another initialisation, dropout and order of the same rows.
        model: Another base model than the embedded one, for studies of language models.
        dtype, device: Of the language model.
        cells: Folder of fine-tuned and indexed tasks that studies share; the study's own if not given.
        workers: Processes side by side, or an engine; changes no result.
    """

    quick: bool = False
    seeds: int = 3
    model: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    cells: Path | None = None
    workers: int | Engine = 1

    def home(self, folder: Path) -> Path:
        """Where fine-tuned and indexed tasks are kept, for other studies too."""
        return self.cells or folder / "cells"


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
        records: Flat; what `results.json` holds.
        tables: By name, heads and lines.
        figures: By name, a matplotlib figure.
        reading: Sentences that say what is seen, with its numbers.
        config: What decided the run besides the setting.
    """

    records: Sequence[Mapping[str, Any]]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]
    figures: Mapping[str, Any]
    reading: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


# what --workers spreads: the pieces; the work within a piece, one piece after another; nothing, since seconds are measured
Spread = Literal["pieces", "within", "timed"]


@dataclass(frozen=True)
class Study:
    """An exhibit.

    Attributes:
        name: As `finetrace study NAME`.
        exhibit: Of the paper, or `beyond`.
        what: One line for a list.
        minutes: One seed of the full study, on two cores (AMD EPYC, Zen 5) in bfloat16.
        quick_minutes: One seed of the quick one.
        pieces: What is to be found out for a folder and a setting, all first seeds first.
        outcome: Of the setting and what was found of some pieces, in their order; never of none.
        cells: How many of the minutes go to fine-tuned and indexed tasks, which studies may share.
        spread: What several workers share.
        whole_seeds: Whether an outcome needs every piece of each seed that it is of.
        digits: The dtype of a study of digits, on the CPU whatever the setting; empty where it is of a language model.
    """

    name: str
    exhibit: str
    what: str
    minutes: float
    quick_minutes: float
    pieces: Callable[[Path, Setting], Sequence[Piece]]
    outcome: Callable[[Setting, Sequence[Any]], Outcome]
    cells: float = 0.0
    spread: Spread = "pieces"
    whole_seeds: bool = False
    digits: str = ""

    def cost(self, setting: Setting) -> str:
        """How long it will take, in words."""
        seeds = setting.seeds
        if setting.quick:
            return f"about {_words(self.quick_minutes * seeds)}"
        shared = f", {_words((self.minutes - self.cells) * seeds)} where its fine-tuned tasks are there already"
        return f"about {_words(self.minutes * seeds)}" + (shared if self.cells else "")

    def engine(self, setting: Setting) -> Engine:
        """Where its pieces are done.

        Raises:
            FinetraceError: It takes no workers.
        """
        engine = Engine.of(setting.workers)
        if self.spread == "timed" and not engine.in_process:
            raise FinetraceError(
                f"{self.name} measures seconds, which workers side by side would change; leave --workers and --engine out."
            )
        return Engine() if self.spread == "within" else engine


def _words(minutes: float) -> str:
    if minutes < 1.5:
        return "a minute" if minutes > 0.75 else "half a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
