"""The model and the response-only loss for the tools that ask their user for both (kronfluence and dattri)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import Job, Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = dict[str, Tensor]


def load(job: Job, dtype: str, *, trainable: bool = False) -> Any:
    """The base model in `dtype` with the adapter on it, whose own weights PEFT keeps in float32; in eval mode."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, dtype))
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, str(job.adapter), is_trainable=trainable).eval()


def padded(rows: Sequence[Row], length: int | None = None) -> Batch:
    """(B, T) token ids, attention mask and labels, padded on the right to `length` or to the longest row."""
    length = length or max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
    }
    for b, row in enumerate(rows):
        batch["input_ids"][b, : len(row.input_ids)] = torch.tensor(row.input_ids)
        batch["attention_mask"][b, : len(row.input_ids)] = 1
        batch["labels"][b, : len(row.labels)] = torch.tensor(row.labels)
    return batch


def loss(model: nn.Module, batch: Batch, *, sample: bool = False, gather: bool = False) -> Tensor:
    """Sum over the rows of each row's own mean loss over its response, so no row's gradient depends on its batch.

    Args:
        model: Called once, with token ids and attention mask.
        batch: As `padded` makes it.
        sample: Take labels that the model draws, and weigh a token by 1 / sqrt(n) in place of 1 / n: the second moment of the
            gradient is then the Fisher of the mean loss.
        gather: Let the vocabulary projection see the positions of the loss alone.
    """
    wanted = batch["labels"][:, 1:] != -100  # (B, T - 1)
    counts = wanted.sum(1)
    weights = (1 / counts).repeat_interleave(counts)  # (R,)
    targets = batch["labels"][:, 1:][wanted]  # (R,)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = _gathered(model, inputs, wanted) if gather else model(**inputs).logits[:, :-1][wanted]
    logits = logits.float()  # (R, vocabulary)
    if sample:
        with torch.no_grad():
            targets = torch.multinomial(torch.softmax(logits, -1), 1).squeeze(1)
        weights = weights.sqrt()
    return (cross_entropy(logits, targets, reduction="none") * weights).sum()


def _gathered(model: nn.Module, inputs: Batch, wanted: Tensor) -> Tensor:
    """(R, vocabulary) logits, the final hidden states picked out before they are projected."""
    rows = torch.nn.functional.pad(wanted, (0, 1)).flatten().nonzero().squeeze(1)
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[rows].unsqueeze(0),))
    try:
        return model(**inputs).logits[0]
    finally:
        handle.remove()


def by_length(rows: Sequence[Row]) -> list[int]:
    """Positions of the rows, shortest first."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))


def batch_rows(rows: Sequence[Row], tokens: int) -> int:
    """How many rows of the longest length a batch of so many tokens holds."""
    return max(1, tokens // max(len(row.input_ids) for row in rows))
