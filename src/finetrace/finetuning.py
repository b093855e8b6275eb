"""LoRA fine-tuning on PEFT and the Hugging Face Trainer, with the encoding that attribution uses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import set_seed

from finetrace import fingerprint, lock
from finetrace.atomic import part_of, write_atomically
from finetrace.encoding import Encoder, LengthReport, read_template
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.finetune_config import NOTED, SAVED, FinetuneConfig, read_saved, refuse_schedule
from finetrace.learned_positions import refuse_beyond
from finetrace.lock import writing
from finetrace.models import Loaded, save_adapter
from finetrace.training import fit
from finetrace.units import many

if TYPE_CHECKING:
    from peft import PeftModel

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning leaves: the folder of the adapter, the losses, and what did not fit."""

    folder: Path
    log: list[dict[str, float]]
    lengths: LengthReport
    held_out: tuple[str, ...]


def finetune(
    loaded: Loaded,
    examples: Sequence[Example],
    folder: Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Finetuned:
    """Train a LoRA adapter on `examples` and save it in `folder`; `loaded.model` then carries it, in eval mode.

    Checkpoints of every epoch, with the optimizer's state, stay under `folder/checkpoints`. The same configuration,
    data and seed give the same adapter bit by bit on the same machine; a killed run started again with `resume` ends
    at that adapter too. `say` hears, before the training, of rows longer than the limits.
    """
    config = config or FinetuneConfig()
    refuse_schedule(config)
    begun(folder, resume=resume)
    if not examples:
        raise FinetraceError("the training set is empty; give at least one example with a response.")
    template = read_template(config.chat_template)
    encoder = Encoder(loaded.tokenizer, config.loss_on, config.max_length, template, config.pad_to)
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    encoded, lengths = encoder.encode_all(examples, context)
    if lengths.longer:
        say(lengths.sentence())
    refuse_beyond(loaded.model, encoded, [example.named for example in examples])
    train, held = _split(len(encoded), config)
    if held:
        say(f"{many(len(held), 'row')} of {len(encoded)} held out for the validation loss; finetune.yaml names them")
    saved = {
        "model": loaded.spec.model,
        "data_fingerprint": fingerprint.of_data([example.id for example in examples], encoded),
        **({"held_out": [examples[i].id for i in held]} if held else {}),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "base_fingerprint": fingerprint.of_base(loaded.model),
        **({"embeddings_fingerprint": embeddings} if (embeddings := fingerprint.of_embeddings(loaded.model)) else {}),
        **config.model_dump(mode="json"),
    }
    model = new_adapter(loaded, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{folder}: cannot be written ({error}).") from error
    with writing(folder, "adapter"):
        last = begun(folder, resume=resume)  # another process may have been here since
        if last is not None or (folder / SAVED).exists():
            _check_same(folder, saved, last is not None)
        else:
            write_atomically(folder / SAVED, yaml.safe_dump(saved, sort_keys=False).encode())
        log = fit(
            model,
            [encoded[i] for i in train],
            config,
            held=[encoded[i] for i in held],
            checkpoints=folder / CHECKPOINTS,
            resume_from=last,
        )
        try:
            (folder / "log.json").write_text(json.dumps(log, indent=1))
            save_adapter(model, folder)
        except (OSError, SafetensorError) as error:
            raise FinetraceError(
                f"{folder}: the adapter cannot be written ({error}); free some space and run it again."
            ) from error
    loaded.model = model
    return Finetuned(folder, log, lengths, tuple(examples[i].id for i in held))


def new_adapter(loaded: Loaded, config: FinetuneConfig) -> PeftModel:
    """The model with the adapter that a fine-tuning of `config` starts from; its B are zero, so it computes what it did.

    Raises:
        FinetraceError: The model carries an adapter already, or the layers that are to get one are not there.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(loaded.model, PeftModel):
        raise FinetraceError("the model carries an adapter already; load its base alone, or merge the adapter first.")
    depth = int(loaded.model.config.num_hidden_layers)
    if any(not 0 <= layer < depth for layer in config.layers or ()):
        raise FinetraceError(
            f"--layers {' '.join(map(str, config.layers or ()))}: the model has layers 0 to {depth - 1}."
        )

    set_seed(config.seed)
    try:
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_targets(config.target_modules, loaded.model),
            layers_to_transform=list(config.layers) if config.layers is not None else None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(loaded.model, lora)
    except (ValueError, re.error) as error:
        raise FinetraceError(
            f"--target-modules {' '.join(config.target_modules)}: {str(error).splitlines()[0][:200]}"
        ) from error
    model.peft_config["default"].base_model_name_or_path = loaded.spec.model
    return model


def finished(folder: Path) -> bool:
    """Whether `folder` holds an adapter that was trained to its end; its configuration is written last."""
    return (folder / "adapter_config.json").exists() and (folder / "adapter_model.safetensors").exists()


def begun(folder: Path, *, resume: bool) -> str | None:
    """The checkpoint to go on from, of an unfinished run in `folder`; none where there is nothing, or no checkpoint yet.

    Raises:
        FinetraceError: A finished adapter is there, an unfinished run that is not to be resumed, or something else.
    """
    last = _last_complete(folder / CHECKPOINTS)
    if finished(folder):
        raise FinetraceError(f"{folder}: a finished adapter is already there; choose another --out or remove it.")
    if last is not None and not resume:
        raise FinetraceError(f"{folder}: an unfinished run is there; go on with --resume, or choose another --out.")
    ours = {
        lock.NAME,
        part_of(SAVED),
        SAVED,
        CHECKPOINTS,
    }  # what a run leaves that was killed before its first checkpoint
    if last is None and folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - ours):
        raise FinetraceError(f"{folder}: there is something else already; choose another --out.")
    return last


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint to go on from: written to its end, and not the one at which early stopping ended the run.

    The Trainer writes its state last, and forgets when it resumes that it had stopped early; the epoch before stops
    again at the same place.
    """
    done = [path for path in checkpoints.glob("checkpoint-*") if _goes_on(path / "trainer_state.json")]
    return str(max(done, key=lambda path: int(path.name.split("-")[1]))) if done else None


def _goes_on(path: Path) -> bool:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        return not stopped or state["global_step"] >= state["max_steps"]
    except (OSError, ValueError, KeyError):
        return False


def _targets(names: Sequence[str], model: torch.nn.Module) -> list[str] | str:
    """Names of layers as PEFT wants them: a list, or by itself a regular expression or the word all-linear.

    PEFT is content when one name of a list is found; here each has to be.
    """
    if len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
        return names[0]
    known = [f".{name}" for name, _ in model.named_modules()]
    for name in names:
        if not any(each.endswith(f".{name}") for each in known):
            raise ValueError(f"no layer is called {name}")
    return list(names)


def _split(n: int, config: FinetuneConfig) -> tuple[list[int], list[int]]:
    """Training and held-out positions, both in the data's order."""
    count = max(1, round(n * config.validation)) if config.validation else 0
    held = set(random.Random(config.seed).sample(range(n), count))
    train = [i for i in range(n) if i not in held]
    if not train:
        raise FinetraceError(f"--validation {config.validation} of {n} examples leaves none to train on.")
    return train, sorted(held)


def _check_same(folder: Path, wanted: dict[str, Any], begun: bool) -> None:
    """Refuse to go on where the settings that are saved are not those `wanted`; with a checkpoint, a run has `begun`."""
    path = folder / SAVED
    there = read_saved(path, str(path)) if path.exists() else {}
    for key, value in wanted.items():
        if key in NOTED and key not in there:  # by a version that did not note it
            continue
        if there.get(key) != value:
            if not begun:
                raise FinetraceError(
                    f"{folder}: there is something else already, a {SAVED} with {key} {there.get(key)} where this run has "
                    f"{value}; choose another --out."
                )
            raise FinetraceError(
                f"{path}: the unfinished run has {key} {there.get(key)}, this one {value}; go on with the same settings "
                "and data, or choose another --out."
            )
