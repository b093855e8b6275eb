"""Models and rows for tests of the pass that is written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetrace.encoding import Encoded
from tiny import make_encoded, make_llama, with_lora

LENGTHS = [9, 31, 12, 17, 17, 40, 14, 25, 12, 38]
MODELS: dict[str, Any] = {
    "lora": lambda: (with_lora(make_llama()), None),
    "lora on every linear layer": lambda: (with_lora(make_llama(), "all-linear"), None),
    "lora on a tied model": lambda: (with_lora(make_llama(tied=True, layers=3)), None),
    "lora on the upper layer": lambda: (with_lora(make_llama(layers=3), layers_to_transform=[2]), None),
    "lora on perceptrons": lambda: (with_lora(make_llama(), ["gate_proj", "down_proj"], rank=3), None),
    "rank-stabilised": lambda: (with_lora(make_llama(), use_rslora=True), None),
    "one group of heads": lambda: (with_lora(make_llama(num_key_value_heads=1)), None),
    "a head of its own key": lambda: (with_lora(make_llama(num_key_value_heads=4, head_dim=6)), None),
    "some of the adapter": lambda: (with_lora(make_llama()), [r"layers\.1\.self_attn\.q_proj\.lora_B"]),
    "weights under lora": lambda: (with_lora(make_llama()), [r"q_proj\.(base_layer|lora_A)", "up_proj"]),
    "weights": lambda: (make_llama(), [r"q_proj$", r"down_proj$"]),
    "all weights of a layer": lambda: (make_llama(layers=3), [r"layers\.1\."]),
}


def opening(items: Sequence[Encoded], length: int) -> list[Encoded]:
    """The same with a common beginning, as a template's system prompt is."""
    start = np.arange(5, 5 + length, dtype=np.int32)
    return [
        Encoded(
            np.concatenate([start, item.ids]),
            np.concatenate([np.zeros(length, np.float32), item.weights]),
            length + item.prompt_length,
        )
        for item in items
    ]


ITEMS = {"nothing in common": make_encoded(LENGTHS), "a common opening": opening(make_encoded(LENGTHS), 7)}
