"""Layers whose gradient no hook sees, and layers that are called without a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetrace.collection import Collector, track
from finetrace.errors import FinetraceError
from tiny import make_encoded, make_llama, names, one_at_a_time, relative_error

LENGTHS = [7, 5, 9]


class _Half(nn.Module):
    """x + W x, with W read off a layer that is never called, or a layer that nobody reads."""

    def __init__(self, width: int, *, reads: bool) -> None:
        super().__init__()
        self.inner, self.reads = nn.Linear(width, width, bias=False), reads

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.T if self.reads else torch.zeros_like(x)


def _with_perceptron(**options: Any) -> nn.Module:
    model = make_llama()
    model.model.layers[1].mlp = _Half(16, **options).double()
    return model.eval()


def test_a_layer_whose_weight_is_read_without_calling_it_is_refused() -> None:
    """Its gradient had been a row of zeros."""
    model = _with_perceptron(reads=True)
    items = make_encoded(LENGTHS)
    with pytest.raises(FinetraceError, match=r"model\.layers\.1\.mlp\.inner: the model reads this layer's weight"):
        Collector(model, track(model, r"layers\.1\.mlp\.inner|q_proj")).collect(items, names(items))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_nothing_uses_has_gradient_zero() -> None:
    model = _with_perceptron(reads=False)
    items = make_encoded(LENGTHS)
    tracking = track(model, r"layers\.1\.mlp\.inner|q_proj")
    found = Collector(model, tracking).collect(items, names(items)).gradients
    idle = next(block for block in tracking.blocks if "inner" in block.name)
    assert not found[:, idle.columns].any()
    weights = [layer.module.weight for layer in tracking.layers if layer.weight is not idle]
    expected, _ = one_at_a_time(model, items, weights)
    others = torch.cat([found[:, block.columns] for block in tracking.blocks if block is not idle], dim=1)
    assert relative_error(others, expected) < 1e-10


class _Twice(nn.Module):
    """W (W x), the inner product without a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = self.inner(x)
        return self.inner(before + x)


def test_a_call_without_a_graph_adds_nothing() -> None:
    """As in models that train the last of their rounds alone; it had ended in a traceback of torch's."""
    model = make_llama()
    model.model.layers[1].mlp = _Twice(16).double()
    items = make_encoded(LENGTHS)
    tracking = track(model.eval(), r"layers\.1\.mlp\.inner|q_proj")
    found = Collector(model, tracking).collect(items, names(items)).gradients
    weights = [weight for layer in tracking.layers for weight in layer.module.parameters()]
    assert relative_error(found, one_at_a_time(model, items, weights)[0]) < 1e-10


class _Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        product = super().forward(x)
        return product, product.argmax(-1)


class _Routed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = _Router(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)[0]


def test_a_layer_that_returns_more_than_its_product_is_refused() -> None:
    model = make_llama()
    model.model.layers[1].mlp = _Routed(16).double()
    items = make_encoded(LENGTHS)
    with pytest.raises(FinetraceError, match=r"router\.weight: this layer returns more than its product"):
        Collector(model, track(model.eval(), "router")).collect(items, names(items))


class _Ternary(nn.Linear):
    """As BitNet's: it multiplies by what its weight is rounded to."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().mean()
        rounded = (self.weight.detach() / scale).round().clamp(-1, 1) * scale
        return nn.functional.linear(
            nn.functional.rms_norm(x, x.shape[-1:]), self.weight + (rounded - self.weight).detach()
        )


class _Eight(nn.Linear):
    """As BitNet's, too, where weights are ternary from the start: inputs of each token are rounded to eight bits."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
        return super().forward(x + ((x.detach() / step).round() * step - x.detach()))


class _Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def _with_query(kind: type[nn.Linear], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = make_llama()
    model.model.layers[1].self_attn.q_proj = kind(16, 16, bias=False)
    return model.to(dtype).eval()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((_Ternary, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        *((_Eight, dtype) for dtype in (torch.float64, torch.float32)),  # in half precision it is hardly above rounding
    ],
)
def test_a_layer_that_does_not_multiply_by_its_weight_is_refused(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    """Its gradient had been that of a linear layer on the same inputs."""
    model, items = _with_query(kind, dtype), make_encoded(LENGTHS)
    with pytest.raises(FinetraceError, match=r"q_proj\.weight: this layer makes something else of its inputs"):
        Collector(model, track(model, r"layers\.1\..*q_proj")).collect(items, names(items))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1.5e-2)]
)
def test_a_product_that_is_written_otherwise_is_collected(dtype: torch.dtype, bound: float) -> None:
    model, items = _with_query(_Plain, dtype), make_encoded(LENGTHS)
    found = Collector(model, track(model, r"layers\.1\..*q_proj")).collect(items, names(items)).gradients
    model = model.double()
    expected, _ = one_at_a_time(model, items, [model.model.layers[1].self_attn.q_proj.weight])
    assert relative_error(found.double(), expected) < bound


def test_layers_are_looked_at_once_however_many_pieces_are_collected() -> None:
    """A layer that nobody calls costs a pass of its own, and not one a piece of the data."""
    model, items = _with_perceptron(reads=False), make_encoded(LENGTHS)
    collector, passes = Collector(model, track(model, r"layers\.1\.mlp\.inner|q_proj"), batch_tokens=1), [0]
    model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    collector.collect(items, names(items))
    assert passes == [len(items) + 1]
    collector.collect(items, names(items))
    assert passes == [2 * len(items) + 1]
