"""LoRA fine-tuning on PEFT and the Hugging Face Trainer, with the encoding that attribution uses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from finetrace import fingerprint
from finetrace.encoding import Encoded, Encoder, LengthReport, read_template
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.forward import Batch
from finetrace.models import EMBEDDED, Loaded, save_adapter
from finetrace.training import ResponseTrainer

SAVED = "finetune.yaml"
Schedule = Literal[  # the Trainer's others want settings of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class FinetuneConfig(BaseModel):
    """Everything that decides a fine-tuned adapter besides the data; saved beside it and re-runnable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(3, ge=1, description="Passes over the training set.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    batch_size: int = Field(8, ge=1, description="Examples a step.")
    schedule: Schedule = Field("linear", description="Learning-rate schedule of the Hugging Face Trainer.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    rank: int = Field(4, ge=1, description="LoRA rank r.")
    alpha: float = Field(32, gt=0, description="LoRA alpha; updates are scaled by alpha / r.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on the LoRA input while training.")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), description="Names (or one regular expression) of the linear layers that get an adapter."
    )
    layers: tuple[int, ...] | None = Field(
        None, description="Transformer layers that get an adapter; all if not given."
    )
    validation: float = Field(0.0, ge=0, lt=1, description="Share of the rows held out for the validation loss.")
    patience: int = Field(3, ge=1, description="Stop after so many epochs without a lower validation loss.")
    seed: int = Field(0, ge=0, description="Fixes the adapter's initialisation, dropout and the order of data.")
    max_length: int | None = Field(
        None, ge=2, description="Cut examples after so many tokens; nothing is cut if not given."
    )
    loss_on: Literal["response", "last-turn", "all"] = Field("response", description="Tokens that the loss looks at.")
    chat_template: str | None = Field(
        None, description="A Jinja file, `plain` or `inst`, in place of the tokenizer's template."
    )
    pad_to: int | None = Field(
        None,
        ge=2,
        description="Pad on the left to so many tokens, in the loss with `all`; nothing is padded if not given.",
    )


PRESETS: dict[str, FinetuneConfig] = {
    "default": FinetuneConfig(),
    # arXiv 2409.19998, section 3: batch 32, 25 epochs, early stopping after three rises, the Trainer's optimizer
    "paper": FinetuneConfig(epochs=25, batch_size=32, learning_rate=5e-5, validation=0.1, max_length=128),
    # the released code: batch 24, 10 epochs (50 on the mixed sets), every token of a 128-token window in the loss
    "released": FinetuneConfig(
        epochs=10,
        batch_size=24,
        learning_rate=5e-5,
        max_length=128,
        pad_to=128,
        loss_on="all",
        chat_template="inst",
    ),
}


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
) -> Finetuned:
    """Train a LoRA adapter on `examples` and save it in `folder`; `loaded.model` then carries it, in eval mode.

    Checkpoints of every epoch, with the optimizer's state, stay under `folder/checkpoints`. The same configuration,
    data and seed give the same adapter bit by bit on the same machine; a killed run started again with `resume` ends
    at that adapter too.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    config = config or FinetuneConfig()
    checkpoints = folder / "checkpoints"
    last = _last_complete(checkpoints)
    if finished(folder):
        raise FinetraceError(f"{folder}: a finished adapter is already there; choose another --out or remove it.")
    if last is not None and not resume:
        raise FinetraceError(f"{folder}: an unfinished run is there; go on with --resume, or choose another --out.")
    if not (folder / SAVED).exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FinetraceError(f"{folder}: there is something else already; choose another --out.")
    if not examples:
        raise FinetraceError("the training set is empty; give at least one example with a response.")
    if isinstance(loaded.model, PeftModel):
        raise FinetraceError("the model carries an adapter already; load its base alone, or merge the adapter first.")
    depth = int(loaded.model.config.num_hidden_layers)
    if any(not 0 <= layer < depth for layer in config.layers or ()):
        raise FinetraceError(
            f"--layers {' '.join(map(str, config.layers or ()))}: the model has layers 0 to {depth - 1}."
        )
    template = read_template(config.chat_template)
    encoder = Encoder(loaded.tokenizer, config.loss_on, config.max_length, template, config.pad_to)
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    encoded, lengths = encoder.encode_all(examples, context)
    train, held = _split(len(encoded), config)
    saved = {
        "model": loaded.spec.model,
        "data_fingerprint": fingerprint.of_data([example.id for example in examples], encoded),
        **config.model_dump(mode="json"),
    }
    if last is not None:
        _check_same(folder / SAVED, saved)

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAVED).write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise FinetraceError(f"{folder}: cannot be written ({error}).") from error

    trainer = ResponseTrainer(
        model=model,
        args=_arguments(checkpoints, config, loaded, bool(held)),
        train_dataset=_Rows([encoded[i] for i in train]),
        eval_dataset=_Rows([encoded[i] for i in held]) if held else None,
        data_collator=_collate,
        callbacks=[EarlyStoppingCallback(config.patience)] if held else [],
    )
    trainer.train(resume_from_checkpoint=last)
    model.eval()
    log = [dict(entry) for entry in trainer.state.log_history]
    bad = [name for name, value in model.named_parameters() if "lora_" in name and not torch.isfinite(value).all()]
    if bad:
        raise FinetraceError(
            f"training diverged: {bad[0]} is not finite; use a smaller --learning-rate than {config.learning_rate}."
        )
    (folder / "log.json").write_text(json.dumps(log, indent=1))
    save_adapter(model, folder)
    loaded.model = model
    return Finetuned(folder, log, lengths, tuple(examples[i].id for i in held))


def finished(folder: Path) -> bool:
    """Whether `folder` holds an adapter that was trained to its end; its configuration is written last."""
    return (folder / "adapter_config.json").exists() and (folder / "adapter_model.safetensors").exists()


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


def _collate(rows: list[Encoded]) -> dict[str, Any]:
    batch = Batch.of(rows)
    return {"input_ids": batch.ids, "batch": batch}  # the Trainer reads the number of rows off the first tensor


class _Rows(torch.utils.data.Dataset[Encoded]):
    """Encoded examples as the data set that the Trainer wants."""

    def __init__(self, rows: list[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Encoded:
        return self.rows[i]


def _split(n: int, config: FinetuneConfig) -> tuple[list[int], list[int]]:
    """Training and held-out positions, both in the data's order."""
    count = max(1, round(n * config.validation)) if config.validation else 0
    held = set(random.Random(config.seed).sample(range(n), count))
    train = [i for i in range(n) if i not in held]
    if not train:
        raise FinetraceError(f"--validation {config.validation} of {n} examples leaves none to train on.")
    return train, sorted(held)


def _arguments(folder: Path, config: FinetuneConfig, loaded: Loaded, validated: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="epoch",
        eval_strategy="epoch" if validated else "no",
        load_best_model_at_end=validated,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False if validated else None,
        restore_callback_states_from_checkpoint=True,  # the patience that early stopping has left
        prediction_loss_only=True,
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["batch"],
        use_cpu=torch.device(loaded.spec.device).type == "cpu",
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs hold one model here; the Trainer's DataParallel would split the batch
    return arguments


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    there: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, value in wanted.items():
        if there.get(key) != value:
            raise FinetraceError(
                f"{path}: the unfinished run has {key} {there.get(key)}, this one {value}; go on with the same settings "
                "and data, or choose another --out."
            )


def configure(preset: str, saved: Path | None, given: dict[str, Any]) -> FinetuneConfig:
    """A preset or a saved finetune.yaml, with the settings that were given on top."""
    if preset not in PRESETS:
        raise FinetraceError(f"--preset {preset}: not known; use {', '.join(PRESETS)}.")
    base = PRESETS[preset].model_dump()
    if saved is not None:
        base |= {k: v for k, v in _read_saved(saved).items() if k not in ("model", "data_fingerprint")}
    try:
        return FinetuneConfig.model_validate({**base, **{k: v for k, v in given.items() if v is not None}})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise FinetraceError(f"{flag}: {first['msg']} (given {first['input']!r}).") from error


def saved_model(saved: Path) -> str:
    """The base model that a saved finetune.yaml names."""
    return str(_read_saved(saved).get("model", EMBEDDED))


def _read_saved(saved: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise FinetraceError(f"--config {saved}: cannot be read as a saved configuration ({error}).") from error
