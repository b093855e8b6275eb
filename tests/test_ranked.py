"""The strongest rows kept block by block are those of the whole matrix, and files written on the way hold all scores."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from commands import run, tuned_index
from finetrace.attribution import Problem, make, ranked
from finetrace.attribution.ranked import Strongest, rank
from finetrace.attribution.score_files import writing_scores
from finetrace.collection import Collector
from finetrace.errors import FinetraceError
from test_streaming import features, index, tiny_queries  # noqa: F401  (fixtures)
from tiny import make_examples


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("step", [1, 7, 200])
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling"])
def test_the_running_list_is_a_stable_sort(k, step, kind):
    draw = np.random.default_rng(0)
    values = {
        "random": draw.normal(size=(3, 100)),
        "ties": draw.integers(0, 4, size=(3, 100)).astype(float),
        "rising": np.tile(np.arange(100.0), (3, 1)),
        "falling": -np.tile(np.arange(100.0), (3, 1)),
    }[kind]
    for sign in (1, -1):
        kept = Strongest(3, k, sign)
        for start in range(0, 100, step):
            kept.take(slice(0, 3), slice(start, min(100, start + step)), values[:, start : start + step])
        order = np.argsort(-sign * values, axis=1, kind="stable")[:, :k]
        assert np.array_equal(kept.order, order)
        assert np.array_equal(kept.values, np.take_along_axis(values, order, 1))


@pytest.mark.parametrize(
    "spec", ["gradsim", "ekfac:normalise=cosine,labels=data", "exact:solver=cg", "bm25", "gradnorm", "lissa"]
)
def test_ranked_rows_are_those_of_the_whole_matrix(index, features, spec):  # noqa: F811
    whole = make(spec).score(Problem(index, tiny_queries(4), features, step=5))
    ranked = rank(make(spec), Problem(index, tiny_queries(4), features, step=5), 6, opponents=True)
    for found, wanted in ((ranked.top(6), whole.top(6)), (ranked.bottom(4), whole.bottom(4))):
        assert np.array_equal(found.order, wanted.order)
        assert np.array_equal(found.values, wanted.values)
        assert found.records() == wanted.records()
    assert ranked.unit == whole.unit
    assert ranked.parameters == whole.parameters
    with pytest.raises(FinetraceError, match="6 strongest rows were kept, not 7"):
        ranked.top(7)
    everything = rank(make(spec), Problem(index, tiny_queries(4), features, step=5), len(index) + 5)
    assert np.array_equal(everything.top(len(index) + 2).order, whole.top(len(index)).order)
    with pytest.raises(FinetraceError, match="opponents were not kept"):
        rank(make(spec), Problem(index, tiny_queries(1), features.some(slice(0, 1)), step=5), 2).bottom(1)


def test_methods_that_do_not_stream_take_as_many_queries_as_fit(index, features):  # noqa: F811
    """A budget of two queries at a time."""
    problem = Problem(index, tiny_queries(4), features, memory=40 * 23 * 2 * 2)
    for spec in ("bm25", "repsim", "random", "length"):
        whole = make(spec).score(Problem(index, tiny_queries(4), features))
        assert np.allclose(rank(make(spec), problem, 5).top(5).values, whole.top(5).values, rtol=1e-6), spec


@pytest.mark.parametrize("settings", ["", "layers=1", "scope=joint,layers=0"])
def test_how_the_strongest_rows_were_solved_is_said_as_of_all_scores(index, features, settings, monkeypatch):  # noqa: F811
    method = make(f"exact:{settings}")
    wanted = method.score(Problem(index, tiny_queries(4), features)).computed
    assert wanted["residual"] < 1e-6
    assert rank(method, Problem(index, tiny_queries(4), features), 3).computed == wanted
    problem = Problem(index, tiny_queries(4), features)
    monkeypatch.setattr(ranked, "CELL", problem.memory // 2 // problem.n // 3)  # three queries, and then the last one
    few = [
        method.score(Problem(index, tiny_queries(4)[part], features.some(part))).computed["residual"]
        for part in (slice(0, 3), slice(3, 4))
    ]
    found = rank(method, problem, 3).computed
    assert found == {**wanted, "residual": max(few)}


@pytest.mark.parametrize("step", [None, 5])
def test_what_cannot_be_factored_is_said_in_words(index, features, step, monkeypatch):  # noqa: F811
    def fails(matrix):
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr(torch.linalg, "cholesky", fails)  # as where damping is far below the rounding of the products
    method = make("exact:solver=dual")
    with pytest.raises(FinetraceError, match="cannot be factored in the precision of the gradients; use more damping"):
        rank(method, Problem(index, tiny_queries(4), features, step=step), 3)


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".safetensors"])
def test_a_file_written_on_the_way_holds_all_scores(index, features, tmp_path, suffix):  # noqa: F811
    path = tmp_path / f"all{suffix}"
    problem = Problem(index, tiny_queries(4), features, step=5)
    whole = make("gradcos").score(problem)
    with writing_scores(path, "gradcos", whole.query_ids, whole.train_ids, {"a": 1}) as sink:
        rank(make("gradcos"), problem, 3, sinks=[sink])
    if suffix == ".parquet":
        frame = pd.read_parquet(path).pivot_table(index="query", columns="example", values="score", observed=True)
        found = frame.loc[list(whole.query_ids), list(whole.train_ids)].to_numpy()
    else:
        found = np.load(path) if suffix == ".npy" else load_file(path)["scores"]
    assert np.array_equal(found, whole.values)
    whole.save(tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").stat().st_size > 0


def test_a_file_that_fails_on_the_way_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), writing_scores(tmp_path / "s.npy", "m", ["q"], ["a", "b"], {}) as sink:
        sink.take(slice(0, 1), slice(0, 1), np.ones((1, 1)))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(FinetraceError, match="written as they are made go to"),
        writing_scores(tmp_path / "s.csv", "m", ["q"], ["a"], {}),
    ):
        pass


def write_rows(path, examples):
    path.write_text("".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in examples))
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tuned_index(folder, write_rows(folder / "rows.jsonl", make_examples(60)), epochs=1)
    write_rows(folder / "queries.jsonl", make_examples(40, seed=5))
    return folder


def test_trace_keeps_the_strongest_rows_where_the_matrix_does_not_fit(work, capsys):
    common = [
        "trace",
        "--index",
        work / "idx",
        "--queries",
        work / "queries.jsonl",
        "--method",
        "gradsim",
        "--method",
        "bm25",
    ]
    common += ["--top", 3, "--opponents", "--format", "json"]
    code, wanted, said = run(capsys, *common)
    assert code == 0, said
    small = ["--memory", "80KB"]
    code, found, said = run(capsys, *common, *small, "--scores", work / "all.npy")
    assert code == 0, said
    assert "do not fit the memory of 80 kB: the 3 strongest rows of each query are kept; metrics" in said
    assert "gradsim: streamed," in said
    a, b = json.loads(wanted)["records"], json.loads(found)["records"]
    assert [r["example"] for r in a] == [r["example"] for r in b]
    assert np.allclose([r["score"] for r in a], [r["score"] for r in b], rtol=1e-4, atol=1e-9)
    assert np.load(work / "all.npy").shape == (40, 60)
    code, _, said = run(capsys, *common, *small, "--report", work / "r.html")
    assert code == 2
    assert "the page needs them all; give more with --memory" in said
    code, _, said = run(capsys, *common, *small, "--scores", work / "s.csv")
    assert code == 2
    assert "written as they are made: to .parquet, .npy or .safetensors" in said
    code, _, said = run(capsys, *common, "--memory", "lots")
    assert code == 2
    assert "--memory lots: not a size" in said


def test_queries_of_several_losses_are_collected_once_though_some_are_scored_at_a_time(index, monkeypatch):  # noqa: F811
    method = make("gradcos:loss_on=response+probe")
    wanted = rank(method, Problem(index, tiny_queries(6)), 3)
    problem = Problem(index, tiny_queries(6))
    method.warm(method.prepared(problem))
    collected, collect = [], Collector.collect

    def noted(self, items, ids, *given, **named):
        collected.append(tuple(ids))
        return collect(self, items, ids, *given, **named)

    monkeypatch.setattr(Collector, "collect", noted)
    monkeypatch.setattr(ranked, "CELL", problem.memory // 2 // problem.n // 4)
    found = rank(method, problem, 3)
    assert collected == []
    rtol = 1e-10 if index.manifest.feature_dtype == "float64" else 1e-5
    np.testing.assert_allclose(found.top(3).values, wanted.top(3).values, rtol=rtol)
