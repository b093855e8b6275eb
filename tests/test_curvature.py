"""Every inverse curvature against a dense twin built by brute force, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetrace.curvature import (
    Damping,
    DataInf,
    FisherDual,
    FisherPrimal,
    Identity,
    LiSSA,
    Products,
    ReleasedLiSSA,
    fisher,
)
from finetrace.curvature.lissa import largest_eigenvalue
from finetrace.curvature.products import Gradients

SHAPES = [(7, 20, 3), (30, 12, 4), (1, 5, 1), (5, 5, 2)]


def gradients(n: int, d: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=torch.float64),
        torch.randn(m, d, generator=generator, dtype=torch.float64),
    )


def dense_fisher(train: Tensor, damping: float) -> Tensor:
    d = train.shape[1]
    return torch.linalg.inv(train.T @ train / len(train) + damping * torch.eye(d, dtype=torch.float64))


def dense_datainf(train: Tensor, damping: float) -> Tensor:
    eye = torch.eye(train.shape[1], dtype=torch.float64)
    return sum(torch.linalg.inv(damping * eye + torch.outer(g, g)) for g in train) / len(train)


def dense_lissa(train: Tensor, damping: float, iterations: int, sigma: float) -> Tensor:
    eye = torch.eye(train.shape[1], dtype=torch.float64)
    hessian = train.T @ train / len(train) + damping * eye
    current = eye.clone()
    for _ in range(iterations):
        current = eye + current - current @ hessian / sigma
    return current / sigma


def assert_equal_to_dense(operator: object, inverse: Tensor, train: Tensor, query: Tensor) -> None:
    for found, wanted in (
        (operator.products(), query @ inverse @ train.T),
        (operator.train_self(), torch.einsum("nd,de,ne->n", train, inverse, train)),
        (operator.query_self(), torch.einsum("md,de,me->m", query, inverse, query)),
    ):
        scale = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= 1e-8 * scale, (type(operator).__name__, found, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 50.0])
def test_fisher_by_both_routes_is_the_dense_inverse(shape, damping):
    train, query = gradients(*shape)
    inverse = dense_fisher(train, damping)
    for route in (FisherDual, FisherPrimal):
        assert_equal_to_dense(route(Products.of(train, query), damping), inverse, train, query)


def test_fisher_takes_the_smaller_solve():
    wide, tall = gradients(4, 9, 1), gradients(9, 4, 1)
    assert isinstance(fisher(Products.of(*wide), 0.1), FisherDual)
    assert isinstance(fisher(Products.of(*tall), 0.1), FisherPrimal)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 50.0])
def test_datainf_is_the_mean_of_inverses(shape, damping):
    train, query = gradients(*shape)
    assert_equal_to_dense(DataInf(Products.of(train, query), damping), dense_datainf(train, damping), train, query)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_lissa_is_its_recurrence(shape, iterations):
    train, query = gradients(*shape)
    operator = LiSSA(Products.of(train, query), 0.1, iterations)
    inverse = dense_lissa(train, 0.1, iterations, operator.scale)
    assert_equal_to_dense(operator, inverse, train, query)


def test_lissa_converges_to_exact():
    train, query = gradients(12, 6, 3)
    wanted = query @ dense_fisher(train, 0.1) @ train.T
    errors = [
        float((LiSSA(Products.of(train, query), 0.1, t).products() - wanted).norm() / wanted.norm())
        for t in (1, 10, 100, 2000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


def test_lissa_scale_is_at_least_the_largest_eigenvalue_and_tight():
    train, query = gradients(40, 25, 1)
    top = float(torch.linalg.eigvalsh(train.T @ train / 40)[-1]) + 0.1
    scale = LiSSA(Products.of(train, query), 0.1, 1).scale
    assert top <= scale <= top * (1 + 1e-5)
    assert largest_eigenvalue(torch.zeros(6, 6, dtype=torch.float64)) == 0


@pytest.mark.parametrize(("damping", "iterations"), [(0.1, 30), (1e3, 150)])
def test_the_released_recurrence_goes_beyond_float32_where_it_diverges(damping, iterations):
    train, query = (100 * each.float() for each in gradients(12, 30, 2))
    released = ReleasedLiSSA(Products.of(train, query), damping, iterations)
    found = released.products()
    wanted = ReleasedLiSSA(Products.of(train.double(), query.double()), damping, iterations).products()
    assert float(wanted.abs().max()) > torch.finfo(torch.float32).max
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_identity_is_the_inner_product():
    train, query = gradients(6, 4, 2)
    eye = torch.eye(4, dtype=torch.float64)
    assert_equal_to_dense(Identity(Products.of(train, query)), eye, train, query)


def test_known_products_give_the_same_as_gradients():
    train, query = gradients(8, 20, 3)
    direct = Products.of(train, query)
    summed = Products.known(direct.gram, direct.cross, direct.train_sq, direct.query_sq)
    assert torch.equal(FisherDual(summed, 0.1).products(), FisherDual(direct, 0.1).products())
    assert torch.equal(DataInf(summed, 0.1).products(), DataInf(direct, 0.1).products())


def test_rows_some_at_a_time_are_multiplied_where_they_lie():
    train, query = gradients(8, 20, 3)

    def refused() -> Tensor:
        raise AssertionError("the rows were brought together")

    parts = Products(Gradients(refused, query, lambda: iter(train.split(3))))
    assert torch.allclose(parts.cross, query @ train.T, rtol=1e-14)
    assert torch.allclose(parts.train_sq, train.square().sum(1), rtol=1e-14)
    assert parts.n == 8


def test_damping_rules():
    train, query = gradients(10, 7, 1)
    products = Products.of(train, query)
    assert Damping(0.1, "entry").of(products, 7) == pytest.approx(0.1 * float(train.square().mean()), rel=1e-14)
    trace = float(torch.trace(train.T @ train / 10))
    assert Damping(0.01, "trace").of(products, 7) == pytest.approx(0.01 * trace, rel=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 12),
    multiple=st.floats(1e-2, 1e4),
    seed=st.integers(0, 10_000),
)
def test_dual_equals_primal_for_any_shape_and_damping(n, d, multiple, seed):
    train, query = gradients(n, d, 2, seed)
    damping = Damping(multiple, "entry").of(Products.of(train, query), d)
    dual, primal = FisherDual(Products.of(train, query), damping), FisherPrimal(Products.of(train, query), damping)
    for name in ("products", "train_self", "query_self"):
        a, b = getattr(dual, name)(), getattr(primal, name)()
        scale = max(float(b.abs().max()), float((query @ train.T).abs().max()) * 1e-3 / damping, 1e-300)
        assert float((a - b).abs().max()) <= 1e-8 * scale


class Logistic:
    """A ridge logistic regression trained to convergence by Newton's method, and five probes of its loss."""

    def __init__(self, n: int, d: int, ridge: float, seed: int = 0) -> None:
        self.ridge = ridge
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(n, d))
        self.y = (rng.random(n) < 1 / (1 + np.exp(-self.x @ rng.normal(size=d) / 2))).astype(float)
        self.probe = rng.normal(size=(5, d))
        self.chosen = rng.choice(n, 60, replace=False)
        self.theta = self.fit(None, np.zeros(d))

    def fit(self, without: int | None, start: np.ndarray) -> np.ndarray:
        n, d = self.x.shape
        keep = np.ones(n)
        if without is not None:
            keep[without] = 0
        theta = start
        for _ in range(12):
            p = 1 / (1 + np.exp(-self.x @ theta))
            gradient = self.x.T @ (keep * (p - self.y)) / n + self.ridge * theta
            hessian = (self.x * (keep * p * (1 - p))[:, None]).T @ self.x / n + self.ridge * np.eye(d)
            theta = theta - np.linalg.solve(hessian, gradient)
        return theta

    def probe_losses(self, theta: np.ndarray) -> np.ndarray:
        return np.log1p(np.exp(-self.probe @ theta))

    def actual(self) -> np.ndarray:
        """(5, 60): rise of each probe's loss when a chosen row is left out."""
        before = self.probe_losses(self.theta)
        return np.stack([self.probe_losses(self.fit(i, self.theta)) - before for i in self.chosen], axis=1)

    def gradients(self) -> tuple[Tensor, Tensor]:
        p = 1 / (1 + np.exp(-self.x @ self.theta))
        q = 1 / (1 + np.exp(-self.probe @ self.theta))
        return torch.from_numpy((p - self.y)[:, None] * self.x), torch.from_numpy((q - 1)[:, None] * self.probe)

    def hessian_rows(self) -> Tensor:
        """Rows whose Gram matrix over n is the Hessian of the loss."""
        p = 1 / (1 + np.exp(-self.x @ self.theta))
        return torch.from_numpy(np.sqrt(p * (1 - p))[:, None] * self.x)


def assert_predicts(actual: np.ndarray, predicted: np.ndarray) -> None:
    slope = float((actual * predicted).sum() / (predicted**2).sum())
    assert abs(slope - 1) < 0.02, slope
    assert np.corrcoef(actual.ravel(), predicted.ravel())[0, 1] > 0.99


def test_influence_with_the_hessian_predicts_leave_one_out_retraining():
    """Slope 1 and r > 0.99: absolute values, not a correlation alone. Leaving row i out moves a loss by score / n."""
    model = Logistic(2000, 8, ridge=0.05)
    train, query = model.gradients()
    inverse = dense_fisher(model.hessian_rows(), model.ridge)
    through = FisherPrimal(Products.of(model.hessian_rows(), query), model.ridge).products()
    assert torch.allclose(through, query @ inverse @ model.hessian_rows().T, rtol=1e-9)
    scores = (query @ inverse @ train.T).numpy()
    assert_predicts(model.actual(), scores[:, model.chosen] / 2000)


def test_exact_predicts_leave_one_out_retraining_of_a_well_specified_model():
    """Where the labels come from the model itself the empirical Fisher is the Hessian up to noise, so `exact` holds too."""
    model = Logistic(20_000, 6, ridge=1e-4, seed=1)
    train, query = model.gradients()
    scores = fisher(Products.of(train, query), model.ridge).products().numpy()
    assert_predicts(model.actual(), scores[:, model.chosen] / 20_000)
