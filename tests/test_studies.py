"""Studies of fine-tuned language models on a tiny one, end to end, against what mathematics says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from finetrace.attribution import make
from finetrace.evaluation.metrics import relevance
from finetrace.studies import capacity, cells, convergence, damping, iterations, layers, normalisation, plots
from finetrace.studies.capacity import CAPACITY
from finetrace.studies.controls import BOTH, PROMPTS
from finetrace.studies.convergence import CONVERGENCE
from finetrace.studies.damping import DAMPING, MULTIPLES
from finetrace.studies.iterations import COUNTS, ITERATIONS
from finetrace.studies.layers import LAYERS
from finetrace.studies.normalisation import NORMALISATION
from finetrace.studies.records import of_seeds, percent, spread
from finetrace.studies.study import Setting, Study
from finetrace.studies.write import run
from tiny import make_llama, make_tokenizer, save_base


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("studies")
    base = save_base(root / "base", make_llama(), make_tokenizer())
    return Setting(True, 2, str(base), "float32", "cpu", root / "cells")


def quiet(text: str) -> None:
    """Nobody listens."""


def results(folder: Path) -> list[dict[str, Any]]:
    """What a study found; its controls, which have no parameter of the study, are the same whatever was asked."""
    records = json.loads((folder / "results.json").read_text())["records"]
    assert {r["spec"] for r in records if r.get("control")} == {make(spec).label for spec in (*PROMPTS, *BOTH)}
    assert (folder / "controls.md").exists()
    return [r for r in records if not r.get("control")]


@pytest.mark.slow
def test_damping_goes_from_one_limit_to_the_other(setting: Setting, tmp_path: Path) -> None:
    outcome = run(DAMPING, tmp_path / "d", setting, quiet)
    records = results(tmp_path / "d")
    assert len(records) == 4 * len(MULTIPLES) + 2
    found = cells.prepared(damping.QUICK.cells(setting)[0], setting.home(tmp_path), quiet)
    assert found is not None
    products = make("gradsim").score(found.problem).values
    lam = 1e8 * float(found.problem.joint.train_sq.mean())  # P tends to I / lambda
    limit = make("exact:scope=joint,damping=1e8").score(found.problem).values
    np.testing.assert_allclose(lam * limit, products, rtol=1e-5, atol=1e-6 * np.abs(products).max())
    assert all(r["coverage_low"] <= r["coverage"] <= r["coverage_high"] for r in records)
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert {"damping.md", "damping.tex", "damping-scores.png", "damping-accuracy.svg", "spectrum.png"} <= names
    default = [r for r in records if r["multiple"] == 0.01]
    assert [r["with_default"] for r in default] == pytest.approx([1.0] * len(damping.CURVES))
    undamped = next(r for r in records if r["curve"] == "exact, joint" and r["multiple"] == max(MULTIPLES))
    assert undamped["with_none"] > 0.99
    sizes = [block.size for block in found.problem.blocks]
    assert all(r["paper_joint"] == pytest.approx(0.1 / sum(sizes)) for r in records)
    for r in records:  # 0.1 of the mean squared entry, against the trace: the sum of all d of them
        assert (r["paper_low"], r["paper_high"]) == pytest.approx((0.1 / max(sizes), 0.1 / min(sizes)))
    again: list[str] = []
    assert run(DAMPING, tmp_path / "d", setting, again.append).records == outcome.records
    assert not again  # every part was found


def test_the_spectrum_is_that_of_the_gradients(setting: Setting, tmp_path: Path) -> None:
    cell = damping.QUICK.cells(setting)[0]
    found = cells.prepared(cell, setting.home(tmp_path), quiet)
    assert found is not None
    frame = damping._spectrum(found)
    gradients = found.problem.index.gradients(slice(None)).double()
    values = torch.linalg.svdvals(gradients).square()
    joint = frame[frame["block"] == "joint"]["share"].to_numpy()
    np.testing.assert_allclose(joint[: len(values)], (values / values.sum()).numpy()[: len(joint)], atol=1e-6)
    assert set(frame["block"]) == {"joint", *(block.name for block in found.problem.blocks)}


@pytest.mark.slow
def test_more_terms_of_the_series_are_nearer_to_exact(setting: Setting, tmp_path: Path) -> None:
    run(ITERATIONS, tmp_path / "i", setting, quiet)
    records = results(tmp_path / "i")
    for name in iterations.DAMPINGS:
        here = [r for r in records if r["damping"] == name]
        series = sorted((r for r in here if r["recurrence"] == "neumann"), key=lambda r: r["iterations"])
        assert [r["iterations"] for r in series] == [-1, 0, *COUNTS]
        assert series[0]["relative"] == 0
        distances = [r["relative"] for r in series[2:]]
        assert distances == sorted(distances, reverse=True)
    released = [r for r in records if r["recurrence"] == "released" and r["iterations"] == 1]
    start = [r for r in records if r["iterations"] == 0]
    for one, other in zip(released, start, strict=True):  # one released iteration is GradSim to its curvature / 1000
        assert one["spearman"] == pytest.approx(other["spearman"], abs=0.02)


def test_distances_to_the_exact_scores() -> None:
    exact = np.array([[3.0, 0.0, 4.0], [1.0, 2.0, 3.0]])
    found = iterations._distances(np.array([[6.0, 0.0, 8.0], [3.0, 2.0, 1.0]]), exact)
    assert found["relative"] == pytest.approx([1.0, 8**0.5 / 14**0.5])
    assert found["scaled"] == pytest.approx([0.0, (1 - (10 / 14) ** 2) ** 0.5], abs=1e-7)
    assert found["spearman"] == pytest.approx([1.0, -1.0])


def test_norms_and_hubs(setting: Setting, tmp_path: Path) -> None:
    run(NORMALISATION, tmp_path / "n", setting, quiet)
    records = results(tmp_path / "n")
    assert {r["spec"] for r in records} == {make(spec).label for spec in normalisation.specs("corrected")}
    known = [r for r in records if r["spec"] != "random"]
    assert all(0 < r["hub_share"] <= 1 and r["norm_ratio"] >= 1 and -1 <= r["with_norm"] <= 1 for r in known)
    hub = pd.DataFrame({"seed": [0] * 4 + [1] * 4, "first": list("aaab") + list("abcd")})
    assert normalisation._hub(hub) == {"hub_share": 0.5, "hub_share_low": 0, "hub_share_high": 1}
    assert normalisation._hub(hub[:4])["hub_share_low"] is None
    assert "datainf:normalise=cosine,damping=0.1,damping_rule=entry" in normalisation.specs("paper")


@pytest.mark.slow
def test_every_epoch_is_scored(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "c"
    outcome = run(CONVERGENCE, out, setting, quiet)
    records = results(out)
    specs = {make(spec).label for spec in cells.SPECS["corrected"]}
    assert {(r["spec"], r["epoch"]) for r in records} == {(spec, epoch) for spec in specs for epoch in (0, 1, 2)}
    for r in records:  # what does not depend on the method is the same for all of them
        twin = next(x for x in records if x["epoch"] == r["epoch"])
        assert all(r[name] == twin[name] for name in convergence.STATE)
        # before training seeds may be equal, which gives no interval
        known = [name for name in convergence.STATE if r[f"{name}_low"] is not None]
        assert all(r[f"{name}_low"] <= r[name] <= r[f"{name}_high"] for name in known)
        assert len(known) == len(convergence.STATE) or r["epoch"] == 0
    losses = {r["epoch"]: r["train_loss"] for r in records}
    assert losses[2] < losses[1] < losses[0]
    assert not list(out.rglob("shards"))  # nothing large is left
    again: list[str] = []
    assert run(CONVERGENCE, out, setting, again.append).records == outcome.records
    assert not again


def test_the_first_and_the_last_epoch_are_the_start_and_the_end_of_the_finished_adapter(
    setting: Setting, tmp_path: Path
) -> None:
    cell = convergence.QUICK.cells(setting)[0]
    made = cells.run_of(cell, tmp_path / "run")
    frame = convergence._epochs(tmp_path / "parts", made, quiet)
    problem = made.ready(quiet)
    assert frame is not None
    assert problem is not None
    relevant = relevance(problem.rows.labels, [query.label for query in problem.queries])
    for epoch, at in ((0, "start"), (2, "end")):
        values = make("gradcos", at=at).score(problem).values
        expected = cells.values_of(cells.Prepared(cell, tmp_path, problem, relevant), "gradcos", values)
        found = frame[(frame["epoch"] == epoch) & (frame["spec"] == "gradcos")]
        np.testing.assert_allclose(found["auprc"], expected["auprc"])
    assert found["train_loss"].iloc[0] == pytest.approx(float(problem.index.losses.mean()))


def test_layers_are_chosen_by_number_and_place() -> None:
    found = layers.choices(30, False)
    assert list(found) == ["last 1", "last 2", "last 4", "last 8", "middle 1", "middle 4", "first 1", "first 4", "all"]
    assert found["last 4"] == (26, 27, 28, 29)
    assert found["middle 4"] == (13, 14, 15, 16)
    assert found["first 1"] == (0,)
    assert len(found["all"]) == 30
    assert list(layers.choices(4, False)) == ["last 1", "last 2", "middle 1", "first 1", "all"]
    for depth in (4, 30):
        assert layers.in_order(reversed([*layers.choices(depth, False)] * 2)) == list(layers.choices(depth, False))


@pytest.mark.slow
def test_trained_layers_and_layers_looked_at(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "l"
    outcome = run(LAYERS, out, setting, quiet)
    records = results(out)
    trained = [r for r in records if r["what"] == "trained"]
    assert {r["trained"] for r in trained} == {"last 1", "middle 1", "first 1", "all"}
    looks = [r for r in records if r["what"] != "trained"]
    assert {(r["what"], r["layer"]) for r in looks} == {(w, k) for w in (*layers.LOOKS, layers.STATES) for k in (1, 2)}
    last = next(r for r in looks if r["what"] == layers.STATES and r["layer"] == 2)
    repsim = next(r for r in trained if r["trained"] == "all" and r["spec"] == "repsim")
    assert last["auprc"] == repsim["auprc"]  # RepSim is of the last layer
    assert not list(out.rglob("shards"))
    again: list[str] = []
    assert run(LAYERS, out, setting, again.append).records == outcome.records
    assert not again


def test_of_an_even_number_of_layers_the_median_is_between_two() -> None:
    about = {"task": "t", "protocol": "corrected", "what": "w", "auprc_low": None, "auprc_high": None}
    records = [{**about, "layer": k, "auprc": value} for k, value in enumerate((0.9, 0.1, 0.8, 0.2), 1)]
    assert layers._best(records)[1] == [["t", "corrected", "w", "1", "90", "20", "50"]]


def test_layers_that_are_equally_good_are_counted() -> None:
    about = {"task": "t", "protocol": "corrected", "what": "w", "auprc_low": None, "auprc_high": None}
    records = [{**about, "layer": k, "auprc": value} for k, value in enumerate((0.4, 1.0, 1.0, 0.2, 1.0), 1)]
    assert layers._best(records)[1][0][3] == "2 and 2 others"
    trained = [{**about, "what": "trained", "spec": "gradcos", "trained": layers.ALL, "auprc": 0.7}]
    assert "w: layer 2 and 2 others (1.00)" in layers._reading(trained, records)[0]


def test_layers_are_told_of_before_a_model_with_all_of_them_complied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "controls", lambda cells, frame: [])
    about = {"task": "mixed-small", "protocol": "corrected", "what": "trained", "trained": "last 1", "layer": -1}
    values = {"spec": "gradcos", "seed": 0, "n_train": 40, "accuracy": 1.0, "coverage": 0.5, "auprc": 0.7}
    found = pd.DataFrame([{**about, **values, "query": query} for query in "ab"])
    outcome = layers.outcome(Setting(seeds=1), [found])
    assert [r["trained"] for r in outcome.records] == ["last 1"]
    assert "layers-looked-at" not in outcome.figures
    assert outcome.tables["layers-looked-at"][1] == []


def test_a_table_cell_says_what_is_known() -> None:
    assert percent({"auprc": 0.5, "auprc_low": 0.25, "auprc_high": 0.75}, "auprc") == "50 25-75"
    assert percent({"auprc": 0.5, "auprc_low": None, "auprc_high": None}, "auprc") == "50"
    assert percent({"auprc": None, "auprc_low": None, "auprc_high": None}, "auprc") == "-"
    assert spread(of_seeds([0.5, None, float("nan")])) == "0.50"
    assert spread(of_seeds([1.0, 2.0, 3.0])) == "2.00 [-0.48, 4.48]"
    assert spread(of_seeds([0.9, 1.0, 0.8], (-1, 1))) == "0.90 [0.65, 1.00]"
    assert of_seeds([None]) is None


def test_one_legend_names_what_any_panel_shows() -> None:
    found = [{"task": task, "protocol": "corrected", "value": value} for task, value in (("a", 1.0), ("b", None))]

    def draw(axis: Any, here: list[dict[str, Any]]) -> None:
        plots.line(axis, 0, [1], here, "value", f"line of {here[0]['task']}")

    figure = plots.facets(found, draw, "x, in steps", "y")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["line of a", "line of b"]
    assert [axis.get_title() for axis in figure.axes] == ["a, corrected", "b, corrected"]


def test_lines_keep_apart_and_their_intervals_within_the_axes() -> None:
    figure, [axis] = plots.panels(1)
    for place in (0, 5):
        plots.line(axis, place, [1, 10], [{"v": 0.5, "v_low": 0.1, "v_high": 0.9}] * 2, "v", str(place), 100)
    low, high = axis.get_ylim()
    assert low <= 10
    assert high >= 90
    figure.canvas.draw()
    places = [each.lines[0].get_transform().transform((1, 50)) for each in axis.containers]
    assert places[0][0] < places[1][0]
    assert places[0][1] == places[1][1]


def test_a_study_says_what_its_seeds_cost() -> None:
    assert DAMPING.cost(Setting(False, 1)) != DAMPING.cost(Setting(False, 3))
    made = Study("x", "", "", 40, 0.5, DAMPING.pieces, DAMPING.outcome, 37)
    assert made.cost(Setting(False, 3)) == "about 2.0 hours, 9 minutes where its fine-tuned tasks are there already"
    assert made.cost(Setting(True, 1)) == "about half a minute"
    assert made.cost(Setting(True, 4)) == "about 2 minutes"


def test_legends_tell_the_released_recurrence_and_the_papers_damping_from_ours() -> None:
    names = [cells.name_of(spec) for protocol in cells.SPECS.values() for spec in protocol]
    assert (
        cells.name_of("lissa:damping=0.1,damping_rule=entry,recurrence=released") == "lissa, released, paper's damping"
    )
    assert cells.name_of("datainf:damping=0.1,damping_rule=entry") == "datainf, paper's damping"
    assert cells.name_of("exact:normalise=cosine") == "exact cosine"
    assert len(set(names)) == len({make(spec).label for protocol in cells.SPECS.values() for spec in protocol})


def test_what_the_paper_protocol_leaves_out_is_said() -> None:
    assert "mixed-small is left out" in iterations.PLAN.left_out()[0]
    assert not iterations.QUICK.left_out()
    kept = {(cell.task, cell.protocol) for cell in iterations.PLAN.cells(Setting(False, 1))}
    assert ("mixed-small", "corrected") in kept
    assert ("mixed-small", "paper") not in kept


def test_a_method_looks_the_same_in_every_panel() -> None:
    found = []
    for protocol, specs in cells.SPECS.items():
        for spec in specs:
            about = {"task": "mathqa", "protocol": protocol, "n_train": 5, "n_queries": 4, "epoch": 1}
            found.append({**about, "spec": make(spec).label, "coverage": 0.5})
    figure = convergence._figure(found, "coverage", [])
    drawn = [{each.get_label(): each.lines[0].get_marker() for each in axis.containers} for axis in figure.axes]
    shared = drawn[0].keys() & drawn[1].keys()
    assert {"repsim", "gradsim", "gradcos"} <= shared
    assert all(drawn[0][name] == drawn[1][name] for name in shared)
    assert figure.axes[0].get_title() == "mathqa, corrected: 5 rows, 4 queries"


def test_studies_share_their_cells(setting: Setting) -> None:
    home = setting.home(Path("nowhere"))
    assert sorted(path.name for path in home.iterdir()) == ["emotion-0.1"]
    assert len(list(home.glob("*/*/seed-*"))) == setting.seeds


def test_nothing_is_learnt_from_zero_and_much_from_a_random_start() -> None:
    stuck = capacity.train(8, "zero", 0, 200, 1, 2)
    assert all(record["change"] == 0 for record in stuck)
    assert capacity.correlations(stuck) == {"pearson": None, "spearman": None, "late": None, "stepwise": None}
    learnt = capacity.train(8, "random", 0, 1000, 3, 5)
    assert learnt[0]["change"] == 0
    assert learnt[-1]["accuracy"] > learnt[0]["accuracy"] + 0.2
    assert learnt == capacity.train(8, "random", 0, 1000, 3, 5)
    assert capacity.train(8, "zero last", 0, 200, 1, 2)[-1]["change"] > 0


def test_correlations_along_a_run() -> None:
    records = [{"change": float(i), "accuracy": a} for i, a in enumerate([0.0, 0.1, 0.2, 0.3, 0.2, 0.1])]
    found = capacity.correlations(records)
    assert found["pearson"] == pytest.approx(0.4, abs=0.15)
    assert found["late"] == pytest.approx(-1)


def test_the_quick_capacity_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "QUICK_WIDTHS", (4, 8))
    outcome = run(CAPACITY, tmp_path / "c", Setting(True, 1), quiet)
    kept = json.loads((tmp_path / "c" / "results.json").read_text())["records"]
    assert len(kept) == len(capacity.STARTS) * 2
    assert "move by 0" in outcome.reading[0]
    assert "undefined" in (tmp_path / "c" / "capacity.md").read_text()
