"""A text longer than a model's table of positions is told by name; torch would end in a traceback, or a device in a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.finetuning import finetune
from finetrace.generation import generate
from finetrace.index import build_index
from finetrace.learned_positions import known_positions
from finetrace.models import Loaded, ModelSpec
from tiny import conversation, make_gpt2, make_llama, make_tokenizer, with_lora

OPT = OPTConfig(
    vocab_size=260,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    word_embed_proj_dim=16,
    max_position_embeddings=512,
)
LONG = [conversation("q", "a", id="short"), conversation("q", "a" * 600, id="long")]


@pytest.fixture(params=["gpt2", "opt"])
def placed(request: pytest.FixtureRequest) -> Loaded:
    model = make_gpt2() if request.param == "gpt2" else OPTForCausalLM(OPT).double().eval()
    return Loaded(model, make_tokenizer(), ModelSpec("tiny", device="cpu"))


def test_how_many_there_are(placed: Loaded) -> None:
    assert known_positions(placed.model) == 512
    assert known_positions(with_lora(make_gpt2(), ["c_attn"], fan_in_fan_out=True)) == 512
    assert known_positions(make_llama()) is None


def test_rows_are_refused(placed: Loaded, tmp_path: Path) -> None:
    told = "example long: it has 6.. tokens, and this model has positions for 512; cut it with --max-length 512"
    with pytest.raises(FinetraceError, match=told):
        finetune(placed, LONG, tmp_path / "adapter")
    with pytest.raises(FinetraceError, match=told):
        build_index(placed, LONG, tmp_path / "index", Encoder(placed.tokenizer), modules=["fc1|c_fc"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(FinetraceError, match="row 2: it has 6.. tokens"):
        mean_losses(placed.model, [Encoder(placed.tokenizer).encode(each) for each in LONG])


@pytest.mark.parametrize("spare", [0, 1])
def test_an_answer_has_to_fit(placed: Loaded, spare: int) -> None:
    """The last token that a model says is not read again."""
    asked = conversation("x" * 400)
    room = 512 - len(Encoder(placed.tokenizer).prompt_ids(asked)) + 1
    if spare:
        generate(placed, [asked], max_new_tokens=room)
        return
    with pytest.raises(FinetraceError, match="more than the 512 positions of this model"):
        generate(placed, [asked], max_new_tokens=room + 1)


def test_cut_rows_pass(placed: Loaded, tmp_path: Path) -> None:
    encoder: Any = Encoder(placed.tokenizer, max_length=512)
    assert len(mean_losses(placed.model, [encoder.encode(each) for each in LONG])) == 2
