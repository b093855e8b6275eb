"""Retraining makes plain LoRA adapters; an adapter of another kind is not that fine-tuning again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetrace.errors import FinetraceError

RETRAINED = {"r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform"}  # a fine-tuning's own settings
NO_PART = {  # where it is from, what for, and what follows from the model or from a switch that is looked at itself
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "task_type",
        "peft_version",
        "runtime_config",
    ),
    *(
        "fan_in_fan_out",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    ),
}


def refuse_variant(folder: Path) -> None:
    """Refuse to retrain the adapter in `folder` where its `adapter_config.json` asks for more than plain LoRA.

    Raises:
        FinetraceError: It does, or cannot be read.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    if not path.exists():
        return
    try:
        there: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FinetraceError(f"{path}: cannot be read ({error}); write the adapter again.") from error
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    odd = [
        f"{key} is {json.dumps(value)[:80]}"
        for key, value in sorted(there.items())
        if key in plain and key not in RETRAINED | NO_PART and (value or None) != (plain[key] or None)
    ]
    if odd:
        raise FinetraceError(
            f"{path}: {', '.join(odd)}, and retraining makes plain LoRA adapters alone, so it would not be that fine-tuning "
            "again; do without retraining (finetrace trace, or validate --measure tail-patch), or fine-tune plain LoRA and "
            "index that."
        )
