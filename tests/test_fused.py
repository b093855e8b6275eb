"""The pass written out by hand against autograd of one example at a time, and against the general pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finetrace.collection import Collector, Features, Representation, track
from finetrace.collection.factors import FactorSums
from finetrace.collection.fused import Fused
from finetrace.collection.fused_layout import Layout
from finetrace.collection.projection import Projection
from finetrace.collection.representations import POOLINGS
from finetrace.encoding import Encoded, Encoder
from finetrace.forward import Batch
from finetrace.prefix import forget
from fused_models import ITEMS, MODELS, opening
from tiny import (
    make_encoded,
    make_examples,
    make_gpt2,
    make_llama,
    make_tokenizer,
    names,
    one_at_a_time,
    relative_error,
    with_lora,
)

BUDGETS = [1, 60, 100_000]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that went through the pass."""
    seen: list[int] = []
    run = Fused.run

    def counted(self: Fused, recorder: Any, batch: Batch, *args: Any) -> Any:
        seen.append(len(batch))
        return run(self, recorder, batch, *args)

    monkeypatch.setattr(Fused, "run", counted)
    return seen


def both(
    model: Any,
    items: Sequence[Encoded],
    modules: Sequence[str] | None = None,
    wanted: tuple[Representation, ...] = (),
    budget: int = 100_000,
    **more: Any,
) -> tuple[Features, Features]:
    """By the general pass and by the fused one."""
    tracking = track(model, modules, **more)
    general, fused = (
        Collector(model, tracking, wanted, budget, fused=fused).collect(items, names(items)) for fused in (False, True)
    )
    return general, fused


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(name: str, budget: int, items: list[Encoded], passes: list[int]) -> None:
    model, modules = MODELS[name]()
    tracking = track(model, modules)
    gradients, losses = one_at_a_time(model, items, [layer.module.weight for layer in tracking.layers])
    found = Collector(model, tracking, (), budget, fused=True).collect(items, names(items))
    assert sum(passes) == len(items)
    assert relative_error(found.gradients, gradients) < 1e-10
    assert relative_error(found.losses, losses) < 1e-10
    assert all(gradients[:, block.columns].norm() > 0 for block in tracking.blocks), "a test of zeros tests nothing"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["lora", "lora on the upper layer"])
def test_hidden_states_are_those_of_the_general_pass(name: str, budget: int, passes: list[int]) -> None:
    model, modules = MODELS[name]()
    depth = len(model.get_base_model().model.layers)
    wanted = tuple(Representation(layer, pooling) for layer in range(-depth - 1, 0) for pooling in POOLINGS)
    general, fused = both(model, ITEMS["a common opening"], modules, wanted, budget)
    assert passes
    assert list(fused.representations) == list(general.representations)
    for key, values in general.representations.items():
        assert relative_error(fused.representations[key], values) < 1e-10
    assert relative_error(fused.gradients, general.gradients) < 1e-10


@pytest.mark.parametrize("labels", ["model", "data"])
@pytest.mark.parametrize("name", ["lora", "lora on every linear layer", "weights", "lora on the upper layer"])
def test_factors_are_those_of_the_general_pass(name: str, labels: Any, passes: list[int]) -> None:
    model, modules = MODELS[name]()
    items, found = ITEMS["a common opening"], []
    for fused in (False, True):
        collector = Collector(model, track(model, modules), batch_tokens=120, fused=fused)
        sums = collector.factor_sums(labels)
        found.append((collector.collect(items, names(items), factors=sums), sums))
    assert sum(passes) == len(items)
    (general, expected), (features, sums) = found
    assert_equal_sums(sums, expected)
    assert relative_error(features.gradients, general.gradients) < 1e-10
    if labels == "model":
        assert relative_error(features.sampled, general.sampled) < 1e-10


@pytest.mark.parametrize(("many", "few"), [(20, 3), (1, 1), (100_000, 100_000)])
def test_logits_are_made_in_parts(many: int, few: int, monkeypatch: pytest.MonkeyPatch, passes: list[int]) -> None:
    """However many rows of the loss are multiplied at a time, and of how many of these chances are taken."""
    monkeypatch.setattr("finetrace.collection.fused.HEAD_ROWS", many)
    monkeypatch.setattr("finetrace.collection.fused.CHANCE_ROWS", few)
    model, items, found = with_lora(make_llama()), ITEMS["a common opening"], []
    for fused in (False, True):
        collector = Collector(model, track(model), batch_tokens=100_000, fused=fused)
        found.append(collector.collect(items, names(items), factors=collector.factor_sums("model")))
    assert passes == [len(items)]
    assert len(Batch.of(items).rows) == 77
    for name in ("gradients", "sampled", "losses"):
        assert relative_error(getattr(found[1], name), getattr(found[0], name)) < 1e-10, name


def assert_equal_sums(found: FactorSums, expected: FactorSums) -> None:
    assert found.tokens == expected.tokens
    for block in expected.left:
        assert torch.allclose(found.left[block], expected.left[block], rtol=1e-10, atol=1e-13)
        assert torch.allclose(found.right[block], expected.right[block], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("labels", ["model", "data"])
def test_projected_gradients_and_their_factors(labels: Any, passes: list[int]) -> None:
    model, items = with_lora(make_llama()), ITEMS["a common opening"]
    for text in ("two-sided:3x4", "rademacher:5"):
        tracking, found = track(model, None, Projection.parse(text)), []
        for fused in (False, True):
            collector = Collector(model, tracking, (), 120, fused=fused)
            sums = collector.factor_sums(labels) if text.startswith("two") else None
            found.append((collector.collect(items, names(items), factors=sums), sums))
        assert sum(passes) == len(items)
        passes.clear()
        assert relative_error(found[1][0].gradients, found[0][0].gradients) < 1e-10
        if sums is not None and found[0][1] is not None:
            assert_equal_sums(sums, found[0][1])


def test_a_layer_that_is_called_twice_adds_up(passes: list[int]) -> None:
    model = make_llama(layers=3)
    model.model.layers[2] = model.model.layers[0]
    model = with_lora(model)
    general, fused = both(model, ITEMS["a common opening"])
    assert passes
    assert relative_error(fused.gradients, general.gradients) < 1e-10


@pytest.mark.parametrize("where", [[3, 9], [2], [11, 4, 5]])
def test_losses_on_any_tokens(where: list[int], passes: list[int]) -> None:
    """Before the last prompt's end, with gaps, in the common opening: as later turns, or other positions, have them."""
    model, items = with_lora(make_llama()), []
    for item in ITEMS["a common opening"]:
        weights = np.zeros_like(item.weights)
        weights[where] = 1 / len(where)
        items.append(replace(item, weights=weights))
    general, fused = both(model, items, None, tuple(Representation(-1, pooling) for pooling in POOLINGS), 120)
    assert sum(passes) == len(items)
    assert relative_error(fused.gradients, general.gradients) < 1e-10
    for key, values in general.representations.items():
        assert relative_error(fused.representations[key], values) < 1e-10


def test_single_precision_is_as_near_as_the_general_pass(passes: list[int]) -> None:
    model, items = with_lora(make_llama()), ITEMS["a common opening"]
    exact, _ = both(model, items)
    general, fused = both(model.float(), items)
    chosen = Collector(model, track(model), (), 100_000, fused=None).collect(items, names(items))
    assert len(passes) == 3  # with double precision, with single, and where the choice was left to the collector
    assert torch.equal(chosen.gradients, fused.gradients)
    assert fused.gradients.dtype == torch.float32
    assert relative_error(fused.gradients.double(), exact.gradients) < 1e-5
    assert relative_error(fused.gradients, general.gradients) < 1e-5
    assert relative_error(fused.losses, general.losses) < 1e-6


def test_half_precision_is_as_near_as_the_general_pass(passes: list[int]) -> None:
    model, items = with_lora(make_llama()), ITEMS["a common opening"]
    exact, _ = both(model, items)
    general, fused = both(model.to(torch.bfloat16), items)
    chosen = Collector(model, track(model), (), 100_000, fused=None).collect(items, names(items))
    assert len(passes) == 3  # with double precision, with half, and where the choice was left to the collector
    assert torch.equal(chosen.gradients, fused.gradients)
    errors = [(each.gradients.double() - exact.gradients).norm() for each in (general, fused)]
    assert errors[1] < 2 * errors[0]  # 1.2 on one processor; each rounds its products in another order


def test_rows_of_the_layout() -> None:
    """The common opening once forward and in every example backward; neither padding nor what lies behind the loss."""
    items = opening(make_encoded([9, 12]), 7)
    for item in items:
        item.weights[:] = 0
        item.weights[[12, 14]] = 0.5
    layout = Layout.of(Batch.of(items))
    assert layout.ids[:7].tolist() == list(range(5, 12))
    assert len(layout.ids) == 7 + 2 * (14 - 6)  # tokens 7 to 14, of which the last one is pooled
    assert len(layout.carrying) == 2 * 14
    assert layout.places[layout.loss].tolist() == [11, 13, 19 + 11, 19 + 13] == Batch.of(items).rows.tolist()
    assert layout.carrying[-4:].tolist() == layout.places[layout.loss].tolist()
    values = torch.randn(len(layout.ids), 3)
    spread = layout.spread(values)
    assert torch.equal(spread[0, :7], values[:7])
    assert torch.equal(spread[1, :7], values[:7])
    assert torch.equal(spread.reshape(-1, 3)[layout.places], values)
    whole = Layout.of(Batch.of(items[:1]))
    assert len(whole.ids) == 15  # one example has nothing in common; the last token of the loss is pooled


def test_double_precision_is_left_to_autograd(passes: list[int]) -> None:
    model, items = with_lora(make_llama()), ITEMS["a common opening"]
    found = Collector(model, track(model), (), 100_000).collect(items, names(items))
    assert passes == []
    assert found.gradients.dtype == torch.float64


@pytest.mark.parametrize("budget", [1, 100_000])
def test_padding_on_the_left_and_long_rows_go_the_general_way(budget: int, passes: list[int]) -> None:
    model, examples = with_lora(make_llama()), make_examples(4)
    for items in (Encoder(make_tokenizer(), "response@90").encode_all(examples)[0], make_encoded([300, 280])):
        general, fused = both(model, items, budget=budget)
        assert torch.equal(fused.gradients, general.gradients)
    assert passes == []


def hooked() -> Any:
    model = with_lora(make_llama())
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


def merged() -> Any:
    model = with_lora(make_llama())
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("build", "modules"),
    [
        (lambda: with_lora(make_gpt2(), ["c_attn"]), None),
        (make_llama, ["lm_head"]),
        (lambda: with_lora(make_llama(attention_bias=True)), None),
        (lambda: with_lora(make_llama(hidden_act="gelu")), None),
        (lambda: with_lora(make_llama().half()), None),
        (hooked, None),
        (merged, ["down_proj"]),
    ],
)
def test_what_is_not_known_goes_the_general_way(build: Any, modules: Any) -> None:
    model = build()
    assert Fused.of(model, track(model, modules)) is None


def test_the_same_batch_again_starts_above_what_is_frozen(passes: list[int]) -> None:
    model = with_lora(make_llama(layers=3), layers_to_transform=[2])
    items = ITEMS["a common opening"]
    forget()
    collector = Collector(model, track(model), batch_tokens=120, fused=True)
    first, again = (collector.collect(items, names(items)) for _ in range(2))
    assert sum(passes) == 2 * len(items)
    assert torch.equal(first.gradients, again.gradients)
    general = Collector(model, track(model), batch_tokens=120).collect(items, names(items))
    assert relative_error(again.gradients, general.gradients) < 1e-10
    forget()


def test_a_batch_too_large_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = with_lora(make_llama()), ITEMS["a common opening"]
    expected, _ = both(model, items)
    run = Fused.run

    def greedy(self: Fused, recorder: Any, batch: Batch, *args: Any) -> Any:
        found = run(self, recorder, batch, *args)
        if len(batch) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return found

    monkeypatch.setattr(Fused, "run", greedy)
    found = Collector(model, track(model), (), 100_000, fused=True).collect(items, names(items))
    assert found.halved > 2
    assert relative_error(found.gradients, expected.gradients) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "lora on every linear layer"])
def test_factors_and_hidden_states_leave_the_bits_of_gradients_alone(name: str, dtype: torch.dtype) -> None:
    model, modules = MODELS[name]()
    model = model.to(dtype)
    tracking, items, found = track(model, modules), ITEMS["a common opening"], []
    for wanted, labels in (((), None), ((Representation(),), "model"), ((Representation(-2),), "data")):
        collector = Collector(model, tracking, wanted, 120, fused=True)
        sums = collector.factor_sums(labels) if labels is not None else None
        found.append(collector.collect(items, names(items), factors=sums).gradients)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
