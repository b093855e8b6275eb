"""Retrainings encode rows as the index does, where the settings of a fine-tuning do not say how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from finetrace.encoding import TEMPLATES
from finetrace.finetune_config import FinetuneConfig, LossOn
from finetrace.positions import Positions

if TYPE_CHECKING:
    from finetrace.index.manifest import EncodingRecord


def as_indexed(config: FinetuneConfig, encoding: EncodingRecord) -> tuple[FinetuneConfig, str]:
    """`config` with the loss, the lengths and the chat template of an index, and the words that say so.

    A loss that no fine-tuning has, a probe's for one, is not taken over.
    """
    positions = Positions.parse(encoding.loss_on)
    found: dict[str, Any] = {
        "max_length": encoding.max_length,
        "chat_template": template_of(encoding),
        "pad_to": encoding.pad_to,
    }
    odd = ""
    if positions.kind in get_args(LossOn):
        found |= {"loss_on": positions.kind, "pad_to": positions.pad_to or encoding.pad_to}
    else:
        odd = f" (the index's own, {encoding.loss_on}, is none that a fine-tuning has)"
    taken = config.model_copy(update=found)
    cut = f"cut after {taken.max_length} tokens" if taken.max_length else "never cut"
    padded = f"padded to {taken.pad_to} tokens" if taken.pad_to else "not padded"
    template = "the tokenizer's" if taken.chat_template is None else "the index's"
    if taken.chat_template in TEMPLATES:
        template = taken.chat_template
    return taken, f"loss on {taken.loss_on}{odd}, rows {cut} and {padded}, chat template: {template}"


def template_of(encoding: EncodingRecord) -> str | None:
    """The chat template of an index as a fine-tuning takes it: by its name where it has one, else its Jinja text."""
    return next((name for name, text in TEMPLATES.items() if text == encoding.template), encoding.template)
