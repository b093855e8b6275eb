"""What a validation allows to be believed, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetrace.attribution import make
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.lds import Comparison
from finetrace.evaluation.own_loss import said_of
from finetrace.evaluation.removal import CLASS, RANDOM, Effect
from finetrace.units import many


def verdict(
    lds: Comparison | None,
    drops: Sequence[Effect],
    losses: tuple[float, float] | None,
    names: Mapping[str, str],
    *,
    loo: Comparison | None = None,
    rates: Sequence[Effect] = (),
    before: float = float("nan"),
    extent: str = "",
    asked: str = "",
) -> list[str]:
    """What may be believed, the headline first.

    Args:
        lds, drops, loo: As measured.
        losses: Mean loss of the queries by the index's own adapter, and after retraining on all rows.
        names: Titles of methods.
        rates: Falls of the share of answers that the judge counts, after removals.
        before: That share after training on all rows.
        extent: Of how many answers, subsets and seeds the LDS is, in words.
        asked: Of which answers removals are, where not of all: a sentence.
    """
    lines = []
    if lds is not None and not any(np.isfinite(each.value) for each in lds.lds.values()):
        lines.append(
            "On this run training on other rows does not change the answers' losses, so nothing can be predicted."
        )
    elif lds is not None:
        tried = [name for name in lds.lds if name != CLASS and np.isfinite(lds.lds[name].value)]
        ahead = max(tried, key=lambda name: lds.lds[name].value)
        best = lds.lds[ahead]
        possible = f" of a possible {lds.reachable:.2f}" if lds.reachable is not None else ""
        if lds.reachable is None and lds.agreement is not None:
            possible = f" (how much is possible is not known: two seeds agree by {_short(lds.agreement)})"
        over = f", over {extent}" if extent else ""
        word = "predicts" if ahead in lds.sure else "does not show that it predicts"
        lines.append(
            f"On this run {names[ahead]} {word} what training on other rows does to the answers: LDS "
            f"{best.value:.2f} [{best.low:.2f}, {best.high:.2f}]{possible}, the best of {many(len(tried), 'method')}{over}."
        )
        others = [name for name in tried if name.split(":")[0] == "repsim" and name != ahead]
        lines += [f"{names[name]} has {_short(lds.lds[name])}." for name in others]
        lines += _beside(lds, ahead, names)
    for count in dict.fromkeys(each.count for each in drops):
        here = [each for each in drops if each.count == count and each.over_random is not None and each.what != CLASS]
        chance = next(each for each in drops if each.count == count and each.what == RANDOM)
        if here:
            most = max(here, key=lambda each: each.change.value)
            word = "more than" if most.sure else "not demonstrably more than"
            verb = "raises the answers' loss by" if most.change.value >= 0 else "changes the answers' loss by"
            lines.append(
                f"Retraining without the top {count} rows of {names[most.what]} {verb} {_short(most.change)} nats, {word} "
                f"without {count} random ones ({_short(chance.change)}){_picked(most, len(here))}."
            )
            idle = [names[e.what] for e in here if e.over_random is not None and not e.over_random.low > 0]
            if idle:
                lines.append(f"Not told apart from {count} random rows: {', '.join(idle)}.")
    if asked:
        lines.append(asked)
    if loo is not None and not any(np.isfinite(each.value) for each in loo.lds.values()):
        lines.append("Rows left out singly do not change the answers' losses.")
    elif loo is not None:
        ahead = max(
            (name for name, each in loo.lds.items() if np.isfinite(each.value)), key=lambda name: loo.lds[name].value
        )
        word = "above chance" if ahead in loo.sure else "not demonstrably above chance"
        lines.append(
            f"Rows left out singly: {names[ahead]} orders what that does by a rank correlation of {_short(loo.lds[ahead])}, "
            f"the best of {many(len(loo.lds), 'method')}, {word}."
        )
    lines += _rates(rates, before, names)
    if losses is not None and (compared := said_of(*losses)) is not None:
        lines.append(compared)
    if drops and not lines:
        return ["Rows were removed at random and by class alone; nothing says what a method's rows would do."]
    return lines or ["Tail patches alone were measured; they say nothing of removing rows."]


def _beside(lds: Comparison, ahead: str, names: Mapping[str, str]) -> list[str]:
    """What stands beside the best method: the best control, or where that one is a control the best method, and the labels."""
    led = make(ahead).control
    others = [
        name for name in lds.lds if name != CLASS and make(name).control != led and np.isfinite(lds.lds[name].value)
    ]
    lines = []
    if others:
        other = max(others, key=lambda name: lds.lds[name].value)
        what = "That is a control; the best method that is none" if led else "The best control"
        lines.append(f"{what}, {names[other]}, has {_short(lds.lds[other])}{_apart(lds.lds[other], lds.lds[ahead])}.")
    if CLASS in lds.lds and np.isfinite(lds.lds[CLASS].value):
        lines.append(
            "Labels alone, which count each row of the answer's class as 1, have "
            f"{_short(lds.lds[CLASS])}{_apart(lds.lds[CLASS], lds.lds[ahead])}."
        )
    return lines


def _apart(other: Estimate, best: Estimate) -> str:
    """How an interval lies to that of the best method; nothing is said of one that lies below it."""
    if other.high < best.low:
        return ""
    return ", more than any method" if other.low > best.high else ", and their intervals overlap"


def _short(value: Estimate) -> str:
    ends = f" [{value.low:.2f}, {value.high:.2f}]" if np.isfinite(value.low) else ""
    return f"{value.value:.2f}{ends}"


def _rates(rates: Sequence[Effect], before: float, names: Mapping[str, str]) -> list[str]:
    """What became of the share of answers that the judge counts, for the most rows that were removed."""
    count = max((each.count for each in rates), default=0)
    here = [each for each in rates if each.count == count and each.over_random is not None and each.what != CLASS]
    if not here:
        return []
    most = max(here, key=lambda each: each.change.value)
    chance = next(each for each in rates if each.count == count and each.what == RANDOM)
    left, by_chance = (min(1.0, max(0.0, before - each.change.value)) for each in (most, chance))
    word = "fewer than" if most.sure else "not demonstrably fewer than"
    return [
        f"The judge counts {before:.0%} of the answers after training on all rows, {left:.0%} without the top {count} of "
        f"{names[most.what]}, {word} without {count} random rows ({by_chance:.0%}){_picked(most, len(here))}."
    ]


def _picked(most: Effect, methods: int) -> str:
    """Where a method's own interval is above chance and that of the best of several is not."""
    alone = most.over_random is not None and most.over_random.low > 0
    return f", being the best of {methods} methods" if alone and not most.sure else ""
