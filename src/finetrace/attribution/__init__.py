"""Attribution methods over an index: each a short class that gives an (m, n) matrix of scores."""

from finetrace.attribution import controls, exact, gradient, kronecker, lexical, self_influence, similarity  # noqa: F401  (importing registers them)
from finetrace.attribution.method import Method, available, make, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.scores import Scores, Top

__all__ = ["Method", "Problem", "Scores", "Top", "available", "make", "register"]
