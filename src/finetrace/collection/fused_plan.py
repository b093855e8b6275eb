"""Which models the fused pass knows: plain Llamas on the CPU, with plain LoRA or with tracked linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetrace.collection.fused_group import Group, Member
from finetrace.collection.fused_layer import Layer
from finetrace.collection.fused_parts import Norm, Shape
from finetrace.collection.modules import Tracked, Tracking

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CAPTURING = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class Plan:
    """A model's frozen weights as the fused pass multiplies them.

    Attributes:
        embedding: (vocabulary, d).
        layers: In order.
        lowest: The lowest layer with something tracked.
        norm: Before the vocabulary projection.
        head: (vocabulary, d).
        frequencies: (D / 2,) of the rotation.
        wide: Dtype of residual stream, norms and LoRA: float32 for bfloat16, else the model's own.
        lean: Whether nothing is tracked in the last layer after attention, so that it may see the rows of the loss alone.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    lowest: int
    norm: Norm
    head: Tensor
    frequencies: Tensor
    wide: torch.dtype
    lean: bool


class _UnknownError(Exception):
    """The model has a part that the fused pass does not know."""


def plan(model: nn.Module, tracking: Tracking) -> Plan | None:
    """How to compute the model's gradients by hand, or `None` where any part of it is not exactly what is known here."""
    try:
        return _plan(model, tracking)
    except _UnknownError:
        return None


def _plan(model: nn.Module, tracking: Tracking) -> Plan:
    from transformers.activations import ACT2FN
    from transformers.models.llama import modeling_llama as llama

    base = _base(model)
    _need(type(base) is llama.LlamaForCausalLM and type(base.model) is llama.LlamaModel)
    _need(not any(_touched(module) for module in model.modules()))
    _need(base.config._attn_implementation in ("sdpa", "eager") and base.config.hidden_act == "silu")
    rotary = base.model.rotary_emb
    _need(type(rotary) is llama.LlamaRotaryEmbedding and rotary.rope_type == "default")
    _need(type(base.model.embed_tokens) is nn.Embedding and base.model.embed_tokens.max_norm is None)
    embedding = base.model.embed_tokens.weight
    dtype = embedding.dtype
    _need(dtype in DTYPES)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    head = base.lm_head
    _need(type(head) is nn.Linear and head.bias is None)
    tracked: dict[int, Tracked] = {id(each.module): each for each in tracking.layers}
    seen: set[int] = set()

    def group(*modules: nn.Module) -> Group:
        members = [_member(module, dtype, tracked) for module in modules]
        seen.update(id(each.module) for member in members for _, each in member.tracked)
        return Group(members, wide)

    def norm(module: Any) -> Norm:
        if type(module) is llama.LlamaRMSNorm:
            return Norm(module.weight.detach().to(wide), module.variance_epsilon)
        _need(type(module) is nn.RMSNorm and module.weight is not None and module.eps is not None)
        return Norm(module.weight.detach().to(wide), module.eps)

    layers: list[Layer] = []
    for number, layer in enumerate(base.model.layers):
        attention, perceptron = layer.self_attn, layer.mlp
        _need(type(layer) is llama.LlamaDecoderLayer and type(attention) is llama.LlamaAttention)
        _need(type(perceptron) is llama.LlamaMLP and type(perceptron.act_fn) is type(ACT2FN["silu"]))
        config = attention.config
        shape = Shape(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
        _need(attention.scaling == shape.width**-0.5 and shape.width % 2 == 0)
        made = Layer(
            number,
            shape,
            norm(layer.input_layernorm),
            norm(layer.post_attention_layernorm),
            group(attention.q_proj, attention.k_proj, attention.v_proj),
            group(attention.o_proj),
            group(perceptron.gate_proj),
            group(perceptron.up_proj),
            group(perceptron.down_proj),
        )
        layers.append(made)
    _need(len(seen) == len(tracked) == len(tracking.layers))  # the vocabulary projection is not among them
    _need(len(layers) == base.config.num_hidden_layers > 0)
    _need(all(weight.device.type == "cpu" for weight in model.parameters()))
    lowest = next(i for i, layer in enumerate(layers) if any(each.watched for each in _groups(layer)))
    weights = (base.model.embed_tokens.weight.detach(), head.weight.detach())
    _need(all(each.dtype == dtype for each in weights))
    return Plan(
        weights[0],
        tuple(layers),
        lowest,
        norm(base.model.norm),
        weights[1],
        rotary.inv_freq.detach().float(),
        wide,
        not any(each.watched for each in _groups(layers[-1])[1:]),
    )


def _groups(layer: Layer) -> tuple[Group, ...]:
    return (layer.qkv, layer.out, layer.gate, layer.up, layer.down)


def _base(model: Any) -> Any:
    """The model below a plain LoRA, or the model itself."""
    from peft import LoraModel, PeftModel

    if not isinstance(model, PeftModel):
        return model
    _need(type(model.base_model) is LoraModel)
    return model.base_model.model


def _member(module: Any, dtype: torch.dtype, tracked: dict[int, Tracked]) -> Member:
    """One linear map, with its LoRA where it has one."""
    from peft.tuners.lora.layer import Linear

    found: list[tuple[Literal["weight", "a", "b"], Tracked]] = []
    lora: tuple[Tensor, Tensor, float] | None = None
    linear = module
    if type(module) is Linear:
        linear = module.base_layer
        _need(not module.merged and not module.disable_adapters and not getattr(module, "lora_variant", {}))
        active = [name for name in module.active_adapters if name in module.lora_A]
        _need(len(active) <= 1)
        if active:
            first, second = module.lora_A[active[0]], module.lora_B[active[0]]
            _need(type(first) is type(second) is nn.Linear and first.bias is None and second.bias is None)
            lora = (first.weight, second.weight, float(module.scaling[active[0]]))
            found += [("a", tracked[id(first)])] if id(first) in tracked else []
            found += [("b", tracked[id(second)])] if id(second) in tracked else []
    _need(type(linear) is nn.Linear and linear.bias is None and linear.weight.dtype == dtype)
    found += [("weight", tracked[id(linear)])] if id(linear) in tracked else []
    return Member(linear.weight, lora, tuple(found))


def _touched(module: nn.Module) -> bool:
    """Whether something listens to a module or stands in for its forward pass.

    What transformers installs for good, once hidden states were asked for, sleeps unless they are.
    """
    listeners = [each for each in module._forward_hooks.values() if getattr(each, "__module__", "") != CAPTURING]
    hooks: Sequence[Any] = (listeners, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or bool(getattr(module, "parametrizations", None))


def _need(condition: bool) -> None:
    if not condition:
        raise _UnknownError
