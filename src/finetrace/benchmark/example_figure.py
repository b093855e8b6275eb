"""One query and what each method holds to be behind it, with the words they share (the study's Fig. 1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.benchmark import finished
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.figures import save, short, shown
from finetrace.examples import Example

# everything below is in points
WIDTH, GAP, INSIDE = 720.0, 12.0, 10.0
SIZE, LINE = 9.0, 13.0
LINES = 6  # of a prompt or a response; what is longer is cut
PAPER, EDGE, MARK = "#f7f7f5", "#c9c9c4", "#ffdf80"
GOOD, BAD, DIM = "#1a7f37", "#b35900", "#77776f"

Words = Callable[[str], list[str]]
Measure = Callable[[str], float]
Lines = list[list[str]]


@dataclass(frozen=True)
class Card:
    """A box of the figure.

    Attributes:
        title: Lines in bold: the methods, or the query.
        note: Id and class.
        colour: Of the note: whether the class is the query's.
        texts: (what, lines of words) from top to bottom.
        marked: The key words of each text.
    """

    title: Lines
    note: str
    colour: str
    texts: tuple[tuple[str, Lines], ...]
    marked: tuple[frozenset[str], ...]

    @property
    def height(self) -> float:
        """Of the box."""
        return 2 * INSIDE + LINE * (len(self.title) + sum(1 + len(lines) for _, lines in self.texts)) + LINE / 2


def draw_examples(folder: Path, cells: Sequence[Cell], out: Path) -> None:
    """`example-TASK-PROTOCOL` of every cell: its first query, and the top training example of each shown method.

    A method that gives several examples its highest score has no top one, and is named below the boxes.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words: Words = TfidfVectorizer(stop_words="english").build_analyzer()
    for cell in cells:
        home = folder / cell.folder
        matrices = finished.scores(home)
        train, [query, *_] = finished.rows(home)
        tops: dict[int, list[str]] = {}
        tied: list[str] = []
        for name, title in short(shown(matrices)).items():
            best = np.flatnonzero(matrices[name][0] == matrices[name][0].max())
            if len(best) > 1:
                tied.append(f"{title} ({len(best)} examples)")
            else:
                tops.setdefault(int(best[0]), []).append(title)
        found = [(", ".join(titles), train[i]) for i, titles in tops.items()]
        _draw(query, found, tied, key_words(query, train, words), words, out / f"example-{cell.task}-{cell.protocol}")


def key_words(query: Example, train: Sequence[Example], words: Words) -> tuple[frozenset[str], frozenset[str]]:
    """The query's words to mark in prompts and in responses.

    Stop words are left out, and so are words that more than half of the training prompts (or responses) have: they
    belong to the task and not to the example.
    """
    sides = [[example.prompt for example in train], [example.response for example in train]]
    common = []
    for texts in sides:
        rows = Counter(word for text in texts for word in set(words(text)))
        common.append({word for word, count in rows.items() if count > len(train) / 2})
    mine = ({*words(query.prompt)} - common[0]) | ({*words(query.response)} - common[1])
    return frozenset(mine - common[0]), frozenset(mine - common[1])


def wrap(text: str, width: float, measure: Measure, limit: int = LINES) -> Lines:
    """Words in lines no wider than `width`; a word that is wider by itself is cut up, and the last line ends in dots."""
    lines: Lines = [[]]
    for word in _pieces(text, width, measure):
        if lines[-1] and measure(" ".join([*lines[-1], word])) > width:
            if len(lines) == limit:
                while len(lines[-1]) > 1 and measure(" ".join([*lines[-1], "\u2026"])) > width:
                    lines[-1].pop()
                lines[-1].append("\u2026")
                break
            lines.append([])
        lines[-1].append(word)
    return lines


def _draw(
    query: Example,
    tops: Sequence[tuple[str, Example]],
    tied: Sequence[str],
    keys: tuple[frozenset[str], frozenset[str]],
    words: Words,
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    measure = _ruler("normal")
    half = (WIDTH - 3 * GAP) / 2
    sides = ([top.prompt for _, top in tops], [top.response for _, top in tops])
    marked = [each & {word for text in side for word in words(text)} for each, side in zip(keys, sides, strict=True)]
    either = marked[0] | marked[1]
    own = (either & keys[0], either & keys[1])
    asked = Card([["query"]], _note(query), DIM, _texts(query, WIDTH - 2 * GAP, measure), own)
    cards = [
        Card(
            wrap(names, half - 2 * INSIDE, _ruler("bold")),
            _note(top),
            GOOD if top.label == query.label else BAD,
            _texts(top, half, measure),
            (marked[0], marked[1]),
        )
        for names, top in tops
    ]
    rows = [cards[i : i + 2] for i in range(0, len(cards), 2)]
    heights = [max(card.height for card in row) for row in rows]
    below = wrap(f"equal at the top, so that none is first: {', '.join(tied)}", WIDTH, measure) if tied else []
    total = GAP + asked.height + GAP + sum(height + GAP for height in heights) + LINE * (1 + len(below)) + GAP / 2
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(total, 0)
    top_edge = GAP
    _box(axis, asked, GAP, top_edge, WIDTH - 2 * GAP, asked.height, words, measure)
    top_edge += asked.height + GAP
    for row, height in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            _box(axis, card, GAP + i * (half + GAP), top_edge, half, height, words, measure)
        top_edge += height + GAP
    legend = (
        "box: a training example and the methods that rank it first; green: of the query's class; marked: key words "
    )
    small: dict[str, Any] = {"fontsize": SIZE - 1, "color": DIM, "va": "center", "parse_math": False}
    axis.text(GAP, top_edge + LINE / 2, legend + "shared with the query", **small)
    for place, line in enumerate(below, 1):
        axis.text(GAP, top_edge + LINE * (place + 0.5), " ".join(line), **small)
    save(figure, path)


def _box(
    axis: Any, card: Card, x: float, y: float, width: float, height: float, words: Words, measure: Measure
) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    style = "round,pad=0,rounding_size=5"
    axis.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=PAPER, edgecolor=EDGE, linewidth=0.8))
    left, baseline = x + INSIDE, y + INSIDE + SIZE
    plain = {"fontsize": SIZE, "va": "baseline", "parse_math": False}
    for line in card.title:
        axis.text(left, baseline, " ".join(line), fontweight="bold", **plain)
        baseline += LINE
    baseline += LINE / 4
    axis.text(x + width - INSIDE, baseline, card.note, color=card.colour, ha="right", **{**plain, "fontsize": SIZE - 1})
    for (what, lines), keys in zip(card.texts, card.marked, strict=True):
        axis.text(left, baseline, what, color=DIM, **{**plain, "fontsize": SIZE - 2})
        for line in lines:
            baseline += LINE
            for i, word in enumerate(line):
                start = left + measure(" ".join([*line[:i], ""]))
                if found := _marked(word, keys, words):
                    begin, end = start + measure(word[: found[0]]), start + measure(word[: found[1]])
                    mark = Rectangle((begin - 1, baseline - SIZE), end - begin + 2, LINE - 1, color=MARK, linewidth=0)
                    axis.add_patch(mark)
                axis.text(start, baseline, word, **plain)
        baseline += LINE


def _marked(word: str, keys: Collection[str], words: Words) -> tuple[int, int] | None:
    """From where to where a word as it stands is a key word, without the signs around it."""
    core = re.search(r"\w(?:.*\w)?", word)
    return core.span() if core is not None and any(each in keys for each in words(word)) else None


def _ruler(weight: str) -> Measure:
    """The width of a text, in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font, path = FontProperties(size=SIZE, weight=weight), TextToPath()
    return lambda text: float(path.get_text_width_height_descent(text, font, False)[0]) if text else 0.0


def _pieces(text: str, width: float, measure: Measure) -> list[str]:
    """The words, those wider than a line cut up."""
    pieces = []
    for word in text.split():
        while measure(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or measure(word[:n]) <= width)
            pieces.append(word[:fits])
            word = word[fits:]
        pieces.append(word)
    return pieces


def _texts(example: Example, width: float, measure: Measure) -> tuple[tuple[str, Lines], ...]:
    room = width - 2 * INSIDE
    return tuple(
        (what, wrap(text, room, measure)) for what, text in (("prompt", example.prompt), ("response", example.response))
    )


def _note(example: Example) -> str:
    return example.id if example.label is None else f"{example.id}, {example.label}"
