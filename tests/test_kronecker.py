"""K-FAC and EK-FAC against a dense Kronecker twin written out by hand, in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetrace.attribution import Problem, make
from finetrace.collection import Collector, Features, track
from finetrace.collection.factors import FactorSums, Labels, sampled_targets
from finetrace.curvature import Kronecker, KroneckerBasis, Products
from finetrace.encoding import Encoded, Encoder
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, token_logits
from finetrace.index import build_index, factors, kronecker_factors, open_index
from finetrace.models import Loaded
from tiny import make_encoded, make_examples, make_gpt2, make_llama, names, relative_error, with_lora

LENGTHS = [9, 31, 4, 17, 17, 40, 5, 25]
MODELS = {
    "lora": lambda: (with_lora(make_llama()), None),
    "linear": lambda: (make_llama(), [r"layers\.1\.self_attn\.(q|o)_proj", r"layers\.0\.mlp"]),
    "linear with bias": lambda: (make_llama(attention_bias=True), [r"self_attn\.[qk]_proj"]),
    "conv1d with bias": lambda: (make_gpt2(), ["c_attn", r"\.mlp\."]),
    "head": lambda: (make_llama(hidden=8), ["lm_head", r"layers\.1\.mlp\.up_proj"]),
}


def collect(
    model: Any, items: Sequence[Encoded], modules: Sequence[str] | None, labels: Labels, budget: int = 100_000
) -> tuple[Features, FactorSums]:
    collector = Collector(model, track(model, modules), (), budget)
    sums = collector.factor_sums(labels)
    return collector.collect(items, names(items), factors=sums), sums


def by_hand(model: Any, items: Sequence[Encoded], modules: Sequence[str] | None, labels: Labels) -> dict[str, Any]:
    """One example at a time through the plain model: sums of outer products, and gradients by autograd.

    Inputs and output gradients are taken by hooks of this test's own, at all positions to the last that predicts a token of
    the loss; the head sees those alone that predict one.
    """
    tracking = track(model, modules)
    sums: dict[str, Any] = {}
    gradients = []
    for item, name in zip(items, names(items), strict=True):
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        handles = []
        for i, layer in enumerate(tracking.layers):

            def keep(module: Any, args: Any, output: Tensor, i: int = i, seen: Any = seen) -> None:
                output.retain_grad()
                seen[i] = (args[0].detach(), output)

            handles.append(layer.module.register_forward_hook(keep))
            for parameter in layer.module.parameters():
                parameter.requires_grad_(True)
        ids = torch.from_numpy(item.ids).long().unsqueeze(0)
        positions = torch.from_numpy(item.weights > 0).nonzero().flatten() - 1
        logits = model(input_ids=ids, use_cache=False).logits[0, positions]
        batch = Batch.of([item])
        if labels == "model":
            chosen = sampled_targets(logits, batch, [name])
            weights = torch.full((len(positions),), 1 / len(positions), dtype=torch.float64).sqrt()
        else:
            chosen = ids[0, positions + 1]
            weights = torch.full((len(positions),), 1 / len(positions), dtype=torch.float64)
        loss = (torch.nn.functional.cross_entropy(logits, chosen, reduction="none") * weights).sum()
        parameters = [p for layer in tracking.layers for p in _parameters(layer)]
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        for handle in handles:
            handle.remove()
        for i, layer in enumerate(tracking.layers):
            where = positions if layer.is_head else torch.arange(int(positions.max()) + 1)
            inputs, delta = seen[i][0][0, where], seen[i][1].grad[0, where]
            if not layer.is_head:  # nothing after them carries gradient
                assert not seen[i][1].grad[0, len(where) :].any()
            sides = (inputs, delta) if layer.transposed else (delta, inputs)
            _add(sums, layer.weight.name, sides)
            if layer.bias is not None:
                _add(sums, layer.bias.name, (delta, torch.ones(len(where), 1, dtype=torch.float64)))
    return {"sums": sums, "gradients": torch.stack(gradients)}


def _parameters(layer: Any) -> list[Tensor]:
    return [layer.module.weight] + ([layer.module.bias] if layer.bias is not None else [])


def _add(sums: dict[str, Any], name: str, sides: tuple[Tensor, Tensor]) -> None:
    left, right, tokens = sums.get(name, (0, 0, 0))
    sums[name] = (left + sides[0].T @ sides[0], right + sides[1].T @ sides[1], tokens + len(sides[0]))


@pytest.mark.parametrize("labels", ["model", "data"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_and_sampled_gradients_are_those_of_one_example_at_a_time(name: str, labels: Labels) -> None:
    model, modules = MODELS[name]()
    items = make_encoded(LENGTHS)
    expected = by_hand(model, items, modules, labels)
    for budget in (1, 70, 100_000):
        features, sums = collect(model, items, modules, labels, budget)
        for block, (left, right, tokens) in expected["sums"].items():
            assert relative_error(sums.left[block], left) < 1e-9
            assert relative_error(sums.right[block], right) < 1e-9
            assert sums.tokens[block] == tokens
        found = features.sampled if labels == "model" else features.gradients
        assert found is not None
        assert relative_error(found, expected["gradients"]) < 1e-9


def test_padding_is_in_no_sum_and_moves_none() -> None:
    model, modules = MODELS["lora"]()
    plain = make_encoded(LENGTHS)
    padded = [
        replace(
            item,
            ids=np.concatenate([np.zeros(5, dtype=np.int32), item.ids]),
            weights=np.concatenate([np.zeros(5, dtype=np.float32), item.weights]),
            prompt_length=item.prompt_length + 5,
            padding=5,
        )
        for item in plain
    ]
    for budget in (1, 100_000):
        (_, expected), (_, found) = (collect(model, items, modules, "data", budget) for items in (plain, padded))
        assert found.tokens == expected.tokens
        for block in expected.left:  # transformers computes the rotary angles in float32
            assert relative_error(found.left[block], expected.left[block]) < 1e-5
            assert relative_error(found.right[block], expected.right[block]) < 1e-5


def test_a_loss_that_looks_at_padding_has_it_in_the_sums() -> None:
    weights = np.array([0, 0.25, 0, 0.25, 0, 0.5, 0], dtype=np.float32)
    item = Encoded(np.ones(7, dtype=np.int32), weights, 3, padding=2)
    batch = Batch.of([item, *make_encoded([5])])
    assert batch.carrying[batch.carrying < 7].tolist() == [0, 2, 3, 4]


def test_factors_of_an_older_format_are_fitted_again(tmp_path: Path, tiny_loaded: Loaded) -> None:
    index, _ = build_index(
        tiny_loaded, make_examples(4), tmp_path / "i", Encoder(tiny_loaded.tokenizer), kronecker="data"
    )
    about = factors.path(index.folder, "data").with_suffix(".json")
    document = json.loads(about.read_text())
    before = about.read_bytes()
    about.write_text(json.dumps({key: value for key, value in document.items() if key != "format"}))
    assert not factors.there(index.folder, "data")
    kronecker_factors(index, "data")
    assert about.read_bytes() == before


def test_factors_leave_the_gradients_as_they_are() -> None:
    model, modules = MODELS["lora"]()
    items = make_encoded(LENGTHS)
    plain = Collector(model, track(model, modules), (), 70).collect(items, names(items))
    fitted, _ = collect(model, items, modules, "model", 70)
    assert torch.equal(plain.gradients, fitted.gradients)
    assert torch.equal(plain.losses, fitted.losses)


def test_drawn_labels_follow_the_models_prediction() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)).repeat(4000, 1)
    weights = [1 / 4000] * 4000
    item = Encoded(torch.ones(4001).int().numpy(), torch.tensor([0.0, *weights]).numpy(), 1)
    drawn = sampled_targets(logits, Batch.of([item]), ["a"])
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    assert not torch.equal(drawn, sampled_targets(logits, Batch.of([item]), ["b"]))


def test_the_sampled_loss_has_the_fisher_of_the_mean_loss_as_its_second_moment() -> None:
    """Averaged over many draws, g g^T of the sampled loss approaches sum_t w_t E_y[grad log p(y) grad log p(y)^T]."""
    model = make_llama(hidden=8, layers=1)
    modules = [r"self_attn\.v_proj"]
    item = make_encoded([12])[0]
    weight = model.model.layers[0].self_attn.v_proj.weight
    batch = Batch.of([item])
    weight.requires_grad_(True)
    logits, _ = token_logits(model, batch)
    chances = torch.softmax(logits, -1)
    fisher = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64)
    logs = torch.log_softmax(logits, -1)
    for t in range(len(logits)):
        scores = []
        for y in range(logits.shape[1]):
            (gradient,) = torch.autograd.grad(logs[t, y], weight, retain_graph=True)
            scores.append(gradient.flatten() * chances[t, y].sqrt())
        stacked = torch.stack(scores).detach()
        fisher += batch.weights[t] * stacked.T @ stacked
    weight.requires_grad_(False)
    draws = 3000
    collector = Collector(model, track(model, modules), (), 100_000)
    many = collector.collect([item] * draws, [f"d{i}" for i in range(draws)], factors=collector.factor_sums("model"))
    assert many.sampled is not None
    moment = many.sampled.T @ many.sampled / draws
    assert float((moment - fisher).norm() / fisher.norm()) < 0.1


def dense(basis: KroneckerBasis, eigenvalues: Tensor, multiple: float) -> Tensor:
    """(d, d) inverse of the damped curvature, as a matrix of Kronecker products written out."""
    vectors = torch.kron(basis.left, basis.right)
    curvature = vectors @ torch.diag(eigenvalues.flatten()) @ vectors.T
    return torch.linalg.inv(curvature + multiple * eigenvalues.mean() * torch.eye(len(vectors), dtype=torch.float64))


def test_scores_equal_the_dense_twin(tmp_path: Path, tiny_loaded: Loaded) -> None:
    loaded = Loaded(with_lora(make_llama()), tiny_loaded.tokenizer, tiny_loaded.spec)
    examples, queries = make_examples(11), make_examples(4, seed=9)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer), rows_per_shard=4)
    problem = Problem(index, queries)
    bases = kronecker_factors(index, "model")
    train = index.gradients(slice(None))
    for name in ("kfac", "ekfac"):
        scores, train_self, query_self = 0, 0, 0
        for block in index.blocks:
            basis = bases[block.name]
            inverse = dense(basis, basis.kfac if name == "kfac" else basis.ekfac, 0.1)
            v, g = problem.features.gradients[:, block.columns], train[:, block.columns]
            scores += v @ inverse @ g.T
            train_self += ((g @ inverse) * g).sum(1)
            query_self += ((v @ inverse) * v).sum(1)
        plain = torch.from_numpy(make(name).score(problem).values)
        assert relative_error(plain, scores) < 1e-8
        cosine = scores / train_self.sqrt()[None] / query_self.sqrt()[:, None]
        assert relative_error(torch.from_numpy(make(f"{name}:normalise=cosine").score(problem).values), cosine) < 1e-8
        relatif = torch.from_numpy(make(f"{name}:normalise=relatif").score(problem).values)
        assert relative_error(relatif, scores / train_self.sqrt()[None]) < 1e-8


@pytest.mark.parametrize("labels", ["model", "data"])
def test_index_factors_equal_eigenvectors_by_hand(tmp_path: Path, tiny_loaded: Loaded, labels: Labels) -> None:
    """The whole road through shards: eigenvalues kfac and ekfac from the sums and gradients of one example at a time."""
    loaded = Loaded(with_lora(make_llama()), tiny_loaded.tokenizer, tiny_loaded.spec)
    examples = make_examples(9)
    encoder = Encoder(loaded.tokenizer)
    index, _ = build_index(loaded, examples, tmp_path / "i", encoder, rows_per_shard=4, kronecker=labels)
    bases = kronecker_factors(index, labels)
    items = [encoder.encode(example) for example in examples]
    collector = Collector(loaded.model, track(loaded.model), (), 1)
    sums = collector.factor_sums(labels)
    features = collector.collect(items, [example.id for example in examples], factors=sums)
    rows = features.sampled if labels == "model" else features.gradients
    assert rows is not None
    for block in index.blocks:
        basis, n = bases[block.name], len(examples)
        tokens = sums.tokens[block.name]
        curvature = torch.kron(sums.left[block.name] / tokens, sums.right[block.name] / tokens) * tokens / n
        vectors = torch.kron(basis.left, basis.right)
        found = vectors @ torch.diag(basis.kfac.flatten()) @ vectors.T
        assert relative_error(found.flatten(), curvature.flatten()) < 1e-8 or float((found - curvature).norm()) < 1e-12
        second = rows[:, block.columns].T @ rows[:, block.columns] / n
        corrected = torch.diagonal(vectors.T @ second @ vectors)
        assert torch.allclose(basis.ekfac.flatten(), corrected, rtol=1e-8, atol=1e-14)


def test_exact_where_the_curvature_is_a_kronecker_product() -> None:
    """Gradients delta_i a_j^T for every pair (i, j): one token each, so E[vec vec^T] = E[delta delta^T] kron E[a a^T]."""
    torch.manual_seed(0)
    deltas, inputs = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    pairs = [(d, a) for d in deltas for a in inputs]
    train = torch.stack([torch.outer(d, a).flatten() for d, a in pairs])
    query = torch.randn(5, 12, dtype=torch.float64)
    left = sum(torch.outer(d, d) for d, _ in pairs)
    right = sum(torch.outer(a, a) for _, a in pairs)
    basis = KroneckerBasis.of(left, right, len(pairs), len(pairs))
    basis = basis.corrected(basis.rotate(train).square().mean(0))
    curvature = train.T @ train / len(train)
    for eigenvalues in (basis.kfac, basis.ekfac):
        damped = curvature + 0.01 * eigenvalues.mean() * torch.eye(12, dtype=torch.float64)
        expected = query @ torch.linalg.inv(damped) @ train.T
        found = Kronecker(Products.of(train, query), basis, eigenvalues, 0.01).products()
        assert relative_error(found, expected) < 1e-10


def test_ekfac_is_the_best_diagonal_in_its_basis() -> None:
    torch.manual_seed(1)
    train = torch.randn(40, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    matrices = train.view(40, 3, 4)
    basis = KroneckerBasis.of((matrices @ matrices.mT).sum(0), (matrices.mT @ matrices).sum(0), 40, 40)
    basis = basis.corrected(basis.rotate(train).square().mean(0))
    curvature = train.T @ train / 40
    vectors = torch.kron(basis.left, basis.right)

    def distance(eigenvalues: Tensor) -> float:
        return float((vectors @ torch.diag(eigenvalues.flatten()) @ vectors.T - curvature).norm())

    assert distance(basis.ekfac) < distance(basis.kfac)
    for _ in range(20):
        assert distance(basis.ekfac) <= distance(basis.ekfac + 0.1 * torch.randn_like(basis.ekfac))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_fitted_on_the_way_afterwards_or_after_a_kill_the_same(
    tmp_path: Path, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(13)
    encoder = Encoder(tiny_loaded.tokenizer)

    def build(folder: Path, labels: Labels | None) -> None:
        build_index(tiny_loaded, examples, folder, encoder, rows_per_shard=4, kronecker=labels)

    build(tmp_path / "way", "model")
    build(tmp_path / "after", None)
    kronecker_factors(open_index(tmp_path / "after", tiny_loaded), "model")
    collect_, calls = Collector.collect, []

    def stopping(self: Collector, *args: Any, **options: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return collect_(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "killed", "model")
    build(tmp_path / "killed", "model")
    expected = files(tmp_path / "way")
    assert "factors/model.safetensors" in expected
    assert not any("parts" in name for name in expected)
    assert files(tmp_path / "after") == expected
    assert files(tmp_path / "killed") == expected


def test_broken_factors_are_refused(tmp_path: Path, tiny_loaded: Loaded) -> None:
    encoder = Encoder(tiny_loaded.tokenizer)
    index, _ = build_index(tiny_loaded, make_examples(5), tmp_path / "i", encoder, kronecker="data")
    path = factors.path(index.folder, "data")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FinetraceError, match="these factors are broken"):
        kronecker_factors(index, "data")
