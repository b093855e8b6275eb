"""Inverse curvatures as operators on the span of the gradients: one file an equation and its solve."""

from finetrace.curvature.damping import Damping, DampingRule
from finetrace.curvature.datainf import DataInf
from finetrace.curvature.fisher import FisherDual, FisherPrimal, fisher
from finetrace.curvature.identity import Identity
from finetrace.curvature.kronecker import Kronecker, KroneckerBasis
from finetrace.curvature.lissa import LiSSA, ReleasedLiSSA
from finetrace.curvature.operator import InverseCurvature
from finetrace.curvature.products import Products

__all__ = [
    "Damping",
    "DampingRule",
    "DataInf",
    "FisherDual",
    "FisherPrimal",
    "Identity",
    "InverseCurvature",
    "Kronecker",
    "KroneckerBasis",
    "LiSSA",
    "Products",
    "ReleasedLiSSA",
    "fisher",
]
