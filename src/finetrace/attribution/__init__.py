"""Attribution methods over an index: each a short class that gives an (m, n) matrix of scores."""

# importing the modules registers their methods, which are listed in this order
# isort: off
from finetrace.attribution import controls, gradient_similarity, datainf, lissa, exact, kronecker  # noqa: F401
from finetrace.attribution import lexical, self_influence, similarity  # noqa: F401

# isort: on
from finetrace.attribution.method import Method, available, make, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.scores import Scores, Top

__all__ = ["Method", "Problem", "Scores", "Top", "available", "make", "register"]
