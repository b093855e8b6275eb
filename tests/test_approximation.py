"""The approximation study: its curvatures against autograd and dense algebra, and the command end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from finetrace.cli import app
from finetrace.errors import FinetraceError
from finetrace.studies import approximation as study
from finetrace.studies import write
from finetrace.studies.approximation import Size, Trained
from finetrace.studies.approximation_study import APPROXIMATION, DENSE, DUAL, FISHER, FULL, LARGEST, QUICK
from finetrace.studies.approximation_study import _figure as figure
from finetrace.studies.approximation_study import _reading as reading
from finetrace.studies.approximation_study import _short as short
from finetrace.studies.approximation_study import _table as table
from finetrace.studies.mnist import CLASSES, Digits, gradients, softmax_regression
from finetrace.studies.registry import STUDIES
from finetrace.studies.study import Setting


@pytest.fixture(params=["paper", "default"])
def at(request: pytest.FixtureRequest) -> Trained:
    return Trained.of(Size(12, 4), request.param, 0)


def loss(weights: torch.Tensor, at: Trained) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(at.digits.train @ weights.view(CLASSES, -1).T, at.digits.train_classes)


def solve(at: Trained, curvature: torch.Tensor, truth: study.Truth) -> torch.Tensor:
    damped = curvature + at.ridge(truth) * torch.eye(len(curvature), dtype=torch.float64)
    return at.query @ torch.linalg.solve(damped, at.train.T)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-8) -> bool:
    return float((found - expected).norm() / expected.norm()) < tolerance


def test_gradients_are_those_of_autograd(at: Trained) -> None:
    for i in range(3):
        rows = at.digits.train[i : i + 1]
        weights = at.weights.clone().requires_grad_()
        value = torch.nn.functional.cross_entropy(rows @ weights.T, at.digits.train_classes[i : i + 1])
        (expected,) = torch.autograd.grad(value, weights)
        torch.testing.assert_close(at.train[i], expected.flatten(), rtol=1e-12, atol=1e-14)


def test_the_layer_is_at_its_minimum() -> None:
    digits = Digits.draw(30, 5, 6, 0)
    weights = softmax_regression(digits.train, digits.train_classes, 1e-2)
    mean = gradients(weights, digits.train, digits.train_classes).mean(0) + 1e-2 * weights.flatten()
    assert float(mean.norm()) < 1e-6


def test_exact_influences_are_those_of_dense_matrices(at: Trained) -> None:
    fisher = at.train.T @ at.train / len(at.train)
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, at), at.weights.flatten())
    assert at.ridge("hessian") == at.ridge("fisher") + study.DECAY
    for truth, curvature in (("fisher", fisher), ("hessian", hessian)):
        expected = solve(at, curvature, truth)
        for found in (study.dense(at, truth), study.dual(at, truth)):
            assert close(found, expected)
        assert close(study.conjugate_gradients(at, truth, 2000), expected, 1e-6)


@pytest.mark.parametrize("size", [Size(10, 20), Size(20, 40)])
@pytest.mark.parametrize("damping", ["paper", "default"])
def test_the_dual_solves_keep_their_digits(size: Size, damping: str) -> None:
    """Against a dense solve in the span of all points, where every vector of the problem lies."""
    at = Trained.of(size, damping, 0)
    span = torch.linalg.qr(torch.cat([at.digits.train, at.digits.test]).T)[0]  # (p, n + m)
    whole = torch.block_diag(*[span] * CLASSES)
    train, query, root = at.train @ whole, at.query @ whole, study.hessian_root(at) @ whole
    for rows, ridge, found in (
        (train, at.damping, study.dual(at, "fisher")),
        (root, at.damping + study.DECAY, study.dual(at, "hessian")),
    ):
        curvature = rows.T @ rows / size.points + ridge * torch.eye(whole.shape[1], dtype=torch.float64)
        assert close(found, query @ torch.linalg.solve(curvature, train.T))


def test_the_hessian_predicts_leaving_a_point_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "DECAY", 3.0)  # so that leaving one point of forty out is a small change
    digits = Digits.draw(40, 5, 8, 3)
    at = Trained.of(Size(40, 8), "paper", 3)
    predicted = study.dual(at, "hessian")
    before = torch.nn.functional.cross_entropy(digits.test @ at.weights.T, digits.test_classes, reduction="none")
    changes = torch.empty_like(predicted)
    for i in range(40):
        keep = torch.arange(40) != i
        # the mean stays over 40 points, as an influence has it
        weights = softmax_regression(digits.train[keep], digits.train_classes[keep], study.DECAY * 40 / 39)
        after = torch.nn.functional.cross_entropy(digits.test @ weights.T, digits.test_classes, reduction="none")
        changes[:, i] = after - before
    assert study.errors(predicted / 40, changes)["relative"] < 0.02


def test_every_size_can_be_drawn() -> None:
    for size in (*FULL, LARGEST, *QUICK):
        assert len(Digits.draw(size.points, study.QUERIES, 4, 0).train) == size.points


def test_ekfac_is_that_of_the_whole_basis(at: Trained) -> None:
    inputs, n = at.digits.train, len(at.train)
    deltas = at.train.view(n, CLASSES, -1)
    outputs = study.output_gradients(at.weights, inputs, at.digits.train_classes)
    torch.testing.assert_close(deltas, outputs[:, :, None] * inputs[:, None, :])
    basis = torch.kron(torch.linalg.eigh(outputs.T @ outputs)[1], torch.linalg.eigh(inputs.T @ inputs)[1])
    eigenvalues = (at.train @ basis).square().mean(0)
    expected = (at.query @ basis / (eigenvalues + at.damping)) @ (at.train @ basis).T
    assert close(study.eigenvalue_corrected(at, "fisher"), expected)


def test_ekfac_of_the_models_own_labels(at: Trained) -> None:
    """Against every label written out with its probability."""
    inputs, n = at.digits.train, len(at.train)
    p = torch.softmax(inputs @ at.weights.T, 1)
    outer, seen = torch.zeros(CLASSES, CLASSES, dtype=p.dtype), 0.0
    right = torch.linalg.eigh(inputs.T @ inputs)[1]
    every = [(i, y, p[i] - torch.eye(CLASSES, dtype=p.dtype)[y]) for i in range(n) for y in range(CLASSES)]
    for i, y, delta in every:
        outer += p[i, y] * torch.outer(delta, delta)
    left = torch.linalg.eigh(outer)[1]
    for i, y, delta in every:
        seen = seen + p[i, y] * torch.outer(left.T @ delta, right.T @ inputs[i]).square() / n
    basis = torch.kron(left, right)
    expected = (at.query @ basis / (seen.flatten() + at.ridge("hessian"))) @ (at.train @ basis).T
    assert close(study.eigenvalue_corrected(at, "hessian"), expected)


def test_products_of_another_library_agree(at: Trained) -> None:
    pytest.importorskip("curvlinops")
    for truth in study.TRUTHS:
        found = study.put_back(at, truth, study.dual(at, truth))
        assert found["residual"] < 1e-6
        assert found["scores"] < 1e-6


def test_long_series_come_to_the_exact_influence() -> None:
    at = Trained.of(Size(12, 4), "default", 1)
    exact = study.dual(at, "fisher")
    found = [study.errors(study.series(at, "fisher", count), exact) for count in (1, 10, 100, 3000)]
    assert found[0]["relative"] > found[1]["relative"] > found[2]["relative"] > found[3]["relative"]
    assert found[3]["relative"] < 1e-3
    assert study.errors(exact, exact) == pytest.approx({"l2": 0, "relative": 0, "scaled": 0, "spearman": 1}, abs=1e-7)


def test_scores_after_the_best_scaling() -> None:
    exact = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    found = study.errors(torch.tensor([[6.0, 5.0, 8.0]], dtype=torch.float64), exact)
    assert found["l2"] == pytest.approx(50**0.5)
    best = torch.tensor([6.0, 5.0, 8.0], dtype=torch.float64) * (50 / 125)
    assert found["scaled"] == pytest.approx(float((best - exact[0]).norm()) / 5)


def test_digits_are_drawn_apart_and_refused_where_there_are_not_enough() -> None:
    one, other = Digits.draw(20, 10, 8, 0), Digits.draw(20, 10, 8, 1)
    assert one.train.shape == (20, 64)
    assert not torch.equal(one.train, other.train)
    assert not any(torch.equal(a, b) for a in one.train for b in one.test)
    with pytest.raises(FinetraceError, match="4999 training and 10 test digits"):
        Digits.draw(4999, 10, 8, 0)


@pytest.mark.slow
def test_the_quick_study_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "study"
    command = ["study", "approximation", "--quick", "--seeds", "1", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "times less" in result.output
    records = json.loads((out / "results.json").read_text())["records"]
    dense = [r for r in records if r["method"] == DENSE and r["seconds"]]
    assert len(dense) == 2 * 2 * 2  # sizes that fit, dampings, meanings of exact
    for r in dense:
        same = {key: r[key] for key in ("points", "parameters", "damping", "truth")}
        [dual] = [d for d in records if d["method"] == DUAL and same.items() <= d.items()]
        assert dual["relative"] < 1e-8
        assert r["seconds"] > 10 * dual["seconds"]
    wide = [r for r in records if r["parameters"] == 100_000]
    assert all(r["seconds"] is None for r in wide if r["method"] == DENSE)
    assert all("relative" not in r and r["residual"] < 1e-3 for r in wide if r["method"] == DUAL)
    assert {r["method"] for r in wide if r["truth"] == "hessian"} >= {FISHER, "EK-FAC", "CG 50"}
    for suffix in (".png", ".svg"):
        assert (out / f"approximation{suffix}").stat().st_size > 1000
    assert "needs 149 GiB" in (out / "approximation-paper.md").read_text()
    again = CliRunner().invoke(app, command)  # everything is found again
    assert "paper damping" not in again.output
    refused = CliRunner().invoke(app, [*command[:2], *command[3:]])
    assert isinstance(refused.exception, FinetraceError)


@pytest.mark.slow
def test_the_dual_solve_is_exact_and_a_thousand_times_faster() -> None:
    narrow, wide = (Trained.of(size, "paper", 0) for size in (Size(20, 32), Size(20, 100)))
    for truth in study.TRUTHS:
        exact, dense_seconds = study.timed(lambda truth=truth: study.dense(narrow, truth), 1)  # type: ignore[misc]
        assert close(study.dual(narrow, truth), exact)
    seconds = min(study.timed(lambda: study.dual(wide, "fisher"), 1)[1] for _ in range(50))  # others' work only adds
    assert dense_seconds > 1000 * seconds  # the dense one of ten times fewer parameters; 100,000 need 149 GiB


def test_what_checks_the_solutions_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FinetraceError, match="curvlinops"):
        APPROXIMATION.pieces(tmp_path, Setting(True, 1))
    assert not list(tmp_path.iterdir())


def test_studies_are_listed_with_their_cost() -> None:
    listed = CliRunner().invoke(app, ["study", "--list"]).output
    for name, each in STUDIES.items():
        assert name in listed
        assert "minute" in each.cost(Setting(True))
        assert re.search("minute|hour", each.cost(Setting(False)))
    assert isinstance(CliRunner().invoke(app, ["study", "nothing"]).exception, FinetraceError)
    assert isinstance(CliRunner().invoke(app, ["study"]).exception, FinetraceError)


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "study.json").write_text(json.dumps({"study": "other"}))
    with pytest.raises(FinetraceError, match="other settings"):
        write.run(APPROXIMATION, tmp_path, Setting(quick=True), lambda text: None)


def test_times_in_words_are_medians_over_seeds_and_differences_the_largest() -> None:
    records = []
    for seed, (dense, dual, apart) in enumerate([(8.0, 0.002, 1e-12), (10.0, 0.001, 3e-12), (30.0, 0.004, 2e-12)]):
        about = {"points": 20, "parameters": 10_240, "damping": "paper", "truth": "fisher", "seed": seed}
        records += [
            {**about, "method": DENSE, "seconds": dense, "bytes": 2**30},
            {**about, "method": DUAL, "seconds": dual, "relative": apart, "residual": apart, "scores": apart / 2},
        ]
        wide = {**about, "parameters": 100_000}
        records += [
            {**wide, "method": DENSE, "seconds": None, "bytes": 149 * 2**30},
            {**wide, "method": DUAL, "seconds": dual / 2, "residual": apart, "scores": apart},
        ]
    said = reading(records)
    assert said[0] == (
        "20 points, 10,240 parameters, empirical Fisher: the dense solve takes 10 s and 1 GiB, the dual one "
        "0.002 s (5,000 times less); they differ by 3.0e-12 at most."
    )
    assert said[1] == (
        "At 20 points and 100,000 parameters a dense solve needs 149 GiB; the dual one takes 0.001 s, and the dense one of "
        "10,240 parameters 10,000 times as long."
    )
    assert said[2].endswith("differ from the dual scores by at most 3.0e-12.")


def test_a_seed_without_a_dense_solve_is_left_out_of_what_dense_and_dual_are_compared_by() -> None:
    about = {"points": 20, "parameters": 23_040, "damping": "paper", "truth": "fisher"}
    solved = {"residual": 1e-12, "scores": 1e-12}
    records = [
        {**about, "seed": 0, "method": DENSE, "seconds": 100.0, "bytes": 8 * 2**30},
        {**about, "seed": 0, "method": DUAL, "seconds": 0.001, "relative": 2e-12, **solved},
        {**about, "seed": 1, "method": DENSE, "seconds": None, "bytes": 8 * 2**30},
        {**about, "seed": 1, "method": DUAL, "seconds": 0.5, **solved},
    ]
    assert "100 s and 8 GiB, the dual one 0.001 s (100,000 times less); they differ by 2.0e-12" in reading(records)[0]


def test_the_figure_shows_errors_ranks_and_times_of_seeds_that_agree() -> None:
    size = Size(20, 32)
    about = {"points": 20, "parameters": size.parameters, "damping": "paper"}
    values = {"l2": 0.1, "relative": 0.7, "scaled": 0.1, "spearman": 0.1, "seconds": 0.1}  # a mean of three 0.1 is more
    records = [
        {**about, "seed": seed, "truth": truth, "method": method, **values}
        for seed in range(3)
        for truth in study.TRUTHS
        for method in ("GradSim", DUAL)
    ]
    axes = figure(records, (size,)).axes
    assert [axis.get_xscale() for axis in axes] == ["log", "log", "log", "linear", "linear", "log"]
    assert all(len(axis.containers) == 2 for axis in axes)


def test_the_seconds_of_a_table_say_what_they_are_against() -> None:
    size = Size(20, 32)
    about = {"points": 20, "parameters": size.parameters, "damping": "paper", "seed": 0}
    records = [
        {**about, "truth": truth, "method": method, "seconds": seconds}
        for truth, method, seconds in (("fisher", DUAL, 0.5), ("hessian", DUAL, 14.0), ("hessian", FISHER, 0.7))
    ]
    heads, lines = table(records, (size,), "paper")
    assert heads[-1] == "seconds, empirical Fisher"
    assert [line[-1] for line in lines] == ["0.5", "0.7"]
    axes = figure(records, (size,)).axes
    assert sum("seconds" in axis.get_xlabel() and "empirical Fisher" in axis.get_xlabel() for axis in axes) == 1


def test_hundreds_of_seconds_are_written_out() -> None:
    assert short((156.2, 154.0, 1290.0)) == "156 (154 to 1,290)"
    assert short((0.00123, 0.00123, 0.00123)) == "0.0012"
