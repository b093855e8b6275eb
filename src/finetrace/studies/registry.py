"""Every study by name."""

from __future__ import annotations

from finetrace.errors import FinetraceError
from finetrace.studies.approximation_study import APPROXIMATION
from finetrace.studies.capacity import CAPACITY
from finetrace.studies.convergence import CONVERGENCE
from finetrace.studies.convex import CONVEX
from finetrace.studies.damping import DAMPING
from finetrace.studies.ground_truth import GROUND_TRUTH
from finetrace.studies.iterations import ITERATIONS
from finetrace.studies.layers import LAYERS
from finetrace.studies.normalisation import NORMALISATION
from finetrace.studies.parameters_study import PARAMETERS
from finetrace.studies.study import Study

_ALL = (
    APPROXIMATION,
    ITERATIONS,
    CONVERGENCE,
    PARAMETERS,
    CAPACITY,
    LAYERS,
    DAMPING,
    NORMALISATION,
    CONVEX,
    GROUND_TRUTH,
)
STUDIES: dict[str, Study] = {study.name: study for study in _ALL}


def study(name: str) -> Study:
    """By name; `FinetraceError` for any other."""
    if name not in STUDIES:
        raise FinetraceError(f"{name}: no such study; there are {', '.join(STUDIES)}.")
    return STUDIES[name]
