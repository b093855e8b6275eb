"""Which losses, transformer layers and moments a gradient method looks at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from finetrace.collection import Block
from finetrace.errors import FinetraceError
from finetrace.moments import At, each_moment
from finetrace.positions import Positions

LAST = {"last-half": 2, "last-fifth": 5}  # the share of the layers that is its name's
LAYERS = r"([0-9]+)(?:-([0-9]+))?"


class View(NamedTuple):
    """What a cosine is taken of; the names are those of a method's parameters."""

    loss_on: str
    layers: str
    at: At


def views(loss_on: str, layers: str, at: str) -> tuple[View, ...]:
    """The losses, layers and moments that a method looks at, view by view; `+` joins several of each, and one goes with all.

    Raises:
        FinetraceError: A loss, a choice of layers or a moment is not known, or there are several of two and not as many.
    """
    losses = Positions.split(loss_on) if loss_on else ("",)
    choices = tuple(layers.split("+"))
    for each in choices:
        if each not in ("all", *LAST) and not re.fullmatch(LAYERS, each):
            raise _unknown(each)
    moments = each_moment(at)
    counts = {
        f"loss_on={loss_on}": (len(losses), "losses"),
        f"layers={layers}": (len(choices), "choices of layers"),
        f"at={at}": (len(moments), "moments"),
    }
    joined = {setting: found for setting, found in counts.items() if found[0] > 1}
    if len({count for count, _ in joined.values()}) > 1:
        found = " and ".join(f"{count} {kind}" for count, kind in joined.values())
        raise FinetraceError(f"{','.join(joined)}: {found}; give as many of each, or one.")
    several = max(count for count, _ in counts.values())
    matched = (part * (several // len(part)) for part in (losses, choices, moments))
    return tuple(View(*each) for each in zip(*matched, strict=True))


def check(method: str, loss_on: str, layers: str, at: str) -> None:
    """Refuse what a method that looks at one loss, one choice of layers and one moment cannot do, before it is computed.

    Raises:
        FinetraceError: A loss, a choice of layers or a moment is not known, or there are several of one of them.
    """
    if len(views(loss_on, layers, at)) > 1:
        raise FinetraceError(
            f"{method}: this method looks at one loss, one choice of layers and one moment; give one of each."
        )


def select(blocks: Sequence[Block], layers: str, depth: int) -> tuple[Block, ...]:
    """The blocks of some layers of a model with `depth` of them.

    Args:
        blocks: Tracked matrices; the first number in a name is its layer.
        layers: `all`; `last-half` or `last-fifth` of the layers that have a tracked matrix (rounded down, at least one; all
            blocks where none is in a layer); a number, or `FIRST-LAST`. Layers count from 0.
        depth: Transformer layers of the model.

    Raises:
        FinetraceError: `layers` is none of these, or no tracked matrix is in them.
    """
    if layers == "all":
        return tuple(blocks)
    if layers in LAST:
        there = sorted({number for block in blocks if (number := _layer(block.name)) is not None})
        if not there:
            return tuple(blocks)
        first, last = there[-max(1, len(there) // LAST[layers])], there[-1]
    else:
        found = re.fullmatch(LAYERS, layers)
        if found is None:
            raise _unknown(layers)
        first = int(found[1])
        last = int(found[2] or found[1])
    chosen = tuple(block for block in blocks if (number := _layer(block.name)) is not None and first <= number <= last)
    if not chosen:
        raise FinetraceError(
            f"layers={layers}: no tracked matrix is in layers {first} to {last} (of 0 to {depth - 1})."
        )
    return chosen


def _unknown(layers: str) -> FinetraceError:
    return FinetraceError(f"layers={layers}: not known; use all, last-half, last-fifth, a number, or FIRST-LAST.")


def _layer(name: str) -> int | None:
    found = re.search(r"\.([0-9]+)\.", name)
    return int(found[1]) if found else None
