"""Greedy answers do not depend on who else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetrace.examples import Example
from finetrace.generation import CUT, _text, answer, generate
from finetrace.models import Loaded
from tiny import conversation, make_examples


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
