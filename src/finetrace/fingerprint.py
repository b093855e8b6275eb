"""Short hashes that say whether two models, tokenizers or data sets are the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from finetrace.encoding import Encoded
from finetrace.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LORA = re.compile(r"(lora_\w+)\.([^.]+)")  # lora_A.default.weight
SCALING = "scaling of the adapter (lora_alpha)"  # what `of_scaling` is of, for people
EMBEDDINGS = "embedding matrix or head of the base model"  # what `of_embeddings` is of
_SAMPLE = 4096  # entries looked at in each base matrix; adapters are read whole


def of_base(model: nn.Module) -> str:
    """Of the base weights: names, shapes and an even sample of the values, rounded to bfloat16.

    Rounding makes the same weights loaded in float32 and in bfloat16 agree; the sample keeps it under a second for
    models of any size. A quantised weight counts by its name and stored shape.
    """
    return _hash_tensors(((n, p) for n, p in _parameters(model) if "lora_" not in n), _SAMPLE)


def of_embeddings(model: nn.Module) -> str | None:
    """Of every entry of the embeddings and of the head, rounded to bfloat16; `None` where they are not in memory or not named.

    Some models differ there in a few rows alone, those of tokens that were added, which the sample of `of_base` may miss.
    """
    wanted = {id(parameter) for side in ("input", "output") for parameter in _embedding(model, side)}
    if not wanted:
        return None
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: _plain(pair[0])):
        if id(parameter) in wanted and "lora_" not in name:
            digest.update(f"{_plain(name)} {tuple(parameter.shape)}".encode())
            if parameter.is_meta:
                return None
            if parameter.is_floating_point():
                digest.update(_bytes(parameter.detach().to(torch.bfloat16).view(torch.int16)))
    return digest.hexdigest()[:16]


def of_adapter(model: nn.Module) -> str | None:
    """Of every entry of the active LoRA adapter, whatever it is called, rounded to bfloat16; `None` without one."""
    active = active_adapters(model)
    adapter = [
        (_LORA.sub(r"\1", name), parameter)
        for name, parameter in _parameters(model)
        if (found := _LORA.search(name)) and found[2] in active
    ]
    return _hash_tensors(adapter, None) if adapter else None


def of_scaling(model: nn.Module) -> str | None:
    """Of what every layer of the active adapter, whatever it is called, multiplies B A by (lora_alpha / r); `None` without one.

    The same matrices under another scaling are another model.
    """
    active = active_adapters(model)
    scalings = [
        f"{_plain(name)} {module.scaling[each]:.6g}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), Mapping)
        for each in active
        if each in module.scaling
    ]
    return of_text(json.dumps(sorted(scalings))) if scalings else None


def of_adapter_file(tensors: Mapping[str, Tensor]) -> str | None:
    """`of_adapter` of an adapter as PEFT writes it, by the file's names; `None` where a name is not of plain LoRA."""
    adapter = {_plain(name): tensor for name, tensor in tensors.items() if "lora_" in name}
    if not adapter or not all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in adapter):
        return None  # of other kinds, the model has other names than the file
    return _hash_tensors(adapter.items(), None)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Of the vocabulary's size, how a probe text is cut, and the chat template in use."""
    probe = tokenizer("How do I pick a lock? \u00bfQu\u00e9? 1,234\n  x", add_special_tokens=False)["input_ids"]
    return of_text(json.dumps([len(tokenizer), list(probe), template or tokenizer.chat_template]))


def of_data(ids: Sequence[str], encoded: Sequence[Encoded]) -> str:
    """Of example ids, token ids and loss weights."""
    digest = hashlib.sha256()
    for name, item in zip(ids, encoded, strict=True):
        digest.update(name.encode() + b"\0" + item.ids.tobytes() + item.weights.tobytes())
        digest.update(item.prompt_length.to_bytes(8, "little"))
        if item.padding:
            digest.update(item.padding.to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def of_examples(examples: Sequence[Example]) -> str:
    """Of all that decides the examples' tokens and losses, as it stands before any encoding."""
    return of_text(json.dumps(texts(examples)))


def texts(examples: Sequence[Example]) -> list[list[object]]:
    """What decides an example's tokens and loss: its id, its messages, and how its answer ended."""
    return [
        [each.id, [[m.role, m.content] for m in each.messages], each.metadata.get("finish_reason")] for each in examples
    ]


def texts_and_weights(examples: Sequence[Example]) -> list[object]:
    """What decides the examples' tokens and losses, whichever tokens a loss is on."""
    return [*texts(examples), *(each.metadata.get("loss_weights") for each in examples)]


def of_text(text: str) -> str:
    """Of a string."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _embedding(model: nn.Module, side: str) -> list[nn.Parameter]:
    """The parameters of one side; none where a model does not say which they are."""
    ask = getattr(model, f"get_{side}_embeddings", None)
    try:
        module = ask() if ask is not None else None
    except NotImplementedError:  # as transformers has it of models without
        return []
    return list(module.parameters()) if isinstance(module, nn.Module) else []


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters."""
    return list(model.active_adapters) if hasattr(model, "peft_config") else []  # type: ignore[arg-type]


def _parameters(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield _plain(name), parameter.detach()


def _plain(name: str) -> str:
    """A weight's name without what PEFT wraps around the model and its layers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]], sample: int | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = tensor.reshape(-1)
        if sample is not None and flat.numel() > sample:
            flat = flat[:: flat.numel() // sample]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.is_floating_point():
            digest.update(_bytes(flat.to(torch.bfloat16).view(torch.int16)))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().numpy().tobytes()
