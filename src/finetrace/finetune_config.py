"""What decides a fine-tuning: settings, presets, and how they are read back from a finished run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetrace.errors import FinetraceError
from finetrace.models import EMBEDDED, Loaded

SAVED = "finetune.yaml"
NOTED = ("held_out", "dtype", "base_fingerprint", "embeddings_fingerprint")  # beside the settings; not by every version
ABOUT = ("model", "data_fingerprint", *NOTED)
Schedule = Literal[  # the Trainer's others want settings of their own
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
POLYNOMIAL_END = 1e-7  # the learning rate at which the Trainer's polynomial schedule ends
LossOn = Literal["response", "last-turn", "all"]


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
        None, min_length=1, description="Transformer layers that get an adapter; all if not given."
    )
    validation: float = Field(0.0, ge=0, lt=1, description="Share of the rows held out for the validation loss.")
    patience: int = Field(3, ge=1, description="Stop after so many epochs without a lower validation loss.")
    seed: int = Field(
        0, ge=0, lt=2**32, description="Fixes the adapter's initialisation, dropout and the order of data."
    )
    max_length: int | None = Field(
        None, ge=2, description="Cut examples after so many tokens; nothing is cut if not given."
    )
    loss_on: LossOn = Field("response", description="Tokens that the loss looks at.")
    chat_template: str | None = Field(
        None, description="A Jinja file, its text, `plain` or `inst`, in place of the tokenizer's template."
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


def configure(
    preset: str, saved: Path | None, given: dict[str, Any], names: Mapping[str, str] | None = None
) -> FinetuneConfig:
    """A preset or a saved finetune.yaml, with the settings that were given on top.

    `names` says what a given setting is called where it comes from, if that is not an option of the command line.
    """
    if preset not in PRESETS:
        raise FinetraceError(f"--preset {preset}: not known; use {', '.join(PRESETS)}.")
    base = PRESETS[preset].model_dump()
    if saved is not None:
        told = {k: v for k, v in read_saved(saved).items() if k not in ABOUT}
        own = {k for k, v in PRESETS["default"].model_dump().items() if base[k] != v}
        if own and own <= told.keys():
            raise FinetraceError(
                f"--preset {preset}: --config {saved} sets all that this preset does; leave one of them out."
            )
        base |= told
    given = {k: v for k, v in given.items() if v is not None}
    try:
        return FinetuneConfig.model_validate({**base, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        name = f"{saved}: {key}" if key not in given else (names or {}).get(key, "--" + key.replace("_", "-"))
        what = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise FinetraceError(f"{name}: {what} (given {first['input']!r}).") from error


def refuse_schedule(config: FinetuneConfig) -> None:
    """Stop where the Trainer's schedule passes over a setting, or would stop when the training begins."""
    if config.schedule == "constant" and config.warmup_steps:
        raise FinetraceError(
            f"--warmup-steps {config.warmup_steps}: the schedule constant has no warm-up; take constant_with_warmup, or leave "
            "it out."
        )
    if config.schedule == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        raise FinetraceError(
            f"--learning-rate {config.learning_rate}: the schedule polynomial ends at {POLYNOMIAL_END}; take a larger one."
        )


def saved_model(saved: Path) -> str:
    """The base model that a saved finetune.yaml names."""
    return str(read_saved(saved).get("model", EMBEDDED))


def read_saved(saved: Path, called: str = "") -> dict[str, Any]:
    """What a finetune.yaml says; errors call it by its option, or as `called`."""
    called = called or f"--config {saved}"
    try:
        told = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        why = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else " ".join(str(error).split())
        raise FinetraceError(f"{called}: cannot be read as a saved configuration ({why}).") from error
    if told is None:
        raise FinetraceError(f"{called}: the file is empty; give a finetune.yaml with the settings of a fine-tuning.")
    if not isinstance(told, dict) or not all(isinstance(key, str) for key in told):
        raise FinetraceError(
            f"{called}: cannot be read as a saved configuration; it takes one setting a line, for instance epochs: 3."
        )
    return told


def other_base(loaded: Loaded) -> str:
    """A sentence where the adapter names another base model than the one that was loaded; else empty.

    Adapters fit every model of their base's shapes. Names that end alike pass for the same: a Hub id and a copy of it on disk.
    """
    settings = getattr(loaded.model, "peft_config", None)
    named = settings["default"].base_model_name_or_path if settings and "default" in settings else None
    if not named or Path(named).name == Path(loaded.spec.model).name:
        return ""
    return (
        f"the adapter names {named} as its base and --model is {loaded.spec.model}; where these are not the same weights, "
        "nothing that follows is true of the model that was fine-tuned"
    )


def other_template(adapter: Path, loaded: Loaded) -> str:
    """A sentence where the folder of an adapter holds another chat template than the tokenizer that was loaded; else empty.

    Trainers leave the tokenizer that they used beside the adapter; the one in use is the base model's.
    """
    path = adapter / "chat_template.jinja"
    try:
        if path.exists():
            held = path.read_text(encoding="utf-8")
        else:
            path = adapter / "tokenizer_config.json"
            held = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return ""
    if not isinstance(held, str) or held.strip() == str(loaded.tokenizer.chat_template).strip():
        return ""
    return (
        f"{path} holds another chat template than the base model's tokenizer, whose is in use; if the adapter was trained with "
        "that, give its text with --chat-template, or these are not the rows that it saw"
    )


def other_rows(adapter: Path, data_fingerprint: str) -> str:
    """A sentence where `finetrace finetune` left word in the folder of an adapter that it saw other rows; else empty."""
    about = read_saved(adapter / SAVED) if (adapter / SAVED).exists() else {}
    trained = about.get("data_fingerprint")
    if trained == data_fingerprint and (held := about.get("held_out")):
        named = ", ".join(map(str, held[:5])) + (" ..." if len(held) > 5 else "")
        return (
            f"{len(held)} of these rows were held out of the fine-tuning for its validation loss ({named}; all in "
            f"{adapter / SAVED}): they have no part in what the adapter says, wherever they rank"
        )
    if trained in (None, data_fingerprint):
        return ""
    return (
        f"the adapter was fine-tuned on other rows or with another encoding ({adapter / SAVED}): a row that it was not trained "
        "on has no part in what it says"
    )


def found_config(folder: Path, say: Callable[[str], None] = lambda text: None) -> FinetuneConfig | None:
    """How the adapter in `folder` was fine-tuned, or `None` where nothing there says so.

    Read from `finetune.yaml`, or from what PEFT and the Hugging Face Trainer (TRL's too) leave: `adapter_config.json`, and
    the last `trainer_state.json` in the folder or in its checkpoints. The Trainer's state does not name every setting: its
    schedule is taken to be linear and its warm-up none, as its defaults are, unless every learning rate that it logged is the
    same; the peak is what a linear schedule started from (`_peak`). Steps over which gradients were accumulated are not in it,
    nor is the weight decay, nor how rows were encoded (`index_encoding.as_indexed`). The pickled `training_args.bin` is never
    read. `say` hears of a run that was not of whole epochs.

    Raises:
        FinetraceError: A file is there and cannot be read, no learning rate was logged, or the run was under half an epoch.
    """
    if (folder / SAVED).exists():
        return configure("default", folder / SAVED, {})
    states = [*folder.glob("trainer_state.json"), *folder.glob("**/checkpoint-*/trainer_state.json")]
    if not states or not (folder / "adapter_config.json").exists():
        return None
    newest = max(states, key=lambda path: path.stat().st_mtime)
    try:
        state = json.loads(newest.read_text(encoding="utf-8"))
        lora = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rates = [(e.get("step", 0), e["learning_rate"]) for e in state["log_history"] if e.get("learning_rate")]
        targets = lora["target_modules"]
        length = _length(state)
        found: dict[str, Any] = {
            "epochs": math.floor(length + 0.5),
            "batch_size": state["train_batch_size"],
            "learning_rate": _peak(rates, state.get("max_steps", 0)) if rates else None,
            "schedule": "constant"
            if len({step for step, _ in rates}) > 1 and len({r for _, r in rates}) == 1
            else None,
            "rank": lora["r"],
            "alpha": lora["lora_alpha"],
            "dropout": lora["lora_dropout"],
            "target_modules": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
            "layers": lora.get("layers_to_transform"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FinetraceError(
            f"{newest}: how the adapter was trained cannot be read there ({error}); give a finetune.yaml with --config."
        ) from error
    if not rates:
        raise FinetraceError(
            f"{newest}: no learning rate was logged there, as in runs shorter than the Trainer's logging_steps; give a "
            "finetune.yaml with --config."
        )
    if found["epochs"] < 1:
        raise FinetraceError(
            f"{newest}: the run went only {length:.2g} times through its rows, less than half an epoch, and retraining goes "
            "through all of them at least once; give a finetune.yaml with --config, or score without retraining."
        )
    if abs(length - found["epochs"]) > 0.02:
        say(
            f"{newest}: the run went {length:.3g} times through its rows; retraining takes {found['epochs']} whole epochs"
        )
    names = {"epochs": "num_train_epochs", "batch_size": "train_batch_size", "learning_rate": "learning_rate"}
    of_lora = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "layers": "layers_to_transform"}
    of_lora["target_modules"] = "target_modules"
    configuration = folder / "adapter_config.json"
    return configure(
        "default",
        None,
        found,
        {ours: f"{newest}: {theirs}" for ours, theirs in names.items()}
        | {ours: f"{configuration}: {theirs}" for ours, theirs in of_lora.items()},
    )


def _length(state: Mapping[str, Any]) -> float:
    """How often a run was to go through its rows: `num_train_epochs`, which the Trainer rounds up, or less by its steps."""
    wanted = float(state["num_train_epochs"])
    steps, done, epoch = (state.get(key) or 0 for key in ("max_steps", "global_step", "epoch"))
    return min(wanted, steps * epoch / done) if steps > 0 and done > 0 and epoch > 0 else wanted


def _peak(logged: Sequence[tuple[int, float]], steps: int) -> float:
    """The learning rate that a linear schedule without warm-up started from, of (step, rate) logged on its way to 0 at `steps`.

    It falls by peak / steps a step, so the first and the last entry give it, whether they were logged before or after their
    step; a single one is taken to be of before, as the Trainer logs. Where they do not lie on such a line (another schedule, or
    warm-up), the largest entry is the best guess.
    """
    largest = max(rate for _, rate in logged)
    (first, high), (last, low) = logged[0], logged[-1]
    if not 0 < first <= last <= steps:
        return largest
    if first == last:
        return high * steps / (steps - first + 1)
    peak = steps * (high - low) / (last - first)
    if peak <= 0:
        return largest
    # how many steps ahead of the line to 0 each entry is: 1 where it was logged before its step, 0 after
    ahead = [step - steps * (1 - rate / peak) for step, rate in logged]
    return peak if max(ahead) - min(ahead) < 0.1 and min(abs(ahead[0]), abs(ahead[0] - 1)) < 0.1 else largest
