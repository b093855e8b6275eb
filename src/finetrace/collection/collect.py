"""The collection pass: batches in, gradients, representations and losses out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.modules import Tracking
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation, pool
from finetrace.encoding import Encoded, length_batches
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, example_losses, token_losses

HALF = (torch.bfloat16, torch.float16)
FLOAT16_LOSS_SCALE = 1024.0  # keeps small gradients out of float16's subnormals; divided out again exactly


@dataclass
class Features:
    """What is known of some examples, one a row, in the order they were given.

    Attributes:
        gradients: (rows, D) gradient of each example's own mean loss, blocks side by side.
        losses: (rows,) that loss, in nats.
        representations: By name (`pooling@layer`), (rows, d) hidden states.
    """

    gradients: Tensor
    losses: Tensor
    representations: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Collector:
    """One forward and one backward pass over encoded examples.

    Attributes:
        model: The model, on its device.
        tracking: The layers whose gradients are wanted.
        representations: The hidden states wanted.
        batch_tokens: Padded tokens a batch holds at most; a longer example travels alone.
    """

    model: nn.Module
    tracking: Tracking
    representations: tuple[Representation, ...] = DEFAULT_REPRESENTATIONS
    batch_tokens: int = 2048

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features: float32 for half-precision models, else the model's own."""
        dtype = next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return torch.float32 if dtype in HALF else dtype

    def collect(
        self, items: Sequence[Encoded], ids: Sequence[str], on_batch: Callable[[int], None] = lambda count: None
    ) -> Features:
        """Features of `items`, in their order, on the CPU; `on_batch` hears how many rows each batch finished.

        Raises:
            FinetraceError: There is no item, or a gradient or loss is not finite; the row is named.
        """
        if not items:
            raise FinetraceError("there is no example to take gradients of; give at least one with a response.")
        device = next(self.model.parameters()).device
        gradients = torch.empty(len(items), self.tracking.width, dtype=self.dtype)
        losses = torch.empty(len(items), dtype=self.dtype)
        pooled: dict[str, list[Tensor]] = {each.name: [] for each in self.representations}
        order: list[int] = []
        with GradientRecorder(self.model, self.tracking, self.dtype) as recorder:
            for chosen in length_batches([len(item.ids) for item in items], self.batch_tokens):
                batch = Batch.of([items[i] for i in chosen]).to(device)
                loss, hidden = self._pass(recorder, batch)
                gradients[chosen] = recorder.rows.cpu()
                losses[chosen] = loss.cpu()
                for each in self.representations:
                    pooled[each.name].append(pool(hidden[each.layer], batch, each.pooling).to(self.dtype).cpu())
                _refuse_not_finite(gradients, losses, chosen, ids)
                order += chosen
                on_batch(len(chosen))
        back = torch.argsort(torch.tensor(order, dtype=torch.long))
        return Features(gradients, losses, {name: torch.cat(parts)[back] for name, parts in pooled.items()})

    def _pass(self, recorder: GradientRecorder, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """Losses (B,) and the hidden states wanted, by layer; the gradients are left in `recorder.rows`."""
        recorder.expect(batch)
        half = next(self.model.parameters()).dtype == torch.float16
        scale = FLOAT16_LOSS_SCALE if half else 1.0
        wanted = {each.layer for each in self.representations}
        with torch.enable_grad():
            token, hidden = token_losses(self.model, batch, hidden_states=bool(wanted - {-1}))
            loss = example_losses(batch, token)
            (loss.sum() * scale).backward()
        if half:
            recorder.rows /= scale
        return loss.detach(), {layer: hidden[layer].detach() for layer in wanted}


def _refuse_not_finite(gradients: Tensor, losses: Tensor, chosen: Sequence[int], ids: Sequence[str]) -> None:
    for i in chosen:
        if not (torch.isfinite(losses[i]) and torch.isfinite(gradients[i].sum())):
            what = "loss" if not torch.isfinite(losses[i]) else "gradient"
            raise FinetraceError(
                f"example {ids[i]} (row {i + 1} of its shard): its {what} is not finite; look at the row, or use "
                "--dtype float32 if the model runs in half precision."
            )
