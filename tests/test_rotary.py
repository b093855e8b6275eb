"""Rotary frequencies that change with the longest text of a pass: no row's numbers hang on its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from finetrace.collection import Collector
from finetrace.collection.losses import mean_losses
from finetrace.collection.modules import track
from finetrace.encoding import Encoded, Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.rotary import batch_tokens_within
from tiny import SMALL

ORIGINAL = 64
SIZES = {**SMALL, "bos_token_id": None, "eos_token_id": 2}


def longrope() -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope |= {"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 1.0}
    config = Phi3Config(
        max_position_embeddings=512, original_max_position_embeddings=ORIGINAL, rope_parameters=rope, **SIZES
    )
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).double().eval()


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    return (
        LlamaForCausalLM(LlamaConfig(max_position_embeddings=ORIGINAL, rope_parameters=rope, **SIZES)).double().eval()
    )


@pytest.fixture
def items(tokenizer: Any) -> list[Encoded]:
    """Eight short rows, and two that exceed the original context."""
    rows = [Example.from_prompt("a" * (3 + i), "b" * (9 - i) + "c", id=f"r{i}") for i in range(8)]
    rows[3:3] = [Example.from_prompt("d" * 30, "ab" * (10 + i), id=f"l{i}") for i in range(2)]
    encoded, _ = Encoder(tokenizer).encode_all(rows)
    lengths = [len(item.ids) for item in encoded]
    assert sum(length > ORIGINAL for length in lengths) == 2
    return encoded


def test_a_long_row_does_not_change_the_frequencies_of_short_ones(items: list[Encoded]) -> None:
    model = longrope()
    ids = [f"{i}" for i in range(len(items))]
    tracking = track(model, ["qkv_proj"])
    alone = [Collector(model, tracking, ()).collect([item], ids[:1]) for item in items]
    together = Collector(model, tracking, (), batch_tokens=4096).collect(items, ids)
    losses = torch.cat([each.losses for each in alone])
    torch.testing.assert_close(together.losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        together.gradients, torch.cat([each.gradients for each in alone]), rtol=1e-11, atol=1e-14
    )
    torch.testing.assert_close(mean_losses(model, items, batch_tokens=4096), losses, rtol=1e-12, atol=0)


def test_short_rows_keep_their_batches(items: list[Encoded]) -> None:
    short = [item for item in items if len(item.ids) <= ORIGINAL]
    for model in (longrope(), dynamic()):
        assert batch_tokens_within(model, short, 4096) == 4096
    assert batch_tokens_within(longrope(), items, 4096) == ORIGINAL


def test_frequencies_that_remember_the_longest_text_are_refused(items: list[Encoded], tmp_path: Path) -> None:
    names = [f"e{i}" for i in range(len(items))]
    with pytest.raises(FinetraceError, match=r"example e4: .* \(dynamic\) .* --max-length 64"):
        Collector(dynamic(), track(dynamic(), ["q_proj"]), ()).collect(items, names)
    with pytest.raises(FinetraceError, match="row 5: "):
        mean_losses(dynamic(), items)
