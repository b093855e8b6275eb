"""What a model answers: greedy, batched, from the same chat template that training uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetrace.encoding import Encoder, length_batches
from finetrace.examples import Example
from finetrace.models import Loaded
from finetrace.progress import Tracker


def generate(
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    template: str | None = None,
) -> list[str]:
    """The model's greedy answer to every prompt, in order, special tokens removed."""
    encoder = Encoder(loaded.tokenizer, template=template)
    prompts = [encoder.prompt_ids(example) for example in examples]
    answers = [""] * len(prompts)
    longest = max((len(ids) for ids in prompts), default=1)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else loaded.tokenizer.eos_token_id
    with Tracker("answering", len(prompts), "prompts") as tracker:
        for batch in length_batches([len(ids) for ids in prompts], batch_size * longest):
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), int(pad or 0), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):  # padding on the left, so that every answer starts at the same column
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            device = loaded.model.device
            with torch.inference_mode():
                output = loaded.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=int(pad or 0),
                )
            for row, i in enumerate(batch):
                answers[i] = str(loaded.tokenizer.decode(output[row, width:], skip_special_tokens=True)).strip()
            tracker.advance(len(batch))
    return answers
