"""What a model computes beside its weights: the settings of its architecture that weights of the same shapes do not show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

NAME = "configuration of the base model"  # for people
Setting = bool | int | float | str | None

DECIDING = frozenset(
    {
        "activation_function",
        "attention_multiplier",
        "attn_logit_softcapping",
        "clip_qkv",
        "embedding_multiplier",
        "final_logit_softcapping",
        "hidden_act",
        "hidden_activation",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "logit_scale",
        "logits_scaling",
        "max_window_layers",
        "n_head",
        "no_rope_layer_interval",
        "norm_eps",
        "norm_epsilon",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_key_value_heads",
        "partial_rotary_factor",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "rms_norm_eps",
        "rope_local_base_freq",
        "rope_theta",
        "rotary_pct",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "sliding_window",
        "sliding_window_pattern",
        "use_parallel_residual",
        "use_sliding_window",
    }
)
ROTARY = ("rope_parameters", "rope_scaling")  # dictionaries, whose entries all decide


def settings_of(model: nn.Module) -> dict[str, Setting]:
    """Those of the model's configuration by name, of the text model where it has several; names that it lacks are left out."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    said = config.get_text_config().to_dict()
    found = {name: value for name, value in said.items() if name in DECIDING and isinstance(value, Setting)}
    for name in ROTARY:
        found |= dict(_entries(said.get(name) or {}))
    return dict(sorted(found.items()))


def apart(was: Mapping[str, Setting], now: Mapping[str, Setting]) -> str | None:
    """The first setting that both name and that differs, as people read it.

    Releases of transformers name some that others do not; these say nothing.
    """
    for name in sorted(set(was) & set(now)):
        if not _same(was[name], now[name]):
            return f"{name} ({was[name]}, not {now[name]})"
    return None


def _same(was: Setting, now: Setting) -> bool:
    """Equal, numbers to the digits of float32, in which some formats keep them."""
    numbers = [each for each in (was, now) if isinstance(each, int | float) and not isinstance(each, bool)]
    return math.isclose(*numbers, rel_tol=1e-6) if len(numbers) == 2 else was == now


def _entries(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Of nested dictionaries, by their names joined."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        elif isinstance(value, Setting):
            yield f"{prefix}{name}", value
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", " ".join(map(str, value))
