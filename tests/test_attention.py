"""Plain attention over short sequences: torch's own numbers, taken only where it is meant to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetrace import attention
from finetrace.attention import LONGEST, attend, short_attention
from finetrace.encoding import Encoder
from finetrace.forward import Batch, token_losses
from tiny import make_examples, make_llama, make_tokenizer


def heads(dtype: torch.dtype, tokens: int = 7, batch: int = 3, groups: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, 4, tokens, 8), (batch, groups, tokens, 8), (batch, groups, tokens, 5)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def masks(batch: int = 3, tokens: int = 7) -> dict[str, Tensor | None]:
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    padded = causal.expand(batch, 1, tokens, tokens).clone()
    padded[1, :, :, :3] = False  # padded on its left: its first three queries see nothing
    return {
        "causal": None,
        "given": causal,
        "padded": padded,
        "added": torch.randn(batch, 1, tokens, tokens, dtype=torch.float64),
        "each-head": torch.randn(batch, 4, tokens, tokens, dtype=torch.float64),
    }


def gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(result, inputs, torch.randn(result.shape, dtype=torch.float64).to(result.dtype)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", list(masks()))
def test_results_and_gradients_are_those_of_torch(name: str, groups: int) -> None:
    mask, inputs = masks()[name], heads(torch.float64, groups=groups)
    if mask is not None and mask.dim() == 2:
        mask = mask[None, None]
    found = attend(*inputs, mask, 0.3)
    expected = scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    if name == "padded":
        assert not found[1, :, :3].any()


def test_bfloat16_rounds_like_the_fused_kernel() -> None:
    inputs = heads(torch.bfloat16, tokens=96)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = gradients(scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True), exact)

    def error(found: Tensor) -> float:
        pairs = zip(gradients(found, inputs), expected, strict=True)
        return max(float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in pairs)

    fused = error(scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True))
    assert (
        error(attend(*inputs, None, 8**-0.5)) < 4 * fused < 0.04
    )  # 1.7 on one processor; each has other fused kernels


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of the plain route."""
    calls: list[int] = []

    def counted(*args: object) -> Tensor:
        calls.append(1)
        return attend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend", counted)
    return calls


def test_it_is_taken_in_bfloat16_with_a_gradient_and_a_mask_alone(
    taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(inputs: list[Tensor], **options: object) -> Tensor:
        with short_attention():
            return scaled_dot_product_attention(*inputs, **{"is_causal": True, "enable_gqa": True} | options)  # type: ignore[arg-type]

    half = heads(torch.bfloat16)
    for spared in (heads(torch.float32), heads(torch.bfloat16, tokens=LONGEST + 1), [each.detach() for each in half]):
        call(spared)
    call(half, is_causal=False)
    call(half, dropout_p=0.5)
    with torch.no_grad():
        call(half)
    learnt = torch.zeros(7, 7, dtype=torch.bfloat16, requires_grad=True)  # its gradient is torch's to give
    call(half, is_causal=False, attn_mask=learnt).sum().backward()
    assert learnt.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        call(heads(torch.float64))
    with monkeypatch.context() as patch:
        patch.setattr(attention, "MOST_WEIGHTS", 10)
        call(half)
    assert not taken
    call(half)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(call(half, is_causal=False, attn_mask=mask), call(half))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(heads(torch.float32)).dtype == torch.bfloat16
    assert len(taken) == 4


@pytest.mark.parametrize("padding", [None, 40])
def test_a_model_in_bfloat16_takes_it(taken: list[int], padding: int | None) -> None:
    model, tokenizer = make_llama().bfloat16(), make_tokenizer()
    encoder = Encoder(tokenizer, "response", pad_to=padding or 0)
    batch = Batch.of(encoder.encode_all(make_examples(4))[0])
    losses = token_losses(model, batch)[0]
    assert len(taken) == model.config.num_hidden_layers
    with torch.no_grad():
        expected = token_losses(model, batch)[0]
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
