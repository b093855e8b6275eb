"""One model over several devices: accelerate's device maps, and which of them gradients can be taken under."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from finetrace.errors import FinetraceError

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")


def asked(device_map: str | None) -> str | dict[str, str | int] | None:
    """What transformers takes as `device_map`: a word, or the map in a JSON file, from module names to devices.

    Raises:
        FinetraceError: It is neither.
    """
    if device_map is None or device_map in WORDS:
        return device_map
    wanted = f"use {', '.join(WORDS)}, or a JSON file that maps module names to devices, as {{'model.layers.0': 0}}"
    try:
        read = json.loads(Path(device_map).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FinetraceError(
            f"--device-map {device_map}: neither a word nor a file of JSON ({error}); {wanted}."
        ) from error
    if not isinstance(read, dict) or not all(isinstance(each, (str, int)) for each in read.values()):
        raise FinetraceError(f"--device-map {device_map}: not a map; {wanted}.")
    return read


def found_from_everywhere(device_map: str | None) -> str | None:
    """A file by its whole path; a word as it is."""
    return device_map if device_map is None or device_map in WORDS else str(Path(device_map).resolve())


def refuse_both(device_map: str | None, device: str) -> None:
    """A device map says where everything goes, so it takes no device beside it."""
    if device_map is not None and device != "auto":
        raise FinetraceError(f"--device-map {device_map} says where every layer goes; leave out --device {device}.")


def refuse_workers(device_map: str | None, engine: str) -> None:
    """Workers on one machine would each spread a model over the same GPUs."""
    if device_map is not None and engine == "processes":
        raise FinetraceError(
            f"--device-map {device_map} spreads one model over all GPUs of the machine, so processes beside one another have "
            "no place; leave out --workers, or use --engine ray with as many --gpus-per-task as a model needs."
        )


def refuse_retraining(device_map: str | None) -> None:
    """Fine-tuning puts its model on one device."""
    if device_map is not None:
        raise FinetraceError(
            f"--device-map {device_map}: retraining has its model on one device; leave out what retrains, or give --device."
        )


def refuse_offloaded(model: nn.Module, name: str) -> None:
    """Weights that wait elsewhere and come for each pass would all be held again until its backward pass is over.

    Raises:
        FinetraceError: Some of the model's weights lie on no device.
    """
    away = [each for each, weight in model.named_parameters() if weight.device.type == "meta"]
    if away:
        raise offloaded(name, f"{len(away)} weights, {away[0]} for one")


def offloaded(name: str, what: str = "some weights") -> FinetraceError:
    """What is said of a model that does not fit its devices."""
    return FinetraceError(
        f"{name}: the devices have no room for {what}, which the device map would keep in memory or on disk between passes; "
        "gradients need them all in place, so use more GPUs, a quantised base, or --device cpu."
    )


def devices(model: nn.Module) -> list[torch.device]:
    """Where the model's weights are, each device once, the first weight's in front."""
    return list(dict.fromkeys(weight.device for weight in model.parameters()))
