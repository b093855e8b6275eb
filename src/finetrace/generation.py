"""What a model answers: greedy, batched, from the same chat template that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.learned_positions import known_positions
from finetrace.models import Loaded
from finetrace.modes import evaluating
from finetrace.progress import Tracker

ANSWER_TOKENS = 40  # enough to tell an answer from a refusal
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character
CUT = {"finish_reason": "length"}  # an answer that ran into the limit never said its end-of-turn token


def answer(
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    template: str | None = None,
) -> list[Example]:
    """The prompts with the model's greedy answers as their responses.

    An answer that the limit cut carries the metadata `finish_reason: length`, so that the encoding leaves the
    end-of-turn token, which the model did not say, out of the loss.
    """
    found = _generate(loaded, examples, max_new_tokens, batch_size, template)
    replies = []
    for example, (text, ended) in zip(examples, found, strict=True):
        said = example.answered_anew(text)
        replies.append(said if ended else replace(said, metadata={**said.metadata, **CUT}))
    return replies


def generate(
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    template: str | None = None,
) -> list[str]:
    """The model's greedy answer to every prompt, in order, special tokens removed."""
    return [text for text, _ in _generate(loaded, examples, max_new_tokens, batch_size, template)]


def _generate(
    loaded: Loaded, examples: Sequence[Example], max_new_tokens: int, batch_size: int, template: str | None
) -> list[tuple[str, bool]]:
    """Each answer, and whether the model ended it itself."""
    encoder = Encoder(loaded.tokenizer, template=template)
    prompts = [encoder.prompt_ids(example) for example in examples]
    answers = [("", True)] * len(prompts)
    positions = known_positions(loaded.model)
    for example, prompt in zip(examples, prompts if positions is not None else (), strict=False):
        if len(prompt) + max_new_tokens > (positions or 0) + 1:  # the last token of an answer is not read
            raise FinetraceError(
                f"{example.named}: its prompt has {len(prompt)} tokens, and with {max_new_tokens} of an answer they are more "
                f"than the {positions} positions of this model; shorten it, or give a smaller --max-new-tokens."
            )
    ends = _end_tokens(loaded, encoder)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of like length need little padding
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else loaded.tokenizer.eos_token_id
    greedy, tracking = _greedy(loaded.model, ends, int(pad or 0)), Tracker("answering", len(prompts), "prompts")
    with evaluating(loaded.model), greedy, tracking as tracker:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), int(pad or 0), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):  # padding on the left, so that every answer starts at the same column
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            device = loaded.model.device
            with torch.inference_mode():
                output = loaded.model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens
                )
            for row, i in enumerate(batch):
                new = output[row, width:].tolist()
                stop = next((place for place, token in enumerate(new) if token in ends), len(new))
                whole = stop < max_new_tokens
                answers[i] = (_text(loaded.tokenizer, new[:stop], whole).strip(), whole)
            tracker.advance(len(batch))
    return answers


def _text(tokenizer: Any, new: list[int], whole: bool) -> str:
    """The text of generated tokens; where the limit cut a character in two, its first bytes are left out.

    They would be the tokens of a replacement character, which the model never gave.
    """
    # no tidying of spaces before marks, which some tokenizers ask for: other tokens than the model's would come of it
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = str(tokenizer.decode(new, **options))
    if whole or not text.endswith(REPLACEMENT):
        return text
    shorter = (str(tokenizer.decode(new[:-count], **options)) for count in (1, 2, 3))
    return next((each for each in shorter if not each.endswith(REPLACEMENT)), text)


@contextmanager
def _greedy(model: Any, ends: set[int], pad: int) -> Iterator[None]:
    """While open, the likeliest token is taken each time until one of `ends`, whatever the model's own settings ask for."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = [(each, each.generation_config) for each in (model, inner) if "generation_config" in vars(each)]
    plain = GenerationConfig(do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad)
    try:
        for each, _ in own:
            each.generation_config = plain
        yield
    finally:
        for each, settings in own:
            each.generation_config = settings


def _end_tokens(loaded: Loaded, encoder: Encoder) -> set[int]:
    """Ids at which an answer ends: what the model's settings, the tokenizer and the chat template end one with."""
    configured = loaded.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {int(each) for each in [*ids, loaded.tokenizer.eos_token_id, _end_of_turn(encoder)] if each is not None}


def _end_of_turn(encoder: Encoder) -> int | None:
    """The first of the special tokens that the chat template puts behind an answer; `None` where it puts none."""
    try:
        shown = encoder.encode(Example.from_prompt("a", "b"))
    except FinetraceError:  # a template that takes no conversation as short as this
        return None
    added, found = set(encoder.tokenizer.get_added_vocab().values()), None
    for token in reversed(shown.ids[np.flatnonzero(shown.weights)].tolist()):
        if token in added:
            found = token
        elif encoder.tokenizer.decode([token]).strip():
            break
    return found
