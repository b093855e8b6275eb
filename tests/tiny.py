"""Tiny models, adapters, a tokenizer and examples that the tests share; everything is made in code and runs offline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetrace.encoding import Encoded
from finetrace.examples import Example, Message

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 260  # one token a byte, and the special ones
SMALL: dict[str, Any] = {  # of the configuration of a model
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, so any text goes through and comes back; special tokens and template in ChatML's manner."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_llama(
    seed: int = 0, *, tied: bool = False, layers: int = 2, hidden: int = 16, **more: Any
) -> LlamaForCausalLM:
    """Llama with grouped-query attention, in float64; weights large enough that no two logits are nearly equal."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(options | more)))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name.endswith("norm"):  # transformers' own rounds to float32 inside
                setattr(module, name, torch.nn.RMSNorm(hidden, eps=child.variance_epsilon))
    return model.double().eval()


def make_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2, whose layers are `Conv1D` with bias and whose head is tied, in float64."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a mistake
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_lora(
    model: Any, targets: Sequence[str] | str = ("q_proj", "v_proj"), seed: int = 1, rank: int = 2, **more: Any
) -> Any:
    """`model` with LoRA in which neither A nor B is zero."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=4,
        lora_dropout=0.1,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **more,
    )
    return get_peft_model(model, config).eval()


def save_base(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    """A folder that `ModelSpec(model=...)` loads."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def conversation(*turns: str, id: str = "c", system: str | None = None) -> Example:
    """User and assistant in turn, starting with the user."""
    messages = [Message("system", system)] if system is not None else []
    messages += [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(turns)]
    return Example(id, tuple(messages))


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Short prompts and answers of different lengths."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(draw.randint(low, high)))

    return [Example.from_prompt(words(1, 5), words(1, 6), id=f"e{i}", label="ab"[i % 2]) for i in range(count)]


def make_encoded(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[Encoded]:
    """Random tokens; the loss looks at a random non-empty part of the second half (of a turn or several)."""
    draw = np.random.default_rng(seed)
    items = []
    for length in lengths:
        prompt = max(1, length // 2)
        mask = np.zeros(length, dtype=bool)
        mask[prompt:] = draw.random(length - prompt) < 0.7
        mask[length - 1] = True
        weights = mask.astype(np.float32) / np.float32(mask.sum())
        items.append(Encoded(draw.integers(3, vocabulary, length).astype(np.int32), weights, prompt))
    return items


def names(items: Sequence[Any]) -> list[str]:
    """An id for each."""
    return [f"r{i}" for i in range(len(items))]


def one_at_a_time(model: Any, items: Sequence[Encoded], parameters: Sequence[torch.Tensor]) -> tuple[Any, Any]:
    """The definition: each example alone through the whole model, autograd of the mean loss over its loss tokens.

    Returns:
        (n, D) gradients of `parameters`, flattened side by side, and (n,) losses.
    """
    before = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows, losses = [], []
    for item in items:
        ids = torch.from_numpy(item.ids).long().unsqueeze(0)
        chosen = torch.from_numpy(item.weights > 0)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[chosen], ids[0, 1:][chosen])
        gradients = torch.autograd.grad(loss, list(parameters))
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        losses.append(loss.detach())
    for parameter, wanted in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(wanted)
    return torch.stack(rows), torch.stack(losses)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance of a row from the row expected, relative to the latter's length."""
    difference = (found - expected).flatten(1).norm(dim=1) if found.dim() > 1 else (found - expected).abs()
    size = expected.flatten(1).norm(dim=1) if found.dim() > 1 else expected.abs()
    return float((difference / size.clamp_min(1e-30)).max())
