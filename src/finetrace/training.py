"""The Hugging Face Trainer, with logits at response positions alone and checkpoints free of pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from finetrace.forward import Batch, token_losses
from finetrace.prefix import Prefix
from finetrace.progress import Tracker


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
        self.model.save_pretrained(
            output_dir or self.args.output_dir, state_dict=state_dict, save_embedding_layers=False
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()
        tensors, scalars = {}, {}
        for key, entry in state["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{key}.{name}"] = value.contiguous()
                else:
                    scalars[f"{key}.{name}"] = value
        save_file(tensors, str(Path(output_dir) / "optimizer.safetensors"))
        document = {"groups": state["param_groups"], "scalars": scalars, "schedule": self.lr_scheduler.state_dict()}
        (Path(output_dir) / "optimizer.json").write_text(json.dumps(document))

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
        save_file(tensors, str(Path(output_dir) / "random.safetensors"))
        name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
        document = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss]}
        (Path(output_dir) / "random.json").write_text(json.dumps(document))

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
