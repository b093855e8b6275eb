"""Loading a base model, its tokenizer and a LoRA adapter; the model that is embedded for a first try."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from finetrace import placement
from finetrace.atomic import flush, remove_part, share
from finetrace.embedded import EMBEDDED as EMBEDDED
from finetrace.embedded import embedded_folder
from finetrace.errors import FinetraceError
from finetrace.execution.worker import NUMBER as WORKER
from finetrace.units import many

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
ALIGNED = "embedded-aligned"
ALIGNMENT_ADAPTER = Path(__file__).parent / "data" / "alignment"


@dataclass(frozen=True)
class ModelSpec:
    """What to load: enough to load the same thing again.

    Attributes:
        model: `embedded` (SmolLM2-135M-Instruct), `embedded-aligned` (the same, taught to refuse), a folder or a Hub id.
        adapter: Folder or Hub id of a PEFT LoRA adapter, or `None`.
        dtype: Of the base weights; `auto` is bfloat16 where the hardware multiplies in it, else float32.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        trust_remote_code: Run code that comes with the model; off unless asked for.
        device_map: Layers on several devices, by accelerate: `auto`, `balanced`, `balanced_low_0`, `sequential` or a JSON file
            (`placement.asked`), in place of `device`.
    """

    model: str = EMBEDDED
    adapter: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None


@dataclass
class Loaded:
    """A model in eval mode on its device or devices, its tokenizer, and the spec with `auto` and relative folders resolved.

    `asked` is the device that was asked for, where `auto` was resolved for this machine.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    asked: str | None = None

    @property
    def elsewhere(self) -> ModelSpec:
        """The spec for a worker, which finds `auto` for itself: a machine without a GPU may coordinate those that have some."""
        return self.spec if self.asked is None else replace(self.spec, device=self.asked)


def load(spec: ModelSpec, index: Path | None = None) -> Loaded:
    """Load model, tokenizer and adapter; raises `FinetraceError` in one sentence where any of them cannot be.

    `index` is the one whose model it is, if that is not named by options: errors say what mends it there.
    """
    placement.refuse_both(spec.device_map, spec.device)
    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    source = str(embedded_folder()) if spec.model in (EMBEDDED, ALIGNED) else spec.model
    # merging happens in float32, whatever the dtype, so that the aligned model is the same one in each
    model, tokenizer = _load_base(source, torch.float32 if spec.model == ALIGNED else dtype, spec, index)
    if spec.model == ALIGNED:
        if not (ALIGNMENT_ADAPTER / "adapter_model.safetensors").exists():
            raise FinetraceError(f"{ALIGNMENT_ADAPTER}: the alignment adapter is missing; reinstall finetrace.")
        model = attach_adapter(model, str(ALIGNMENT_ADAPTER)).merge_and_unload()
        for parameter in model.parameters():  # not model.to(), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
    if spec.adapter is not None:
        model = attach_adapter(model, spec.adapter, index=index)
    model.eval()
    resolved = ModelSpec(
        _absolute(spec.model) if source == spec.model else spec.model,
        _absolute(spec.adapter) if spec.adapter is not None else None,
        str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        str(device) if spec.device_map is None else "auto",
        spec.trust_remote_code,
        placement.found_from_everywhere(spec.device_map),
    )
    return Loaded(model.to(device) if spec.device_map is None else model, tokenizer, resolved, spec.device)


def attach_adapter(
    model: PreTrainedModel, adapter: str, *, trainable: bool = False, index: Path | None = None
) -> PreTrainedModel:
    """`model` with a PEFT adapter on it, after checking that the adapter was made for such a model; `index` as in `load`."""
    from peft import PeftConfig, PeftModel

    again = (
        index and f"run finetrace index on {index} again, with the same data and the adapter that it was built with."
    )
    try:
        adapter = _local_adapter(adapter)
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise FinetraceError(
            f"{adapter}: no PEFT adapter can be read there ({_first_line(error)}); "
            + (again or "give a folder that holds adapter_config.json and adapter_model.safetensors.")
        ) from error
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").exists():
        raise FinetraceError(
            f"{adapter}: adapter_model.safetensors is missing; only safetensors weights are read, never a pickle."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            attached = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=trainable)
        loaded = attached.load_adapter(
            adapter, "default", is_trainable=trainable
        )  # again, for it says what did not fit
        strays = [key for key in (*loaded.missing_keys, *loaded.unexpected_keys) if "lora_" in key]
        if strays:
            raise ValueError(f"{len(strays)} weights have no counterpart, {strays[0]} for one")
    except SafetensorError as error:
        raise FinetraceError(
            f"{adapter}: adapter_model.safetensors is broken ({_first_line(error)}); "
            + (again or "save or copy the adapter again, or give another.")
        ) from error
    except Exception as error:
        raise FinetraceError(
            f"{adapter}: this adapter was made for {config.base_model_name_or_path or 'another model'} and does not fit "
            f"the model loaded ({_first_line(error)}); " + (again or "give the adapter's own base with --model.")
        ) from error
    return attached


def active_adapter(model: Any) -> str:
    """Name of the one adapter that is active."""
    active = list(model.active_adapters)
    if len(active) != 1:
        raise FinetraceError(
            f"the model has {len(active)} active adapters ({', '.join(active)}); activate one of them."
        )
    return str(active[0])


def save_adapter(model: Any, folder: Path) -> None:
    """Write the active adapter as PEFT does, with the names in its configuration sorted: equal adapters, equal files.

    Each file comes whole and flushed to disk, the weights last, and takes the place of one that was there: PEFT itself would
    go on from a model card that a killed run left half written.
    """
    part = folder / ".adapter.part"
    remove_part(part)
    name = active_adapter(model)
    model.save_pretrained(str(part), selected_adapters=[name], save_embedding_layers=False)
    path = (part if name == "default" else part / name) / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):  # sets, whose order differs between processes
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for file in sorted(filter(Path.is_file, part.rglob("*")), key=lambda each: (each.suffix == ".safetensors", each)):
        place = folder / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        share(file)
        flush(file)
        file.replace(place)
    shutil.rmtree(part)


def _local_adapter(adapter: str) -> str:
    """The folder itself, or the Hub's files in its cache: configuration and safetensors only, so never a pickle."""
    if Path(adapter).exists():
        return adapter
    from huggingface_hub import snapshot_download

    return str(snapshot_download(adapter, allow_patterns=["adapter_config.json", "adapter_model.safetensors"]))


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several GPUs, worker i takes number i of them in turn."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and os.environ.get(WORKER) and torch.cuda.device_count() > 1:
        name = f"cuda:{int(os.environ[WORKER]) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FinetraceError(f"{name}: not a device; use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FinetraceError(f"{name}: this machine has no CUDA device that torch can use; use --device cpu.")
    try:
        torch.empty(1, device=device)
    except Exception as error:
        raise FinetraceError(
            f"{name}: torch cannot use this device ({_first_line(error)}); use --device cpu."
        ) from error
    return device


def resolve_dtype(name: DType, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def known_dtype(name: DType, device: str) -> DType:
    """The name of what `auto` comes to on a device, so that a folder moved to another machine keeps one precision."""
    if name != "auto":
        return name
    word: DType = "bfloat16" if resolve_dtype(name, resolve_device(device)) == torch.bfloat16 else "float32"
    return word


def _cpu_multiplies_bfloat16() -> bool:
    flags = torch.cpu.get_capabilities()
    return any(bool(flags.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _load_base(source: str, dtype: torch.dtype, spec: ModelSpec, index: Path | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    trusted, placed = spec.trust_remote_code, placement.asked(spec.device_map)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        options: dict[str, Any] = {"device_map": placed} if placed is not None else {}
        model, told = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trusted,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        if placed is not None and "offload" in str(error):
            raise placement.offloaded(spec.model) from error
        raise FinetraceError(
            f"{spec.model}: this model cannot be loaded ({_first_line(error)}); "
            + (
                f"if it lies elsewhere now, run finetrace index on {index} again, with the same data and adapter and the new "
                "place as --model: it is noted, and nothing is collected anew."
                if index
                else "give a folder with config.json, a tokenizer and safetensors weights, or a Hub id that this machine can "
                "reach."
            )
        ) from error
    placement.refuse_offloaded(model, spec.model)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has put it on the base that it names
        (adapter,) = model.peft_config.values()
        raise FinetraceError(
            f"{spec.model}: this is an adapter, not a base model; give {adapter.base_model_name_or_path} with --model and "
            f"{spec.model} with --adapter, or, where there is no such option, merge the two first."
        )
    if drawn := sorted(told["missing_keys"]):
        raise FinetraceError(
            f"{spec.model}: {many(len(drawn), 'weight')} of this model {'is' if len(drawn) == 1 else 'are'} not in its files "
            f"({drawn[0]}{', ...' if len(drawn) > 1 else ''}) and would be random numbers; give the whole model, with its head."
        )
    return model, tokenizer


def _absolute(name: str) -> str:
    """A folder by its whole path, so that it is found from everywhere; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
