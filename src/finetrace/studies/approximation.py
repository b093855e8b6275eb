"""How far approximate influences are from exact ones, and what they cost (Fig. 3 and Table 5 of arXiv 2409.19998).

One linear layer on digits. Exact has two meanings: the damped empirical Fisher that the study's released code inverts, and
the damped Hessian of its Eq. 2, here of all that was minimised, weight decay included. Each approximation stands against
each of them with the same ridge: lambda, and for the Hessian lambda + decay. Both are solved densely where a d x d matrix
fits, and by the identities of `finetrace.curvature.fisher` everywhere, whose solutions are put back into the system by
products.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from scipy.sparse.linalg import cg
from scipy.stats import spearmanr
from torch import Tensor, nn

from finetrace.curvature import Damping, DampingRule, DataInf, LiSSA, Products, ReleasedLiSSA
from finetrace.curvature.fisher import FisherDual
from finetrace.host_memory import available_memory
from finetrace.studies.mnist import (
    CLASSES,
    Digits,
    gradients,
    output_gradients,
    softmax_hessian,
    softmax_regression,
)

Truth = Literal["fisher", "hessian"]
TRUTHS: tuple[Truth, ...] = ("fisher", "hessian")
QUERIES = 5
DECAY = 1e-3
DAMPINGS: dict[str, tuple[float, DampingRule]] = {"paper": (0.1, "entry"), "default": (0.01, "trace")}
REPEATS = 3
HESSIAN_ROWS = 10_000


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

    def hessian_fits(self) -> bool:
        """Whether the dual Hessian does, which factors a matrix of ten rows a point."""
        return CLASSES * self.points <= HESSIAN_ROWS

    def dense_fits(self) -> bool:
        """Whether half of this machine's memory holds them, and two thirds of what is available by now."""
        memory: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = available_memory()
        return self.dense_bytes <= memory // 2 and (available is None or 3 * self.dense_bytes <= 2 * available)


@dataclass(frozen=True, eq=False)
class Trained:
    """A layer at the minimum of its training loss, and gradients there.

    Attributes:
        digits: The points.
        weights: (10, p).
        train, query: (n, 10 p) and (m, 10 p) gradients.
        damping: lambda.
        decay: What was minimised beside the loss: decay / 2 ||W||^2.
    """

    digits: Digits
    weights: Tensor
    train: Tensor
    query: Tensor
    damping: float
    decay: float = DECAY

    @classmethod
    def of(cls, size: Size, damping: str, seed: int) -> Trained:
        """Draw, train, differentiate."""
        digits = Digits.draw(size.points, QUERIES, size.side, seed)
        weights = softmax_regression(digits.train, digits.train_classes, DECAY)
        train = gradients(weights, digits.train, digits.train_classes)
        query = gradients(weights, digits.test, digits.test_classes)
        value = Damping(*DAMPINGS[damping]).of(Products.of(train, query), size.parameters)
        return cls(digits, weights, train, query, value, DECAY)

    @property
    def products(self) -> Products:
        """With nothing computed yet, so that every method bears its own cost."""
        return Products.of(self.train, self.query)

    def ridge(self, truth: Truth) -> float:
        """What is added to the curvature: lambda, and to the Hessian the weight decay that was minimised with the loss."""
        return self.damping + (self.decay if truth == "hessian" else 0.0)


def dense(at: Trained, truth: Truth) -> Tensor:
    """(m, n) V (ridge I + curvature)^{-1} G^T by a Cholesky factor of the d x d matrix."""
    curvature = (
        at.train.T @ at.train / len(at.train) if truth == "fisher" else softmax_hessian(at.weights, at.digits.train)
    )
    curvature.diagonal().add_(at.ridge(truth))
    factor = torch.linalg.cholesky(curvature)
    return torch.cholesky_solve(at.query.T, factor).T @ at.train.T


def dual(at: Trained, truth: Truth) -> Tensor:
    """(m, n) n C (K + n lambda I)^{-1}, or for the Hessian n V J^T (n ridge I + J J^T)^{-1} A^T with G = A J.

    Nothing cancels in either. Row i of A has a_i = s_i - e_y / s_iy in the ten places of point i, since
    diag(s) (I - s s^T) a = p - e_y.
    """
    if truth == "fisher":
        return FisherDual(at.products, at.damping).products()
    gram, right = _hessian_system(at)
    return right @ torch.cholesky_solve(_spread(at).flatten(1).T, torch.linalg.cholesky(gram))


def hessian_root(at: Trained) -> Tensor:
    """(10 n, d) J with H = J^T J / n: row (i, k) is column k of diag(s_i) (I - s_i s_i^T) times x_i, s = sqrt p."""
    return torch.einsum("nkc,np->nkcp", _columns(at), at.digits.train).flatten(2).flatten(0, 1)


def _columns(at: Trained) -> Tensor:
    """(n, 10, 10) columns of diag(s_i) (I - s_i s_i^T), a row a column."""
    root = torch.softmax(at.digits.train @ at.weights.T, 1).sqrt()  # (n, 10)
    return torch.diag_embed(root) - root[:, :, None] * root[:, None, :].square()


def _hessian_system(at: Trained) -> tuple[Tensor, Tensor]:
    """(10 n, 10 n) n ridge I + J J^T and (m, 10 n) n V J^T.

    Rows of J are Kronecker products, so that their inner products are products of two small ones: no row is written out.
    """
    columns, inputs, n = _columns(at), at.digits.train, len(at.train)
    flat = columns.flatten(0, 1)  # (10 n, 10)
    gram = (flat @ flat.T).view(n, CLASSES, n, CLASSES) * (inputs @ inputs.T)[:, None, :, None]
    gram = gram.view(CLASSES * n, CLASSES * n)
    gram.diagonal().add_(n * at.ridge("hessian"))
    seen = at.query.view(-1, CLASSES, inputs.shape[1]) @ inputs.T  # (m, 10, n)
    return gram, n * torch.einsum("mcn,nkc->mnk", seen, columns).flatten(1)


def _spread(at: Trained) -> Tensor:
    """(n, n, 10) A, a row a point."""
    n = len(at.train)
    s = torch.softmax(at.digits.train @ at.weights.T, 1).sqrt()  # (n, 10)
    chosen = torch.nn.functional.one_hot(at.digits.train_classes, CLASSES)
    spread = torch.zeros(n, n, CLASSES, dtype=s.dtype)
    spread[torch.arange(n), torch.arange(n)] = s - chosen / s
    return spread


def series(at: Trained, truth: Truth, iterations: int) -> Tensor:
    """(m, n) by LiSSA on the empirical Fisher."""
    return LiSSA(at.products, at.ridge(truth), iterations).products()


def conjugate_gradients(at: Trained, truth: Truth, iterations: int) -> Tensor:
    """(m, n) by at most so many steps a query in the dual system: of n unknowns, and for the Hessian of 10 n."""
    if truth == "fisher":
        products, n = at.products, len(at.train)
        gram, right, back = products.gram.clone(), n * products.cross, torch.eye(n, dtype=torch.float64)
        gram.diagonal().add_(n * at.damping)
    else:
        gram, right = _hessian_system(at)
        back = _spread(at).flatten(1).T
    matrix = gram.numpy()
    solved = [cg(matrix, v, rtol=1e-13, maxiter=iterations)[0] for v in right.numpy()]
    return torch.stack([torch.from_numpy(x) for x in solved]) @ back


def eigenvalue_corrected(at: Trained, truth: Truth) -> Tensor:
    """(m, n) EK-FAC. Against the Fisher with the data's labels, against the Hessian with the model's, in expectation.

    Basis: eigenvectors of E[delta delta^T] x E[x x^T]; eigenvalues the mean of the squared gradients in it. For a softmax the
    Fisher under the model's own labels is the Hessian. With n points the right factor has rank n at most, and outside its
    span EK-FAC is ridge I: the thin basis is exact.
    """
    width = at.digits.train.shape[1]
    right = torch.linalg.svd(at.digits.train, full_matrices=False)[2].T  # (p, min(n, p))
    if truth == "fisher":
        deltas = output_gradients(at.weights, at.digits.train, at.digits.train_classes)
        outer = deltas[:, :, None] * deltas[:, None, :]
    else:
        p = torch.softmax(at.digits.train @ at.weights.T, 1)
        outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # E over labels of delta delta^T
    left = torch.linalg.eigh(outer.sum(0))[1]  # (10, 10)
    seen = torch.einsum("ca,ncd,da->na", left, outer, left)  # (n, 10) second moments in the left basis
    eigenvalues = (seen.T @ (at.digits.train @ right).square() / len(seen)).flatten()

    def rotated(rows: Tensor) -> Tensor:
        return (left.T @ rows.view(-1, CLASSES, width) @ right).flatten(1)

    train, query = rotated(at.train), rotated(at.query)
    return (query / (eigenvalues + at.ridge(truth))) @ train.T  # training gradients lie in the span


Contender = Callable[[Trained, Truth], Tensor]


def methods(iterations: tuple[int, ...] = (1, 5, 10, 100)) -> dict[str, Contender]:
    """The approximations by name; curvature is that of the empirical Fisher but for EK-FAC and conjugate gradients."""
    found: dict[str, Contender] = {
        "GradSim": lambda at, truth: at.query @ at.train.T,
        "DataInf": lambda at, truth: DataInf(at.products, at.ridge(truth)).products(),
    }
    found |= {f"LiSSA {count}": partial(series, iterations=count) for count in iterations}
    found["LiSSA 10, released"] = lambda at, truth: ReleasedLiSSA(at.products, at.ridge(truth), 10).products()
    found["EK-FAC"] = eigenvalue_corrected
    found |= {f"CG {count}": partial(conjugate_gradients, iterations=count) for count in (10, 50)}
    return found


def timed(work: Callable[[], Tensor], repeats: int = REPEATS) -> tuple[Tensor, float]:
    """The result, and the median time of some runs in seconds; of one run where that takes a second."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < 1:
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """L2 of all scores, the same over the norm of the exact ones, that after the best scaling, and mean rank correlation."""
    best = found * ((found * exact).sum() / found.square().sum())
    ranks = [float(spearmanr(a, b).statistic) for a, b in zip(found, exact, strict=True)]
    return {
        "l2": float((found - exact).norm()),
        "relative": float((found - exact).norm() / exact.norm()),
        "scaled": float((best - exact).norm() / exact.norm()),
        "spearman": statistics.fmean(ranks),
    }


def put_back(at: Trained, truth: Truth, scores: Tensor) -> dict[str, float]:
    """The dual solution X (m, d) put back into the system, products with the curvature by curvlinops.

    `residual`: the largest || (ridge + curvature) x - v || / || v || of a query. `scores`: || X G^T - scores || / || scores ||
    of the (m, n) dual scores that are given.
    """
    from curvlinops import EFLinearOperator, HessianLinearOperator

    n, v, ridge = len(at.train), at.query, at.ridge(truth)
    if truth == "fisher":
        rows, gram = at.train, at.train @ at.train.T
        gram.diagonal().add_(n * ridge)
    else:
        rows, (gram, _) = hessian_root(at), _hessian_system(at)
    x = (v - torch.cholesky_solve(rows @ v.T, torch.linalg.cholesky(gram)).T @ rows) / ridge
    layer = nn.Linear(at.weights.shape[1], CLASSES, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(at.weights)
    kind: Any = EFLinearOperator if truth == "fisher" else HessianLinearOperator
    data = [(at.digits.train, at.digits.train_classes)]
    operator = kind(layer, nn.CrossEntropyLoss(), list(layer.parameters()), data, check_deterministic=False)
    left = (operator @ x.T).T + ridge * x - v
    return {
        "residual": float((left.norm(dim=1) / v.norm(dim=1)).max()),
        "scores": float((x @ at.train.T - scores).norm() / scores.norm()),
    }
