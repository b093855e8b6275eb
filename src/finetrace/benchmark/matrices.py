"""What is read off a matrix of scores, queries by training examples, beside its metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution import Method


def hub(scores: NDArray[Any]) -> tuple[int, float]:
    """The training example that is ranked first for most queries, and the share of queries; equals share a query."""
    top = scores == scores.max(axis=1, keepdims=True)
    first = (top / top.sum(axis=1, keepdims=True)).sum(axis=0)
    return int(first.argmax()), round(float(first.max() / len(scores)), 4)


def suspicion(method: Method, scores: NDArray[Any]) -> NDArray[np.float64]:
    """(1, n), high for rows that look wrong: what does not depend on the query as it is, else minus the mean influence.

    DataInf's experiment (arXiv 2310.00902): a mislabelled row raises the loss of a clean validation set.
    """
    if method.query_free or method.name == "random":
        return np.asarray(scores[:1], dtype=np.float64)
    return np.asarray(-scores.mean(axis=0, keepdims=True), dtype=np.float64)
