"""Whether retraining on all rows gives the adapter that is there: the loss of the answers under both."""

from __future__ import annotations

import math

from finetrace.attribution import Problem
from finetrace.evaluation.retraining import RESPONSE

NEAR = 0.1  # nats; a smaller difference is no reason to doubt the settings


def own_loss(problem: Problem) -> float:
    """Mean loss of the queries by the index's own adapter, in nats; NaN where it is of other tokens."""
    manifest = problem.index.manifest
    comparable = manifest.encoding.loss_on == RESPONSE and manifest.model.at == "end"
    return float(problem.features.losses.mean()) if comparable else float("nan")


def said_of(own: float, again: float) -> str | None:
    """A sentence on both losses; `None` where the adapter's own is not known."""
    if not math.isfinite(own):
        return None
    near = abs(own - again) <= max(0.25 * max(own, again), NEAR)
    doubt = "" if near else "; so far apart that the settings may not be those that made the adapter"
    return f"The answers' mean loss is {own:.2f} under the adapter and {again:.2f} after retraining on all rows{doubt}."
