"""Retrainings encode rows as the index does, where the settings of a fine-tuning do not say how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from finetrace.encoding import TEMPLATES, is_jinja
from finetrace.errors import FinetraceError
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


def with_template(config: FinetuneConfig, encoding: EncodingRecord, where: Path) -> tuple[FinetuneConfig, str]:
    """`config`, read from `where`, with the index's chat template if the file of its own is gone, and the words that say so.

    Raises:
        FinetraceError: It is gone, and the index has none but the tokenizer's.
    """
    name = config.chat_template
    if name is None or name in TEMPLATES or is_jinja(name) or Path(name).is_file():
        return config, ""
    if encoding.template is None:
        raise FinetraceError(
            f"{where}: chat_template {name}: there is no such file here, and the index has the tokenizer's own template; put "
            "the whole path of the file there, or its text."
        )
    taken = config.model_copy(update={"chat_template": template_of(encoding)})
    return taken, f"the chat template {name} that {where} names is not there; retrainings take the index's own"


def template_of(encoding: EncodingRecord) -> str | None:
    """The chat template of an index as a fine-tuning takes it: by its name where it has one, else its Jinja text."""
    return next((name for name, text in TEMPLATES.items() if text == encoding.template), encoding.template)
