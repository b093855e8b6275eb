"""Solvers of (F + lambda I) x = q against torch.linalg.solve in float64; a tolerance that is not met is an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetrace.attribution.exact import Exact
from finetrace.curvature.conjugate_gradients import IterativeStream
from finetrace.curvature.dual import DualStream
from finetrace.curvature.fisher import FisherDual
from finetrace.curvature.lissa import SeriesStream, largest_eigenvalues
from finetrace.curvature.nystroem import nystroem
from finetrace.curvature.primal import PrimalStream
from finetrace.curvature.products import Products
from finetrace.curvature.refinement import Solution, refined
from finetrace.curvature.solvers import PASSES, choose
from finetrace.curvature.streamed import Streamed
from finetrace.curvature.train_rows import HeldRows
from finetrace.errors import FinetraceError

SEGMENTS = [slice(0, 12), slice(12, 52), slice(52, 57)]  # fewer and more columns than the 30 rows
SOLVERS = ["dual", "primal", "cg", "nystroem"]


def rows(dtype: torch.dtype, segments: list[slice] = SEGMENTS) -> HeldRows:
    """Gradients with a shared direction and columns of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(30, 57, generator=generator, dtype=torch.float64)
    train = train * torch.logspace(0, -2, 57, dtype=torch.float64) + torch.randn(
        57, generator=generator, dtype=torch.float64
    )
    return HeldRows(train.to(dtype), segments, step=7)


def solver(name: str, at: HeldRows, damping: Tensor, tolerance: float) -> Streamed:
    if name == "dual":
        return DualStream(at, damping, tolerance)
    if name == "primal":
        return PrimalStream(at, damping, tolerance)
    return IterativeStream(at, damping, tolerance, nystroem(at, 10) if name == "nystroem" else None)


def direct(at: HeldRows, damping: Tensor, vectors: Tensor) -> Tensor:
    """(m, D) by LU decomposition of every segment's matrix."""
    result = torch.zeros(vectors.shape, dtype=torch.float64)
    for k, s in enumerate(at.segments):
        if float(damping[k]) > 0:
            part = at.train[:, s].double()
            matrix = part.T @ part / len(part) + float(damping[k]) * torch.eye(part.shape[1], dtype=torch.float64)
            result[:, s] = torch.linalg.solve(matrix, vectors[:, s].double().T).T
    return result


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_solutions_are_those_of_a_direct_solve(name: str, joint: bool, dtype: torch.dtype, tolerance: float) -> None:
    at = rows(dtype, [slice(0, 57)] if joint else SEGMENTS)
    traces = torch.stack([at.train[:, s].double().square().sum(1).mean() for s in at.segments])
    damping = 0.01 * traces
    vectors = torch.randn(4, 57, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = solver(name, at, damping, tolerance)
    found, wanted = made.solve(vectors), direct(at, damping, vectors)
    for k, s in enumerate(at.segments):  # ||x - x*|| <= residual / lambda
        bound = tolerance * vectors[:, s].norm(dim=1) / damping[k]
        assert ((found[:, s] - wanted[:, s]).norm(dim=1) <= bound).all()
    assert made.found.solver == name
    assert 0 < made.found.residual <= tolerance


@pytest.mark.parametrize("name", SOLVERS)
def test_a_segment_without_damping_is_left_out(name: str) -> None:
    at = rows(torch.float64)
    damping = torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64)
    vectors = torch.randn(2, 57, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = solver(name, at, damping, 1e-10).solve(vectors)
    assert not found[:, SEGMENTS[1]].any()
    assert torch.allclose(found, direct(at, damping, vectors), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_without_any_gradient_have_no_solution_but_zero(name: str) -> None:
    at = HeldRows(torch.zeros(5, 57, dtype=torch.float64), [slice(0, 57)])
    found = solver(name, at, torch.zeros(1, dtype=torch.float64), 1e-10).solve(torch.ones(2, 57))
    assert not found.any()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_tolerance_that_is_not_met_is_an_error(name: str) -> None:
    """No double reaches 1e-20."""
    made = solver(name, rows(torch.float64), torch.full((3,), 0.1, dtype=torch.float64), 1e-20)
    vectors = torch.randn(2, 57, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with pytest.raises(
        FinetraceError, match=f"solver {name} reaches a relative residual of .* not the tolerance 1e-20"
    ):
        made.solve(vectors)


@pytest.mark.parametrize("wrong", [0.0, 2.5, float("nan")])
def test_a_solver_that_is_wrong_is_found_out(wrong: float) -> None:
    """The residual is measured, not believed."""
    at, damping = rows(torch.float64), torch.full((3,), 0.1, dtype=torch.float64)
    vectors = torch.randn(2, 57, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with pytest.raises(FinetraceError, match="not the tolerance"):
        refined(at, damping, vectors, lambda left: wrong * left, 1e-6, Solution("cg"))


@pytest.mark.parametrize("vectors", [1, 8])
def test_largest_eigenvalues_are_found_in_passes(vectors: int) -> None:
    """Of segments wider and narrower than the basis, and of one whose gradients are all zero."""
    at = rows(torch.float64)
    at.train[:, 12:20] = 0
    at = HeldRows(at.train, [slice(0, 12), slice(12, 20), slice(20, 52), slice(52, 57)], step=7)
    wanted = torch.stack([torch.linalg.eigvalsh(at.train[:, s].T @ at.train[:, s] / 30)[-1] for s in at.segments])
    found = largest_eigenvalues(at, vectors)
    assert float(found[1]) == 0
    assert bool((found >= wanted * (1 - 1e-12)).all())
    assert bool((found <= wanted * (1 + 2e-6)).all())


@pytest.mark.parametrize("released", [False, True])
def test_a_streamed_series_is_its_definition(released: bool) -> None:
    """Five steps with d x d matrices written out; a segment without damping has no score."""
    at = rows(torch.float64)
    damping = torch.tensor([0.3, 0.02, 0.0], dtype=torch.float64)
    vectors = torch.randn(4, 57, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    largest = largest_eigenvalues(at)
    made = SeriesStream.released(at, damping, 5) if released else SeriesStream.of(at, damping, largest, 5)
    found = made.apply(vectors)
    for k, s in enumerate(at.segments):
        part, v = at.train[:, s], vectors[:, s]
        fisher, eye = part.T @ part / 30, torch.eye(part.shape[1], dtype=torch.float64)
        sigma = 1000.0 if released else float(damping[k] + largest[k])
        r = v
        for _ in range(5):
            r = v + r - r @ (fisher - damping[k] * eye if released else fisher + damping[k] * eye) / sigma
        wanted = (r if released else r / sigma) * (damping[k] > 0)
        assert torch.allclose(found[:, s], wanted, rtol=1e-11, atol=1e-13)


def test_the_cheapest_solver_counts_what_it_reads() -> None:
    """A million rows, one query: iterations multiply less than a primal solve, and read the rows five times as often."""
    wide, narrow = [4096] * 2, [64] * 16
    assert choose(10**6, 1, narrow, 1 << 30, own=False) == "primal"
    assert choose(10**6, 1, wide, 1 << 30, own=False) == "nystroem"
    assert choose(10**6, 1, wide, 1 << 30, own=True) == "primal"
    assert choose(100, 50, wide, 1 << 30, own=False) == "dual"
    assert choose(10**6, 1, [10**5], 1 << 20, own=False) == "cg"
    assert PASSES * 4 * 64 < 2 * 64**2  # by multiplications alone, iterations would win on narrow blocks


@pytest.mark.parametrize(("n", "width"), [(200, 50), (60, 2000)])  # primal and dual
def test_in_memory_the_rounding_of_products_is_named_beside_the_residual(n: int, width: int) -> None:
    """Of gradients with much in common and little damping: put back in float64, far more is left than of the float32 products."""
    drawn = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(1, width, generator=drawn)
    train = common + torch.randn(n, width, generator=drawn) * torch.logspace(0, -3, width)
    query = common + torch.randn(4, width, generator=drawn)
    computed: dict[str, Any] = {}
    problem: Any = SimpleNamespace(
        features=SimpleNamespace(gradients=query),
        computed=computed,
        products=lambda: iter([(SimpleNamespace(size=width, entries=width), Products.of(train, query))]),
    )
    method = Exact(damping=1e-6)
    for part in method.parts(problem):
        part.products()
        solved, damping = part._solved, part.damping
    g, v = train.double(), query.double()
    x = solved if width < n else (v - solved @ g) / damping
    left = float((((x @ g.T) @ g / n + damping * x - v).norm(dim=1) / v.norm(dim=1)).max())
    [said] = computed.values()
    assert said["residual"] < 1e-6 < left
    assert left <= said["residual"] + said["rounding"] < 0.1


@pytest.mark.parametrize("n", [2, 5, 10, 11])
def test_products_of_few_rows_are_symmetric(n: int) -> None:
    """A product of so few rows is summed in one order above its diagonal and in another below, and a factor is of one half."""
    drawn = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(1, 3072, generator=drawn)
    train, query = (common + torch.randn(rows, 3072, generator=drawn) for rows in (n, 4))
    products = Products.of(train, query)
    assert torch.equal(products.gram, products.gram.T)
    solved = FisherDual(products, 1e-4 * float(products.train_sq.mean()))
    solved.products()
    assert solved.residual() < 1e-11


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_in_memory_a_small_damping_is_solved_to_the_tolerance(rows: int) -> None:
    """A Cholesky factor alone leaves 1e-10 and more of a query at a millionth of the trace."""
    drawn = torch.Generator().manual_seed(1)
    common = 3 * torch.randn(1, 500, generator=drawn, dtype=torch.float64)
    train = common + torch.randn(rows, 500, generator=drawn, dtype=torch.float64)
    query = common + torch.randn(3, 500, generator=drawn, dtype=torch.float64)
    damping = 1e-6 * float(train.square().sum(1).mean())
    solved = FisherDual(Products.of(train, query), damping)
    found = solved.products()
    assert solved.residual() <= 1e-10
    dense = torch.linalg.inv(train.T @ train / rows + damping * torch.eye(500, dtype=torch.float64))
    wanted = query @ dense @ train.T
    assert float((found - wanted).abs().max()) <= 1e-8 * float(wanted.abs().max())  # the dense inverse is off by 3e-9
