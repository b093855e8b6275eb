"""The Hugging Face Trainer, with logits at response positions alone and checkpoints free of pickle."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from finetrace.atomic import write_atomically, write_tensors
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.finetune_config import FinetuneConfig
from finetrace.forward import Batch, token_losses
from finetrace.models import save_adapter
from finetrace.prefix import Prefix, frozen_prefix
from finetrace.progress import Tracker
from finetrace.reproducible import reproducible

if TYPE_CHECKING:
    from peft import PeftModel

ORDERS = 100_003  # between the seeds of two runs' orders, more than a run has epochs


class ResponseTrainer(Trainer):
    """Trains on batches of `Batch`: the loss is the mean over the loss tokens of a batch, as the Trainer's own is.

    Checkpoints keep the adapter, the optimizer and the random state in safetensors and JSON, so that a folder that
    somebody else made can be resumed without running code that it carries.
    """

    def __init__(self, prefix: Prefix | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.prefix = prefix
        self.remove_callback(PrinterCallback)
        self.add_callback(_ProgressCallback())

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's own, without its walk through all objects of the process: a training leaves no garbage to collect."""
        super().create_accelerator_and_postprocess()
        self.accelerator.free_memory = lambda *objects: list(objects)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy over the batch's loss tokens."""
        batch: Batch = inputs["batch"].to(self.args.device)
        loss = token_losses(model, batch, prefix=self.prefix)[0].mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_adapter(self.model, Path(output_dir or self.args.output_dir))  # over what a killed run left there, too

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        tensors, scalars = {}, {}
        for key, entry in state["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{key}.{name}"] = value
                else:
                    scalars[f"{key}.{name}"] = value
        write_tensors(Path(output_dir) / "optimizer.safetensors", tensors)
        document = {"groups": state["param_groups"], "scalars": scalars, "schedule": self.lr_scheduler.state_dict()}
        write_atomically(Path(output_dir) / "optimizer.json", json.dumps(document).encode())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        document = json.loads((Path(checkpoint) / "optimizer.json").read_text())
        entries: dict[int, dict[str, Any]] = {}
        stored = {**load_file(str(Path(checkpoint) / "optimizer.safetensors")), **document["scalars"]}
        for path, value in stored.items():
            key, name = path.split(".", 1)
            entries.setdefault(int(key), {})[name] = value
        self.optimizer.load_state_dict({"state": entries, "param_groups": document["groups"]})
        self.lr_scheduler.load_state_dict(document["schedule"])

    def _save_rng_state(self, output_dir: str) -> None:
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        write_tensors(Path(output_dir) / "random.safetensors", tensors)
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        document = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss]}
        write_atomically(Path(output_dir) / "random.json", json.dumps(document).encode())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors = load_file(str(Path(checkpoint) / "random.safetensors"))
        torch.set_rng_state(tensors["cpu"])
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                if f"cuda.{i}" in tensors:
                    torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
        document = json.loads((Path(checkpoint) / "random.json").read_text())
        version, internal, gauss = document["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = document["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def fit(
    model: PeftModel,
    rows: Sequence[Encoded],
    config: FinetuneConfig,
    *,
    held: Sequence[Encoded] = (),
    checkpoints: Path | None = None,
    resume_from: str | None = None,
) -> list[dict[str, float]]:
    """Train the adapter that `model` carries, which then is in eval mode.

    Args:
        model: A base with the adapter of `finetuning.new_adapter`, on its device.
        rows: The training set, in the data's order.
        config: What decides the training.
        held: Rows of the validation loss; with some, training stops early and ends at the best epoch.
        checkpoints: Folder of a checkpoint an epoch; none is kept without it.
        resume_from: A checkpoint to go on from.

    Returns:
        The Trainer's log: losses and learning rates, an entry an epoch.

    Raises:
        FinetraceError: The training diverged, a checkpoint cannot be written, or there is a validation loss and no folder for
            the epochs that it chooses among.
    """
    if held and checkpoints is None:
        raise FinetraceError("a validation loss chooses among epochs, which needs a folder of checkpoints.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = ResponseTrainer(
        prefix=frozen_prefix(
            model.train(), trained, f"{model.dtype}", singly=True, tokens=sum(len(item.ids) for item in (*rows, *held))
        ),
        model=model,
        args=_arguments(checkpoints, config, model.device.type == "cpu", bool(held)),
        train_dataset=_Rows(list(rows)),
        eval_dataset=_Rows(list(held)) if held else None,
        data_collator=_collate,
        callbacks=[EarlyStoppingCallback(config.patience)] if held else [],
    )
    try:
        with reproducible(model.device):
            trainer.train(resume_from_checkpoint=resume_from)
    except (OSError, SafetensorError) as error:
        if checkpoints is None:
            raise  # nothing was written
        raise FinetraceError(
            f"{checkpoints}: a checkpoint cannot be written ({error}); free some space and run it again."
        ) from error
    model.eval()
    bad = [name for name, value in model.named_parameters() if "lora_" in name and not torch.isfinite(value).all()]
    if bad:
        raise FinetraceError(
            f"training diverged: {bad[0]} is not finite; use a smaller --learning-rate than {config.learning_rate}."
        )
    return [dict(entry) for entry in trainer.state.log_history]


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


def _arguments(checkpoints: Path | None, config: FinetuneConfig, cpu: bool, validated: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints or Path(tempfile.gettempdir())),  # nothing is written there without checkpoints
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        data_seed=_order(config.seed),
        save_strategy="epoch" if checkpoints is not None else "no",
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
        use_cpu=cpu,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs hold one model here; the Trainer's DataParallel would split the batch
    return arguments


def _order(seed: int) -> int:
    """Seed of the data's order: apart by more than there are epochs.

    Epoch e of a run is ordered by this seed plus e, so that runs of neighbouring seeds would go through the same orders one
    epoch later.
    """
    return seed * ORDERS % 2**32


class _ProgressCallback(TrainerCallback):
    """Steps done, rate and time left on standard error, and the loss of the last epoch."""

    def __init__(self) -> None:
        self.tracker: Tracker | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tracker = Tracker("fine-tuning", state.max_steps, "steps").start()
        self.tracker.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.tracker is not None:
            self.tracker.advance()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.tracker is not None and logs and "loss" in logs:
            self.tracker.note(f"loss {float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tracker is not None:
            self.tracker.stop()
