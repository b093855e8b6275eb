"""Pieces of a study: each is found once, in whatever process, kept in files, and found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetrace.atomic import write_atomically

Say = Callable[[str], None]
Measure = Callable[[Say], list[dict[str, Any]]]


def _unknown() -> float:
    """A length that nobody estimated."""
    return 0.0


@dataclass(frozen=True)
class Piece:
    """A part of a study that depends on no other part; it can be pickled, for a worker.

    Attributes:
        name: In words: `grammars, corrected, seed 0`.
        paths: The files that hold it once it is finished, absolute or from the folder that the command was given in.
        find: Reads or measures it, and says what it does; `None` where there turned out to be nothing to measure.
        seed: The seed that it is a part of; `None` where it stands for all seeds.
        length: How much there is to do, against other pieces of the study; asked for only where pieces go side by side.
    """

    name: str
    paths: tuple[Path, ...]
    find: Callable[[Say], Any]
    seed: int | None = None
    length: Callable[[], float] = _unknown

    def there(self) -> bool:
        """Whether it is finished."""
        return all(path.exists() for path in self.paths)


def kept(folder: Path, name: str, what: str, measure: Measure, seed: int | None = None) -> Piece:
    """The records of `parts/NAME.json`, measured if they are not there.

    Args:
        folder: Of the study.
        name: Of the file; it has to say everything that decides the records.
        what: The piece in words, said before it is measured.
        measure: Makes the records.
        seed: That the records are of.
    """
    path = folder / "parts" / f"{name}.json"
    return Piece(what, (path,), partial(_records, path, what, measure), seed)


def wordless(measure: Callable[..., list[dict[str, Any]]], *given: Any) -> Measure:
    """`measure` of what it is given, for one that has nothing to say on its way."""
    return partial(_wordless, measure, given)


def in_words(pieces: Iterable[Piece], of: Iterable[Piece]) -> str:
    """Some pieces of a study: `grammars, seed 0; all of seed 1, 2`."""
    some, every = list(pieces), list(of)
    names, whole = [], []
    for seed in dict.fromkeys(piece.seed for piece in some):
        mine = [piece for piece in some if piece.seed == seed]
        if seed is not None and len(mine) == sum(piece.seed == seed for piece in every):
            whole.append(str(seed))
        else:
            names += [piece.name for piece in mine]
    return "; ".join([*names, *([f"all of seed {', '.join(whole)}"] if whole else [])])


def _records(path: Path, what: str, measure: Measure, say: Say) -> list[dict[str, Any]]:
    if not path.exists():
        say(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measure(say)).encode())
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _wordless(measure: Callable[..., list[dict[str, Any]]], given: tuple[Any, ...], say: Say) -> list[dict[str, Any]]:
    return measure(*given)
