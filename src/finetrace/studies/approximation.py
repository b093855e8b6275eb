"""How far approximate influences are from exact ones, and what they cost (Fig. 3 and Table 5 of arXiv 2409.19998).

One linear layer on digits. Exact has two meanings: the damped empirical Fisher that the study's released code inverts, and
the damped Hessian of its Eq. 2, here of all that was minimised, weight decay included. Both are solved densely where a d x d
matrix fits, and otherwise by the identities of `finetrace.curvature.fisher`, whose solutions are put back into the system by
products.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, cg
from scipy.stats import spearmanr
from torch import Tensor, nn

from finetrace.curvature import Damping, DampingRule, DataInf, LiSSA, Products, ReleasedLiSSA
from finetrace.curvature.fisher import FisherDual
from finetrace.studies.mnist import CLASSES, Digits, gradients, output_gradients, softmax_regression

QUERIES = 5
DECAY = 1e-3
DAMPINGS: dict[str, tuple[float, DampingRule]] = {"paper": (0.1, "entry"), "default": (0.01, "trace")}
REPEATS = 3


@dataclass(frozen=True)
class Size:
    """Training points and pixels a side; the layer has 10 x side x side weights."""

    points: int
    side: int

    @property
    def parameters(self) -> int:
        """d."""
        return CLASSES * self.side**2

    @property
    def dense_bytes(self) -> int:
        """Of the matrix and of its factor, float64."""
        return 2 * 8 * self.parameters**2

    def dense_fits(self) -> bool:
        """Whether half of this machine's memory holds them."""
        memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.dense_bytes <= memory // 2


@dataclass(frozen=True, eq=False)
class Trained:
    """A layer at the minimum of its training loss, and gradients there.

    Attributes:
        digits: The points.
        weights: (10, p).
        train, query: (n, 10 p) and (m, 10 p) gradients.
        damping: lambda.
    """

    digits: Digits
    weights: Tensor
    train: Tensor
    query: Tensor
    damping: float

    @classmethod
    def of(cls, size: Size, damping: str, seed: int) -> Trained:
        """Draw, train, differentiate."""
        digits = Digits.draw(size.points, QUERIES, size.side, seed)
        weights = softmax_regression(digits.train, digits.train_classes, DECAY)
        train = gradients(weights, digits.train, digits.train_classes)
        query = gradients(weights, digits.test, digits.test_classes)
        value = Damping(*DAMPINGS[damping]).of(Products.of(train, query), size.parameters)
        return cls(digits, weights, train, query, value)

    @property
    def products(self) -> Products:
        """With nothing computed yet, so that every method bears its own cost."""
        return Products.of(self.train, self.query)


def dense_fisher(at: Trained) -> Tensor:
    """(m, n) V (lambda I + G^T G / n)^{-1} G^T by a Cholesky factor of the d x d matrix."""
    curvature = at.train.T @ at.train / len(at.train)
    curvature.diagonal().add_(at.damping)
    return _dense(at, curvature)


def dense_hessian(at: Trained) -> Tensor:
    """(m, n) V (lambda I + H)^{-1} G^T, H = decay I + (1/n) sum_i (diag p_i - p_i p_i^T) x x_i x_i^T."""
    probabilities, inputs = torch.softmax(at.digits.train @ at.weights.T, 1), at.digits.train
    width = inputs.shape[1]
    hessian = inputs.new_zeros(CLASSES * width, CLASSES * width)
    for a in range(CLASSES):
        for b in range(a, CLASSES):
            weight = probabilities[:, a] * (int(a == b) - probabilities[:, b])
            block = inputs.T @ (weight[:, None] * inputs) / len(inputs)
            hessian[a * width : (a + 1) * width, b * width : (b + 1) * width] = block
            hessian[b * width : (b + 1) * width, a * width : (a + 1) * width] = block
    hessian.diagonal().add_(DECAY + at.damping)
    return _dense(at, hessian)


def _dense(at: Trained, curvature: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(curvature)
    return torch.cholesky_solve(at.query.T, factor).T @ at.train.T


def dual_fisher(at: Trained) -> Tensor:
    """(m, n) n C (K + n lambda I)^{-1}."""
    return FisherDual(at.products, at.damping).products()


def hessian_root(at: Trained) -> Tensor:
    """(10 n, d) J with H = decay I + J^T J / n: row (i, k) is column k of diag(s_i) (I - s_i s_i^T) times x_i, s = sqrt p."""
    root = torch.softmax(at.digits.train @ at.weights.T, 1).sqrt()  # (n, 10)
    columns = torch.diag_embed(root) - root[:, :, None].square() * root[:, None, :]  # (n, 10, 10) [class, k]
    return torch.einsum("nck,np->nkcp", columns, at.digits.train).flatten(2).flatten(0, 1)


def dual_hessian(at: Trained) -> Tensor:
    """(m, n) n V J^T (n (decay + lambda) I + J J^T)^{-1} A^T, with G = A J, so that nothing cancels.

    Row i of A has a_i = s_i - e_y / s_iy in the ten places of point i, since diag(s) (I - s s^T) a = p - e_y.
    """
    root, n = hessian_root(at), len(at.train)
    s = torch.softmax(at.digits.train @ at.weights.T, 1).sqrt()  # (n, 10)
    chosen = torch.nn.functional.one_hot(at.digits.train_classes, CLASSES)
    spread = torch.zeros(n, n, CLASSES, dtype=s.dtype)
    spread[torch.arange(n), torch.arange(n)] = s - chosen / s
    gram = root @ root.T
    gram.diagonal().add_(n * (DECAY + at.damping))
    solved = torch.cholesky_solve(spread.flatten(1).T, torch.linalg.cholesky(gram))
    return n * (at.query @ root.T) @ solved


def series(at: Trained, iterations: int) -> Tensor:
    """(m, n) by LiSSA."""
    return LiSSA(at.products, at.damping, iterations).products()


def conjugate_gradients(at: Trained, iterations: int) -> Tensor:
    """(m, n) by at most so many products with lambda I + G^T G / n a query."""
    n, width = at.train.shape
    train = at.train.numpy()
    fisher = LinearOperator((width, width), matvec=lambda x: at.damping * x + train.T @ (train @ x) / n)
    solved = [cg(fisher, v, rtol=1e-12, maxiter=iterations)[0] for v in at.query.numpy()]
    return torch.stack([torch.from_numpy(x) for x in solved]) @ at.train.T


def eigenvalue_corrected(at: Trained) -> Tensor:
    """(m, n) EK-FAC in the basis of E[delta delta^T] x E[x x^T], its eigenvalues measured on G; the same lambda.

    With n points the right factor has rank n at most, and outside its span EK-FAC is lambda I: the thin basis is exact.
    """
    width = at.digits.train.shape[1]
    deltas = output_gradients(at.weights, at.digits.train, at.digits.train_classes)
    left = torch.linalg.eigh(deltas.T @ deltas)[1]  # (10, 10)
    right = torch.linalg.svd(at.digits.train, full_matrices=False)[2].T  # (p, min(n, p))

    def rotated(rows: Tensor) -> Tensor:
        return (left.T @ rows.view(-1, CLASSES, width) @ right).flatten(1)

    train, query = rotated(at.train), rotated(at.query)
    eigenvalues = train.square().mean(0)
    return (query / (eigenvalues + at.damping)) @ train.T  # training gradients lie in the span


def methods(iterations: tuple[int, ...] = (1, 5, 10, 100)) -> Iterator[tuple[str, Callable[[Trained], Tensor]]]:
    """The approximations by name."""
    yield "GradSim", lambda at: at.query @ at.train.T
    yield "DataInf", lambda at: DataInf(at.products, at.damping).products()
    for count in iterations:
        yield f"LiSSA {count}", partial(series, iterations=count)
    yield "LiSSA 10, released", lambda at: ReleasedLiSSA(at.products, at.damping, 10).products()
    yield "EK-FAC", eigenvalue_corrected
    yield "CG 10", partial(conjugate_gradients, iterations=10)
    yield "exact Fisher, dual", dual_fisher


def timed(work: Callable[[], Tensor], repeats: int = REPEATS) -> tuple[Tensor, float]:
    """The result, and the median time of some runs in seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """L2 of all scores, the same over the norm of the exact ones, that after the best scaling, and mean rank correlation."""
    cosine = float((found * exact).sum() / (found.norm() * exact.norm()))
    ranks = [float(spearmanr(a, b).statistic) for a, b in zip(found, exact, strict=True)]
    return {
        "l2": float((found - exact).norm()),
        "relative": float((found - exact).norm() / exact.norm()),
        "scaled": float(max(0.0, 1 - cosine**2) ** 0.5),
        "spearman": statistics.fmean(ranks),
    }


def residual(at: Trained, curvature: str) -> float:
    """|| (damping + curvature) x - v || / || v ||, x from the dual solve of the first query, products by curvlinops."""
    from curvlinops import EFLinearOperator, HessianLinearOperator

    n, v = len(at.train), at.query[0]
    rows = at.train if curvature == "fisher" else hessian_root(at)
    ridge = at.damping + (DECAY if curvature == "hessian" else 0)
    gram = rows @ rows.T
    gram.diagonal().add_(n * ridge)
    x = (v - rows.T @ torch.cholesky_solve((rows @ v)[:, None], torch.linalg.cholesky(gram))[:, 0]) / ridge
    layer = nn.Linear(at.weights.shape[1], CLASSES, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(at.weights)
    kind: Any = EFLinearOperator if curvature == "fisher" else HessianLinearOperator
    data = [(at.digits.train, at.digits.train_classes)]
    operator = kind(layer, nn.CrossEntropyLoss(), list(layer.parameters()), data, check_deterministic=False)
    return float((operator @ x + ridge * x - v).norm() / v.norm())
