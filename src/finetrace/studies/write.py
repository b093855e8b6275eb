"""A study's folder: what it was run with, its records, tables and figures, of all pieces or of those that are there."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from finetrace.benchmark.figures import save
from finetrace.benchmark.runner import silent
from finetrace.benchmark.stages import claim, unclaim
from finetrace.benchmark.tables import write_table
from finetrace.errors import FinetraceError
from finetrace.models import known_dtype
from finetrace.reporting.results import of_more_seeds, write_results
from finetrace.studies.pieces import Piece, Say, in_words
from finetrace.studies.study import Outcome, Setting, Study

OFTEN = 60.0  # seconds between two writings within a seed


def run(study: Study, folder: Path, setting: Setting, say: Say, tell: Say = silent) -> Outcome:
    """Run a study in `folder` and write `results.json`, `results.parquet`, tables (.md, .tex) and figures (.png, .svg).

    They are written after every seed too, and after other pieces where the last writing was a minute ago, of what is there by
    then; `results.json` says under `missing`, and its `reading` in words, what is not.

    Args:
        study: What to run.
        folder: Its own.
        setting: How.
        say: Hears what is done.
        tell: Hears what was written, and what is missing, each time before the last.

    Raises:
        FinetraceError: The folder holds another run, or cannot be written; the study takes no workers; no model complied.
    """
    engine = study.engine(setting)
    setting = replace(setting, dtype=known_dtype(setting.dtype, setting.device))
    settings = {"study": study.name, **asdict(replace(setting, workers=1))}
    del settings["workers"]
    claim(
        folder / "study.json",
        {key: value for key, value in settings.items() if key not in ("seeds", "cells")},
        "a study",
    )
    if study.digits:
        settings |= {"dtype": study.digits, "device": "cpu"}
    fewer = of_more_seeds(folder, setting.seeds)
    if fewer is not None:
        say(fewer)
    if not engine.in_process:
        setting = replace(setting, cells=setting.cells and setting.cells.resolve())
    pieces = study.pieces(folder if engine.in_process else folder.resolve(), setting)
    so_far = _SoFar(study, folder, setting, settings, pieces, tell)
    waiting = [place for place, piece in enumerate(pieces) if not piece.there()]
    for place in sorted({*range(len(pieces))} - {*waiting}):
        so_far.add(place, pieces[place].find(say))
    if waiting:
        so_far.write()
    if not engine.in_process:  # the longest of a seed first, so that no worker is left with one at the end
        waiting.sort(key=lambda place: (pieces[place].seed or 0, -pieces[place].length()))
    work = partial(_find, say if engine.in_process else silent)
    try:
        todo = [pieces[place] for place in waiting]
        for done, value in engine.run_each(work, todo, name=attrgetter("name"), shared=folder):
            if not engine.in_process:
                say(f"{todo[done].name}: done")
            so_far.add(waiting[done], value)
            if so_far.due(todo[done].seed):
                so_far.write()
    except BaseException:  # an interrupt too: what is finished can be read
        if so_far.behind() or not so_far.written:
            so_far.write()
        unclaim(folder / "study.json")  # where a model is not there, and nothing was begun
        raise
    return so_far.finish()


def _find(say: Say, piece: Piece) -> Any:
    return piece.find(say)


class _SoFar:
    """What is found, and how much of it is written."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        setting: Setting,
        settings: Mapping[str, Any],
        pieces: Sequence[Piece],
        tell: Say,
    ) -> None:
        self.study, self.folder, self.setting, self.settings = study, folder, setting, settings
        self.pieces, self.tell = pieces, tell
        self.found: dict[int, Any] = {}
        self.written: list[int] = []
        self.began = self.last = time.perf_counter()
        self.resumed = (folder / "parts").exists() or setting.home(folder).exists()

    def add(self, place: int, value: Any) -> None:
        """What was found of a piece."""
        self.found[place] = value

    def due(self, seed: int | None) -> bool:
        """Whether to write now, after a piece of `seed`, though not all is there."""
        if len(self.found) == len(self.pieces) or not self.behind():
            return False
        return seed is None or self._whole(seed) or time.perf_counter() - self.last > OFTEN

    def behind(self) -> bool:
        """Whether anything is finished that is not written."""
        return self._usable() != self.written

    def write(self) -> None:
        """Write what is there, and tell what is missing."""
        usable = self._usable()
        if any(self.found[place] is not None for place in usable):
            self._write(usable)
            self.tell(
                f"written so far: {self.folder / 'results.json'}; still missing: {self._words(self._without(usable))}"
            )
        elif self.found and self.study.whole_seeds:
            missing = self._words(self._without(self.found))
            self.tell(
                f"nothing is written yet: {self.study.name} needs every piece of a seed; still missing: {missing}"
            )

    def finish(self) -> Outcome:
        """Write everything."""
        if all(value is None for value in self.found.values()):
            raise FinetraceError(
                f"{self.study.name}: the fine-tuned models complied with none of their requests, so there is nothing to trace."
            )
        return self._write(self._usable())

    def _whole(self, seed: int | None) -> bool:
        return all(place in self.found for place, piece in enumerate(self.pieces) if piece.seed == seed)

    def _usable(self) -> list[int]:
        """Pieces that an outcome can be of, in their order."""
        there = sorted(self.found)
        return [p for p in there if self._whole(self.pieces[p].seed)] if self.study.whole_seeds else there

    def _without(self, places: Container[int]) -> list[Piece]:
        return [piece for place, piece in enumerate(self.pieces) if place not in places]

    def _words(self, missing: Sequence[Piece]) -> str:
        return in_words(missing, self.pieces)

    def _write(self, usable: Sequence[int]) -> Outcome:
        values = [self.found[place] for place in usable]
        outcome = self.study.outcome(self.setting, [value for value in values if value is not None])
        missing = self._without(usable)
        if missing:
            without = f"Not finished, and not in these numbers: {self._words(missing)}."
            outcome = replace(outcome, reading=[without, *outcome.reading])
        spent = {"seconds": round(time.perf_counter() - self.began, 1), "resumed": self.resumed}
        about = {"missing": [piece.name for piece in missing], "reading": list(outcome.reading)}
        write_results(self.folder, outcome.records, {**self.settings, **outcome.config, **spent, **about})
        for name, (heads, lines) in outcome.tables.items():
            write_table(self.folder / name, heads, lines)
        for name, figure in outcome.figures.items():
            save(figure, self.folder / name)
        self.written, self.last = list(usable), time.perf_counter()
        return outcome
