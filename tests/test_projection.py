"""Projected gradients: the numbers, their mean and variance, and every method against gradients projected by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetrace.attribution import Problem, make
from finetrace.collection import Block, Collector, track
from finetrace.collection import projection as module
from finetrace.collection.layers import ALL_LINEAR
from finetrace.collection.modules import Tracking
from finetrace.collection.projection import Flat, Projection, Sides, signs
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.evaluation.tail_patch import tail_patch
from finetrace.index import Index, build_index, kronecker_factors, open_index, view
from finetrace.models import Loaded
from tiny import make_encoded, make_examples, make_gpt2, make_llama, names, relative_error, with_lora

LENGTHS = [9, 31, 4, 17, 40, 5, 25]
MODELS = {
    "lora": lambda: (with_lora(make_llama(), rank=4), None),
    "linear": lambda: (make_llama(), [r"layers\.1\.self_attn\.(q|o)_proj", r"layers\.0\.mlp"]),
    "linear with bias": lambda: (make_llama(attention_bias=True), [r"self_attn\.[qk]_proj"]),
    "conv1d with bias": lambda: (make_gpt2(), ["c_attn", r"\.mlp\."]),
    "head": lambda: (make_llama(hidden=8), ["lm_head", r"layers\.1\.mlp\.up_proj"]),
    "whole": lambda: (make_llama(tied=True), [ALL_LINEAR]),
}
KNOWN = [-1, -1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, -1, 1, -1, -1]  # an index on disk rests on them
KINDS = ["two-sided:5x3", "two-sided:3x100", "two-sided:100x100", "rademacher:7", "sparse:20", "sparse:3"]


def dense(tracking: Tracking, whole: Tracking) -> list[Tensor]:
    """(k, d) of every block: the Kronecker product of the two sides, the flat matrix, or the identity."""
    found = []
    for layer in whole.layers:
        sides = tracking.sides.get(layer.weight.name)
        eye = torch.eye(layer.weight.size, dtype=torch.float64)
        if sides is not None:
            left, right = sides.matrix("outputs"), sides.matrix("inputs")
            eye = torch.kron(right, left) if layer.transposed else torch.kron(left, right)
        flat = tracking.flat.get(layer.weight.name)
        found.append(eye if flat is None else flat.matrix())
        if layer.bias is not None:
            flat = tracking.flat.get(layer.bias.name)
            eye = torch.eye(layer.bias.size, dtype=torch.float64)
            found.append(sides.matrix("outputs") if sides is not None else eye if flat is None else flat.matrix())
    return found


def by_hand(tracking: Tracking, whole: Tracking, rows: Tensor) -> Tensor:
    """(n, D) gradients times the dense matrices."""
    return torch.cat(
        [rows[:, b.columns] @ p.T for b, p in zip(whole.blocks, dense(tracking, whole), strict=True)], dim=1
    )


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_collected_gradients_are_the_whole_ones_times_the_dense_matrix(name: str, text: str) -> None:
    model, modules = MODELS[name]()
    items = make_encoded(LENGTHS)
    whole, tracking = track(model, modules), track(model, modules, Projection.parse(text, 3))
    expected = by_hand(tracking, whole, Collector(model, whole, ()).collect(items, names(items)).gradients)
    assert expected.shape[1] == tracking.width
    for budget in (1, 70, 100_000):
        found = Collector(model, tracking, (), budget).collect(items, names(items)).gradients
        assert relative_error(found, expected) < 1e-10
    for block, before in zip(tracking.blocks, whole.blocks, strict=True):
        assert block.original == (before.shape if block.shape != before.shape else None)


def test_only_what_is_larger_is_projected() -> None:
    model, modules = MODELS["lora"]()
    tracking = track(model, modules, Projection.parse("two-sided:8x8"))
    shapes = {block.name.partition("self_attn.")[2]: (block.shape, block.original) for block in tracking.blocks}
    assert shapes["q_proj.lora_A.weight"] == ((4, 8), (4, 16))
    assert shapes["q_proj.lora_B.weight"] == ((8, 4), (16, 4))
    assert shapes["v_proj.lora_B.weight"] == ((8, 4), None)
    assert not track(model, modules, Projection.parse("two-sided:16x16")).sides
    assert not track(model, modules, Projection.parse("rademacher:64")).flat


@pytest.mark.parametrize("text", ["two-sided:3x2", "two-sided:100x3", "rademacher:6", "sparse:6", "sparse:16"])
def test_inner_products_are_unbiased_and_vary_as_stated(text: str) -> None:
    """Over many seeds the mean of <P g, P h> is <g, h> within its standard error; the variance is the formula's."""
    draws = 1500
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    h = h + 0.5 * g
    values, norms = [], []
    for seed in range(draws):
        projection = Projection.parse(text, seed)
        sides, flat = projection.sides("w", 6, 5), projection.flattened("w", 30)
        matrix = torch.kron(sides.matrix("outputs"), sides.matrix("inputs")) if sides else flat.matrix()  # type: ignore[union-attr]
        a, b = matrix @ g.flatten(), matrix @ h.flatten()
        values.append(float(a @ b))
        norms.append(float(a @ a))
    for found, exact in ((values, float((g * h).sum())), (norms, float((g * g).sum()))):
        error = np.std(found) / math.sqrt(draws)
        assert abs(np.mean(found) - exact) < 4 * error
    expected = variance(text, g, h)
    assert np.var(values) == pytest.approx(expected, rel=0.15)
    if not Projection.parse(text).flat:
        projection = Projection.parse(text)
        k_out, k_in = min(projection.outputs, 6), min(projection.inputs, 5)
        one, other = 2 / k_in if k_in < 5 else 0, 2 / k_out if k_out < 6 else 0
        sizes = float(g.norm() * h.norm()) ** 2
        bound = one * float((g.T @ h).norm()) ** 2 + other * (1 + one / 2) * float((h @ g.T).norm()) ** 2
        assert expected <= bound + one * other / 2 * sizes


def variance(text: str, g: Tensor, h: Tensor) -> float:
    """Of <P g, P h>, exactly.

    (1/k) (|g|^2 |h|^2 + <g, h>^2 - 2 sum g^2 h^2) for one matrix of independent signs; for two sides, that of the right one plus
    the mean over the right one of that of the left one, by the law of total variance.
    """
    projection = Projection.parse(text)
    if projection.flat:
        a, b = g.flatten(), h.flatten()
        return float((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a.square() @ b.square())) / projection.outputs

    def off(m: Tensor, k: int) -> float:
        both = m + m.T
        return float((both.square().sum() - both.diagonal().square().sum()) / 2) / k

    total = off(g.T @ h, projection.inputs) if projection.inputs < g.shape[1] else 0.0
    if projection.outputs >= g.shape[0]:
        return total
    draws = 800
    means = []
    for seed in range(draws):
        right = (
            torch.from_numpy(signs(projection.inputs * g.shape[1], seed, "another")).double().view(-1, g.shape[1])
            / projection.inputs**0.5
        )
        means.append(off(h @ right.T @ right @ g.T, projection.outputs))
    return total + float(np.mean(means))


def test_signs_are_fixed_balanced_and_of_their_place() -> None:
    assert signs(12, 0, "w", "inputs").tolist() == signs(100, 0, "w", "inputs")[:12].tolist()
    many = signs(100_000, 1, "w")
    assert set(many.tolist()) == {-1, 1}
    assert abs(many.mean()) < 4 / math.sqrt(len(many))
    assert abs((many[1:] * many[:-1]).mean()) < 4 / math.sqrt(len(many))
    for other in ((2, "w"), (1, "v")):
        assert abs((many * signs(100_000, *other)).mean()) < 4 / math.sqrt(len(many))
    assert signs(16, 7, "layers.0.q.weight", "inputs").tolist() == KNOWN


def test_flat_matrices_are_the_same_in_chunks_kept_or_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 1000, dtype=torch.float64)
    for kind in ("rademacher", "sparse"):
        made = Flat("w", 1000, 48, kind, 0)
        assert torch.equal(made.project(rows), made.project(rows))
        assert not made._chunks
        kept = Flat("w", 1000, 48, kind, 0)
        kept.keep_bytes = 1 << 20
        assert torch.equal(kept.project(rows), made.project(rows))
        assert kept._chunks
        assert torch.equal(kept.project(rows), made.project(rows))
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK", 48 * 100)
            pieces = Flat("w", 1000, 48, kind, 0)
            assert relative_error(pieces.project(rows), rows @ pieces.matrix().T) < 1e-12
        matrix = made.matrix()
        assert torch.allclose(matrix.square().sum(0), torch.ones(1000, dtype=torch.float64))
        assert int((matrix != 0).sum(0).max()) == (48 if kind == "rademacher" else 8)


def test_dtypes_see_the_same_matrix() -> None:
    sides = Sides("w", (6, 4), (5, 3), 0)
    values = torch.randn(2, 7, 5)
    assert torch.allclose(sides.project_inputs(values).double(), sides.project_inputs(values.double()), atol=1e-5)
    assert torch.equal(sides.project_inputs(values.double()), values.double() @ sides.matrix("inputs").T)


@pytest.mark.parametrize(
    "text", ["two-sided", "two-sided:4", "two-sided:0x4", "rademacher:0", "sparse:x", "gauss:4", ""]
)
def test_what_is_no_projection_is_refused(text: str) -> None:
    with pytest.raises(FinetraceError, match="not known; use none, two-sided:KOUTxKIN"):
        Projection.parse(text)


@pytest.mark.parametrize("text", ["none", "two-sided:4x7", "rademacher:9", "sparse:12"])
def test_text_comes_back(text: str) -> None:
    assert Projection.parse(text, 5).text == text
    assert Projection.parse(text, 5).seed == 5


# indices


def build(loaded: Loaded, folder: Path, count: int = 11, **options: Any) -> Index:
    encoder = Encoder(loaded.tokenizer)
    return build_index(loaded, make_examples(count), folder, encoder, rows_per_shard=4, **options)[0]


@pytest.fixture
def lora(tiny_loaded: Loaded) -> Loaded:
    model = with_lora(make_llama(), rank=4)
    model.peft_config["default"].init_lora_weights = True  # so that there is a start to take gradients at
    return Loaded(model, tiny_loaded.tokenizer, tiny_loaded.spec)


@pytest.fixture
def plain(tiny_loaded: Loaded) -> Loaded:
    return Loaded(make_llama(tied=True), tiny_loaded.tokenizer, tiny_loaded.spec)


QUERIES = make_examples(4, seed=9)
METHODS = (
    "gradsim",
    "gradcos",
    "gradcos:scope=block",
    "exact",
    "exact:scope=joint,normalise=cosine",
    "datainf",
    "lissa",
)


@pytest.mark.parametrize("text", ["two-sided:6x5", "rademacher:9", "sparse:16"])
def test_methods_on_a_projected_index_are_those_of_gradients_projected_by_hand(
    lora: Loaded, tmp_path: Path, text: str
) -> None:
    index, whole = build(lora, tmp_path / "p", projection=text, projection_seed=2), build(lora, tmp_path / "w")
    tracking = index.manifest.track(lora.model)
    plain_tracking = whole.manifest.track(lora.model)
    train = by_hand(tracking, plain_tracking, whole.gradients(slice(None)))
    query = by_hand(tracking, plain_tracking, Problem(whole, QUERIES).features.gradients)
    assert relative_error(index.gradients(slice(None)), train) < 1e-9
    problem = Problem(index, QUERIES)
    assert relative_error(problem.features.gradients, query) < 1e-9
    found = {spec: torch.from_numpy(make(spec).score(problem).values) for spec in METHODS}
    cosine = (query @ train.T) / query.norm(dim=1)[:, None] / train.norm(dim=1)[None]
    assert relative_error(found["gradsim"], query @ train.T) < 1e-9
    assert relative_error(found["gradcos"], cosine) < 1e-9
    exact = 0
    for block in index.blocks:
        g, v = train[:, block.columns], query[:, block.columns]
        damping = 0.01 * g.square().sum(1).mean()
        exact += v @ torch.linalg.inv(g.T @ g / len(g) + damping * torch.eye(block.size, dtype=torch.float64)) @ g.T
    assert relative_error(found["exact"], exact) < 1e-7
    for spec in ("exact:layers=1", "exact:at=start", "gradcos:at=start,layers=0", "datainf:loss_on=all"):
        assert np.isfinite(make(spec).score(problem).values).all()
    start = view(index, "response", at="start")
    assert (start.manifest.projection, start.manifest.projection_seed) == (text, 2)
    assert [block.shape for block in start.blocks] == [block.shape for block in index.blocks]


def test_sides_as_long_as_they_are_leave_every_score_as_it_is(lora: Loaded, tmp_path: Path) -> None:
    index, whole = build(lora, tmp_path / "p", projection="two-sided:24x24"), build(lora, tmp_path / "w")
    for spec in (*METHODS, "kfac", "ekfac:normalise=cosine"):
        a, b = (make(spec).score(Problem(each, QUERIES)).values for each in (index, whole))
        assert (a == b).all()


@pytest.mark.parametrize("labels", ["model", "data"])
def test_kronecker_factors_are_those_of_projected_sides(plain: Loaded, tmp_path: Path, labels: Any) -> None:
    index = build(plain, tmp_path / "p", projection="two-sided:6x5", kronecker=labels)
    bases = kronecker_factors(index, labels)
    items = list(index.rows.encoded)
    collector = Collector(plain.model, track(plain.model, [ALL_LINEAR]), ())
    sums = collector.factor_sums(labels)
    features = collector.collect(items, index.rows.ids, factors=sums)
    rows = features.sampled if labels == "model" else features.gradients
    assert rows is not None
    tracking = index.manifest.track(plain.model)
    assert (
        relative_error(index.gradients(slice(None)), by_hand(tracking, collector.tracking, features.gradients)) < 1e-9
    )
    projected = by_hand(tracking, collector.tracking, rows)
    for block in index.blocks:
        sides, tokens, basis = tracking.sides[block.name], sums.tokens[block.name], bases[block.name]
        p_out, p_in = sides.matrix("outputs"), sides.matrix("inputs")
        left = p_out @ sums.left[block.name] @ p_out.T / tokens
        right = p_in @ sums.right[block.name] @ p_in.T / tokens
        curvature = torch.kron(left, right) * tokens / len(items)
        vectors = torch.kron(basis.left, basis.right)
        found = vectors @ torch.diag(basis.kfac.flatten()) @ vectors.T
        assert relative_error(found.flatten()[None], curvature.flatten()[None]) < 1e-8
        second = projected[:, block.columns].T @ projected[:, block.columns] / len(items)
        assert torch.allclose(
            basis.ekfac.flatten(), torch.diagonal(vectors.T @ second @ vectors), rtol=1e-7, atol=1e-14
        )
    for spec in (f"kfac:labels={labels}", f"ekfac:labels={labels},normalise=cosine,layers=last-half"):
        assert np.isfinite(make(spec).score(Problem(index, QUERIES)).values).all()


def test_no_kronecker_factors_without_two_sides(lora: Loaded, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match="no two sides, so K-FAC and EK-FAC have no factors"):
        build(lora, tmp_path / "a", projection="sparse:9", kronecker="data")
    assert not (tmp_path / "a").exists()
    index = build(lora, tmp_path / "b", projection="rademacher:9")
    for spec in ("kfac", "ekfac:labels=data"):
        with pytest.raises(FinetraceError, match=r"projected by rademacher:9, which leaves them no two sides"):
            make(spec).score(Problem(index, QUERIES))


def test_a_tail_patch_wants_whole_gradients(lora: Loaded, tmp_path: Path) -> None:
    index = build(lora, tmp_path / "p", projection="two-sided:4x4")
    with pytest.raises(FinetraceError, match=r"these are projected \(two-sided:4x4\)"):
        tail_patch(index, QUERIES, {"x": np.zeros((len(QUERIES), len(index)))}, count=3)


def test_one_index_has_one_projection(lora: Loaded, tmp_path: Path) -> None:
    index = build(lora, tmp_path / "p", projection="two-sided:4x4")
    for other, what in (
        ({"projection": "two-sided:4x5"}, "projection"),
        ({"projection": "two-sided:4x4", "projection_seed": 1}, "projection_seed"),
        ({}, "projection"),
    ):
        with pytest.raises(FinetraceError, match=f"an index of another ({what})"):
            build(lora, tmp_path / "p", **other)
    reopened = open_index(tmp_path / "p", lora)
    assert relative_error(reopened.features(make_examples(11))[0].gradients, index.gradients(slice(None))) < 1e-9
    queries = build(lora, tmp_path / "q", count=3, projection="two-sided:4x4", projection_seed=1)
    with pytest.raises(FinetraceError, match="was not built as"):
        Problem(index, make_examples(3), kept_queries=queries)


@pytest.mark.parametrize(
    "spec", ["exact:", "exact:scope=joint,", "exact:solver=cg,", "datainf:", "lissa:iterations=3,"]
)
def test_damping_by_entry_counts_the_entries_before_the_projection(lora: Loaded, tmp_path: Path, spec: str) -> None:
    whole, index = build(lora, tmp_path / "w"), build(lora, tmp_path / "p", projection="two-sided:4x4")
    assert [block.entries for block in index.blocks] == [block.size for block in whole.blocks]
    assert index.blocks[0].size == 16

    def scores(damping: str, blocks: tuple[Block, ...]) -> Tensor:
        problem = Problem(index, QUERIES)
        problem.blocks = blocks
        return torch.from_numpy(make(f"{spec}damping={damping}").score(problem).values)

    def traces(blocks: tuple[Block, ...]) -> Tensor:
        """The same by the rule of the trace, whose multiple is then the other's over d."""
        return scores(f"{0.1 / sum(block.entries for block in blocks)!r}", blocks)

    groups = [index.blocks] if "joint" in spec else [(block,) for block in index.blocks]
    found = scores("0.1,damping_rule=entry", index.blocks)
    bound = 1e-11 if "cg" in spec else 1e-12  # steps of a solver that stops add to the rounding
    assert relative_error(found, torch.stack([traces(group) for group in groups]).sum(0)) < bound
