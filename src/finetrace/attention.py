"""Attention over short sequences in bfloat16 on the CPU, where torch's fused kernel is several times slower backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONGEST = 256  # tokens; beyond it the fused kernel wins
MOST_WEIGHTS = 1 << 26  # of all heads of a batch; each layer keeps them for its backward pass
HALF = (torch.bfloat16, torch.float16)
Take = Callable[[str, Sequence[int], torch.dtype], Tensor]  # uninitialised memory of a name, a shape and a dtype


class short_attention(TorchFunctionMode):
    """While open, `scaled_dot_product_attention` takes the plain route where that is the faster one.

    That is: bfloat16 (by itself or by autocast) on the CPU, a gradient wanted, no dropout, as many queries as keys, at
    most `LONGEST` of them, and a causal or a given mask. Scores and their softmax are float32, the other products
    bfloat16, as in the fused kernel; results differ from it by rounding alone. Everything else is torch's own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        plain = _plain(*args, **kwargs)
        return func(*args, **kwargs) if plain is None else plain


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> Tensor | None:
    """The result, or `None` where torch's own kernel is to be used."""
    if query.device.type != "cpu" or query.dim() != 4 or dropout_p or others or not torch.is_grad_enabled():
        return None
    tokens = query.shape[2]
    if key.shape[2] != tokens or tokens > LONGEST or is_causal == (attn_mask is not None):
        return None
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() not in (2, 4)):
        return None
    if len(key) != len(query) or len(value) != len(query) or query.shape[:2].numel() * tokens**2 > MOST_WEIGHTS:
        return None
    if not (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if query.shape[1] % key.shape[1] or (query.shape[1] != key.shape[1] and not enable_gqa):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if dtype != torch.bfloat16 or query.dtype not in (torch.bfloat16, torch.float32):
        return None
    query, key, value = (each.to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        return attend(query, key, value, attn_mask, scale)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v, queries in groups that share a key.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, T, D) and (B, G, T, E), G a divisor of H.
        mask: (T, T), or (B, H, T, T) where B and H may be 1: true or 0 where a query sees a key; `None` for causal. A query
            that sees no key gets zeros.
        scale: Of the inner products.

    Returns:
        (B, H, T, E) in the dtype of `query`.
    """
    tokens, wide = query.shape[2], torch.float32 if query.dtype in HALF else query.dtype
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    seen = causal if mask is None else mask
    seen = seen.reshape((1,) * (4 - seen.dim()) + seen.shape)
    if seen.dtype == torch.bool:
        bias = torch.zeros(seen.shape, dtype=wide, device=query.device).masked_fill_(~seen, -torch.inf)
    else:
        bias = seen.to(wide)
    heads, groups = query.shape[1], key.shape[1]
    if bias.shape[1] != 1:  # a mask of its own for every head
        bias = bias.expand(query.shape[0], heads, tokens, tokens).reshape(-1, heads // groups * tokens, tokens)
    else:
        bias = bias.expand(bias.shape[0], heads // groups, tokens, tokens).reshape(bias.shape[0], -1, tokens)
        if len(bias) > 1:
            bias = bias.repeat_interleave(groups, 0)
    attended: Tensor = _Attention.apply(query, key, value, bias, scale, mask is not None)
    return attended


class _Attention(torch.autograd.Function):
    """Batches of one group each: r = H / G query heads below one another, so that keys and values are not repeated."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, masked: bool
    ) -> Tensor:
        batch, heads, tokens, width = query.shape
        groups = key.shape[1]
        q = query.reshape(batch * groups, heads // groups * tokens, width)
        k, v = key.reshape(batch * groups, tokens, width), value.reshape(batch * groups, tokens, -1)
        attended, weights = grouped(q, k, v, bias, scale, masked)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shape = scale, (batch, heads, groups, tokens)
        return attended.view(batch, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, weights = ctx.saved_tensors
        batch, heads, groups, tokens = ctx.shape
        grad = grads[0].to(q.dtype).reshape(q.shape[0], q.shape[1], -1)
        grad_q, grad_k, grad_v = grouped_backward(grad, q, k, v, weights, ctx.scale)
        return (
            grad_q.view(batch, heads, tokens, -1),
            grad_k.view(batch, groups, tokens, -1),
            grad_v.view(batch, groups, tokens, -1),
            None,
            None,
            None,
        )


def grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    masked: bool = False,
    take: Take | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of batches of one group each, without a graph.

    Args:
        query: (N, r T, D), the r heads of a group below one another.
        key, value: (N, T, D) and (N, T, E).
        bias: (r T, T) or (N, r T, T), added to the scaled inner products, in the dtype that these are to have.
        scale: Of the inner products.
        masked: Whether a query may see no key at all; it then gets zeros.
        take: Gives memory by name for what is computed; by default it is fresh.

    Returns:
        (N, r T, E) results and (N, r T, T) weights, in the dtype of `query`.
    """
    room, wide, shape = take or _fresh(query), bias.dtype, query.shape[:2] + key.shape[1:2]

    def widened(name: str, values: Tensor) -> Tensor:
        return values if values.dtype == wide else room(name, values.shape, wide).copy_(values)

    scores = room("scores", shape, wide)
    torch.baddbmm(bias, widened("wide query", query), widened("wide key", key).mT, alpha=scale, out=scores)
    weights = room("weights", shape, query.dtype)
    if masked:  # gives zeros where nothing is seen
        weights.copy_(torch._safe_softmax(scores, -1))
    elif weights.dtype == wide:
        torch.softmax(scores, -1, out=weights)
    else:
        weights.copy_(torch.softmax(scores, -1, out=room("chances", shape, wide)))
    return torch.bmm(weights, value, out=room("attended", (*query.shape[:2], value.shape[-1]), query.dtype)), weights


def grouped_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float, take: Take | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the results of `grouped`, in their shapes.

    With `scale` 1 those of query and key are left to be scaled. `take` as for `grouped`.
    """
    room = take or _fresh(query)

    def product(name: str, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left, right, out=room(name, (len(left), left.shape[1], right.shape[2]), left.dtype))

    grad_weights, grad_scores = (
        product("grad weights", grad, value.mT),
        room("grad scores", weights.shape, weights.dtype),
    )
    torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype, grad_input=grad_scores)
    grad_query, grad_key = product("grad query", grad_scores, key), product("grad key", grad_scores.mT, query)
    if scale != 1:
        grad_query, grad_key = grad_query.mul_(scale), grad_key.mul_(scale)
    return grad_query, grad_key, product("grad value", weights.mT, grad)


def _fresh(like: Tensor) -> Take:
    """Memory that nothing else has, on the device of `like`."""
    return lambda name, shape, dtype: like.new_empty(shape, dtype=dtype)
