"""Texts of data sets and models as a terminal may show them: printable, and told apart where they are cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size


def printable(text: str) -> str:
    """The text in its lines, other control characters shown as spaces: data must not move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def flat(text: str) -> str:
    """One line, control characters shown as spaces."""
    return " ".join(printable(text).split())


def names(texts: Sequence[str], room: int) -> list[str]:
    """Each on one line of `room` cells, cut in the middle; all are whole where cutting would make two look the same."""
    whole = [flat(text) for text in texts]
    short = [_cut(text, room) for text in whole]
    return short if len(set(short)) == len(set(texts)) else whole


def width(texts: Sequence[str]) -> int:
    """Cells of the longest."""
    return max(map(cell_len, texts), default=0)


def _cut(text: str, room: int) -> str:
    if cell_len(text) <= room:
        return text
    tail = (room - 1) // 2
    return set_cell_size(text, room - 1 - tail).rstrip() + "…" + set_cell_size(text[::-1], tail)[::-1].lstrip()
