"""Cross-entropy by rows against the one of torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from finetrace import cross_entropy as module
from finetrace.cross_entropy import cross_entropy


@pytest.fixture(params=[1, 3 * 11 * 8, 1 << 20])  # bytes: a row at a time, a few, all at once
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BYTES", request.param)


def logits_and_targets(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(11, (7,), generator=generator)


@pytest.mark.usefixtures("pieces")
def test_losses_and_gradients_are_those_of_the_definition() -> None:
    logits, targets = logits_and_targets(torch.float64)
    losses = cross_entropy(logits, targets)
    wanted = torch.logsumexp(logits, -1) - logits[torch.arange(7), targets]
    assert torch.allclose(losses, wanted, rtol=1e-14)
    weights = torch.arange(7.0, dtype=torch.float64) - 3
    (found,) = torch.autograd.grad(losses @ weights, logits)
    assert torch.allclose(found, torch.autograd.grad(wanted @ weights, logits)[0], atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), (logits,))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_widened_and_their_gradient_rounded_once(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(dtype)
    losses = cross_entropy(logits, targets)
    wanted = functional.cross_entropy(logits.float(), targets, reduction="none")
    assert losses.dtype == torch.float32 and torch.equal(losses, wanted)
    weights = torch.linspace(-1, 1, 7)
    (found,) = torch.autograd.grad(losses @ weights, logits)
    (other,) = torch.autograd.grad(wanted @ weights, logits)
    assert found.dtype == dtype
    assert torch.equal(found, other)


def test_it_is_differentiated_once() -> None:
    logits, targets = logits_and_targets(torch.float64)
    (slope,) = torch.autograd.grad(cross_entropy(logits, targets).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.square().sum(), logits)


def test_there_may_be_no_rows() -> None:
    assert cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)
