"""Scores that are streamed equal those in memory, for every method, normalisation and precision; solvers agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from finetrace.api import build_index
from finetrace.attribution import Problem, make
from finetrace.attribution.memory import plan
from finetrace.errors import FinetraceError
from tiny import make_examples, make_llama, make_tokenizer, with_lora

METHODS = (
    "gradsim",
    "gradcos",
    "gradcos:scope=block",
    "kfac",
    "ekfac",
    "kfac:labels=data",
    "ekfac:labels=data",
    "datainf",
    "lissa",
    "lissa:scope=joint,iterations=40",
    "lissa:recurrence=released,damping=0.1,damping_rule=entry",
    "exact",
    "exact:scope=joint",
    "exact:solver=dual",
    "exact:solver=dual,scope=joint",
    "exact:solver=primal",
    "exact:solver=primal,scope=joint",
    "exact:solver=cg",
    "exact:solver=cg,scope=joint",
    "exact:solver=nystroem",
    "exact:solver=nystroem,scope=joint",
)


def tiny_queries(count):
    return [dataclasses.replace(example, id=f"q{i}") for i, example in enumerate(make_examples(count, seed=9))]


@pytest.fixture(scope="module", params=["float64", "float32"])
def index(request, tmp_path_factory):
    """23 rows in shards of 16, so that blocks of 5 rows lie across them."""
    folder = tmp_path_factory.mktemp("index") / "idx"
    model = with_lora(make_llama()).to(getattr(torch, request.param))
    from finetrace.index import sizing

    before, sizing.SHARD_BYTES = sizing.SHARD_BYTES, 1
    try:
        return build_index(model, make_tokenizer(), make_examples(23), folder)
    finally:
        sizing.SHARD_BYTES = before


@pytest.fixture(scope="module")
def features(index):
    return index.features(tiny_queries(4))[0]


def tolerance(index, spec):
    if spec.startswith("lissa") and "released" not in spec and index.manifest.feature_dtype == "float64":
        return 1e-6  # to which the largest eigenvalue is known either way
    if index.manifest.feature_dtype == "float32":
        return 3e-5 if "exact" in spec else 1e-5
    return 1e-8 if "cg" in spec or "nystroem" in spec else 1e-10


def plain(spec):
    """The same method by its own choice of solver."""
    name, _, settings = spec.partition(":")
    kept = [each for each in settings.split(",") if each and not each.startswith("solver=")]
    return f"{name}:{','.join(kept)}" if kept else name


def close(found, wanted, bound):
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("normalise", ["none", "cosine", "relatif"])
@pytest.mark.parametrize("step", [5, 100])
def test_streaming_equals_memory(index, features, spec, normalise, step):
    queries = tiny_queries(4)
    held = make(plain(spec), normalise=normalise).score(Problem(index, queries, features)).values
    problem = Problem(index, queries, features, step=step)
    method = make(spec, normalise=normalise)
    assert method.run(problem) is not None
    close(method.score(problem).values, held, tolerance(index, spec))


@pytest.mark.parametrize("spec", ["ekfac", "datainf", "lissa", "exact", "gradcos"])
def test_layers_and_queries_one_at_a_time(index, features, spec):
    queries = tiny_queries(4)
    held = make(spec, layers="1").score(Problem(index, queries, features)).values
    problem = Problem(index, queries, features, step=6)
    method = make(spec, layers="1")
    run = method.run(method.prepared(problem))
    run.plan = dataclasses.replace(run.plan, queries=1)
    from finetrace.attribution.streaming import whole

    close(whole(run, problem.m, problem.n).numpy(), held, tolerance(index, spec))


def test_the_mean_of_several_views_streams(index, features):
    queries = tiny_queries(4)
    spec = "ekfac:normalise=cosine,layers=all+1,labels=data"
    held = make(spec).score(Problem(index, queries, features)).values
    close(make(spec).score(Problem(index, queries, features, step=5)).values, held, tolerance(index, spec))


def test_self_influence_streams(index, features):
    for curvature in ("gradsim", "datainf", "lissa", "exact", "ekfac"):
        method = make("selfinf", curvature=curvature)
        held = method.score(Problem(index, tiny_queries(4), features)).values
        found = method.score(Problem(index, tiny_queries(4), features, step=5)).values
        close(found, held, tolerance(index, curvature))


def test_the_budget_decides(index, features):
    queries = tiny_queries(4)
    method = make("exact:scope=joint")
    assert plan(method, Problem(index, queries, features, memory=1 << 30)) is None
    with pytest.raises(FinetraceError, match="one query and one row of .* entries take .*more than the memory"):
        make("exact:solver=cg").score(Problem(index, queries, features, memory=1000))


@pytest.mark.parametrize(
    "spec", ["gradsim", "gradcos:scope=block", "datainf", "lissa:scope=joint", "exact", "exact:scope=joint", "ekfac"]
)
def test_blocks_without_a_gradient_in_the_rows_count_in_no_norm(tmp_path, spec):
    """As those of LoRA's A where B is zero; a query of another model than that has a gradient in them."""
    model = with_lora(make_llama())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    index = build_index(model, make_tokenizer(), make_examples(9), tmp_path / "idx")
    queries, found = tiny_queries(3), index.features(tiny_queries(3))[0]
    torch.manual_seed(0)
    found.gradients = torch.randn_like(found.gradients)
    method = make(spec, normalise="cosine")
    held = method.score(Problem(index, queries, found)).values
    close(method.score(Problem(index, queries, found, step=4)).values, held, 1e-6)
