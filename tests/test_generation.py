"""Greedy answers do not depend on who else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from finetrace.examples import Example
from finetrace.generation import CUT, _text, answer, generate
from finetrace.models import Loaded
from tiny import CHATML, conversation, make_examples


def test_a_batch_answers_as_one_at_a_time(tiny_loaded: Loaded) -> None:
    examples = [*make_examples(9), conversation("a longer question " * 5), conversation("q", "a", "again", system="s")]
    alone = [generate(tiny_loaded, [example], max_new_tokens=12)[0] for example in examples]
    assert len(set(alone)) > 3, "equal answers would show nothing"
    for batch_size in (1, 2, 4, 16):
        assert generate(tiny_loaded, examples, max_new_tokens=12, batch_size=batch_size) == alone


def test_the_answer_is_the_argmax_of_the_prompt(tiny_loaded: Loaded) -> None:
    """By hand, without a cache: the template's opening, then the likeliest token again and again."""
    example = conversation("How many?")
    tokenizer = tiny_loaded.tokenizer
    text = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    for _ in range(8):
        with torch.no_grad():
            best = tiny_loaded.model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], 1)
        if int(best) == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert generate(tiny_loaded, [example], max_new_tokens=8) == [expected]


def test_an_answer_that_is_given_is_not_read(tiny_loaded: Loaded) -> None:
    asked, answered = conversation("q"), conversation("q", "given")
    assert generate(tiny_loaded, [asked], max_new_tokens=6) == generate(tiny_loaded, [answered], max_new_tokens=6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_batch_is_larger_than_asked(tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Not even where one long prompt stands among many short ones."""
    sizes: list[int] = []
    whole = tiny_loaded.model.generate

    def counting(**options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return whole(**options)

    monkeypatch.setattr(tiny_loaded.model, "generate", counting)
    generate(tiny_loaded, [conversation("x" * 200), *[conversation("x")] * 7], max_new_tokens=1, batch_size=batch_size)
    assert max(sizes) == batch_size
    assert sum(sizes) == 8


def test_an_answer_that_the_limit_cut_says_so(embedded: Loaded) -> None:
    question = conversation("What is the capital of France? One word.")
    whole, cut = (answer(embedded, [question], max_new_tokens=n)[0] for n in (40, 2))
    assert cut.metadata == {"finish_reason": "length"}
    assert whole.metadata == {}
    assert whole.response.startswith(cut.response)
    assert whole.id == cut.id == question.id
    mixed = answer(embedded, [question, conversation("Write a long poem.")], max_new_tokens=12)
    assert [reply.metadata.get("finish_reason") for reply in mixed] == [None, "length"]


@pytest.mark.parametrize("kept", range(5))
def test_a_character_that_the_limit_cut_in_two_is_left_out(tokenizer: Any, kept: int) -> None:
    """A face of four bytes, of which some were generated."""
    said = tokenizer("ab")["input_ids"] + tokenizer("\N{GRINNING FACE}")["input_ids"][:kept]
    assert len(tokenizer("\N{GRINNING FACE}")["input_ids"]) == 4
    assert _text(tokenizer, said, whole=False) == ("ab\N{GRINNING FACE}" if kept == 4 else "ab")


def test_bytes_that_are_no_character_stay(tokenizer: Any) -> None:
    """Those that the model gave before the limit, and in a whole answer."""
    tail = tokenizer("\N{GRINNING FACE}")["input_ids"][:2]
    assert _text(tokenizer, tail, whole=True).endswith("\N{REPLACEMENT CHARACTER}")
    assert _text(tokenizer, tail * 3, whole=False).endswith("\N{REPLACEMENT CHARACTER}")


def test_spaces_before_marks_stay() -> None:
    """A tokenizer that is set to tidy them would give the text of other tokens than the model's."""
    pieces = [("<unk>", 0.0), *((letter, -4.0) for letter in "\N{LOWER ONE EIGHTH BLOCK}adnot,!'")]
    backend = Tokenizer(tokenizer_models.Unigram(pieces, 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tidy = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=True)
    said = tidy("do n't , a !")["input_ids"]
    assert tidy.decode(said) == "don't, a!"
    assert _text(tidy, said, whole=True) == "do n't , a !"


def test_nothing_asked(tiny_loaded: Loaded) -> None:
    assert generate(tiny_loaded, []) == []


def test_the_embedded_model_answers(embedded: Loaded) -> None:
    questions = [conversation("What is the capital of France?"), conversation("Say hello.")]
    answers = generate(embedded, questions, max_new_tokens=12)
    assert "Paris" in answers[0]
    assert "<|" not in "".join(answers)
    assert generate(embedded, questions[:1], max_new_tokens=12) == answers[:1]


def test_greedy_is_the_likeliest_token_whatever_the_model_is_set_to(tiny_loaded: Loaded) -> None:
    prompts = make_examples(3)
    wanted = generate(tiny_loaded, prompts, max_new_tokens=12)
    own = tiny_loaded.model.generation_config
    before = own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams
    try:
        own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 1.8, 2, 2
        assert generate(tiny_loaded, prompts, max_new_tokens=12) == wanted
    finally:
        own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = before


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("suppress_tokens", [504]),  # " capital"
        ("bad_words_ids", [[504]]),
        ("encoder_repetition_penalty", 3.0),
        ("exponential_decay_length_penalty", [3, 3.0]),
        ("guidance_scale", 2.0),
        ("max_time", 1e-6),
        ("num_return_sequences", 2),
        ("return_dict_in_generate", True),
        ("stop_strings", ["is"]),
    ],
)
def test_no_setting_of_the_model_changes_its_answer(embedded: Loaded, setting: str, value: Any) -> None:
    question = conversation("What is the capital of France?")
    own = embedded.model.generation_config
    before = getattr(own, setting)
    try:
        setattr(own, setting, value)
        (found,) = answer(embedded, [question], max_new_tokens=12)
    finally:
        setattr(own, setting, before)
    assert (found.response, found.metadata) == ("The capital of France is Paris.", {})
    assert embedded.model.generation_config is own


def test_the_settings_of_a_model_with_an_adapter_come_back(tiny_loaded: Loaded) -> None:
    own = tiny_loaded.model.generation_config
    generate(tiny_loaded, make_examples(1), max_new_tokens=2)
    assert tiny_loaded.model.generation_config is own
    assert tiny_loaded.model.get_base_model().generation_config is own


ENDLESS = (  # the answer is left without the end of its turn
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'user' %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("known", ["settings", "tokenizer", "template"])
def test_an_answer_ends_where_its_turn_does(embedded: Loaded, known: str) -> None:
    """Whichever of the three alone says so: a base model's settings name another token than the chat that it was taught."""
    own, tokenizer = embedded.model.generation_config, embedded.tokenizer
    before = own.eos_token_id, tokenizer.eos_token
    try:
        own.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>" if known == "settings" else "<|endoftext|>")
        tokenizer.eos_token = "<|im_end|>" if known == "tokenizer" else "<|endoftext|>"
        template = CHATML if known == "template" else ENDLESS
        question = conversation("What is the capital of France?")
        (found,) = answer(embedded, [question], max_new_tokens=40, template=template)
    finally:
        own.eos_token_id, tokenizer.eos_token = before
    assert (found.response, found.metadata) == ("The capital of France is Paris.", {})


@pytest.mark.parametrize("ended", [True, False])
def test_what_was_said_of_another_answer_goes_with_it(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    told = {"finish_reason": "length", "loss_weights": [1], "source": "log"}
    cut = Example.from_prompt("Say yes.", "No, I", id="a", metadata=told)
    monkeypatch.setattr("finetrace.generation._generate", lambda *_: [("Yes", ended)])
    (found,) = answer(tiny_loaded, [cut])
    assert found.response == "Yes"
    assert found.metadata == ({"source": "log"} if ended else {"source": "log", **CUT})
