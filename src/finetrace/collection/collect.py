"""The collection pass: batches in, gradients, representations and losses out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from finetrace.batching import batches
from finetrace.collection.factors import FactorSums, Labels, sampled_loss, sampled_targets
from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.modules import Tracking
from finetrace.collection.precision import HALF, Narrowing, wide_prefix, wide_residual
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation, pool
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, example_losses, token_logits
from finetrace.prefix import Prefix

FLOAT16_LOSS_SCALE = 1024.0  # keeps small gradients out of float16's subnormals; divided out again exactly


@dataclass
class Features:
    """What is known of some examples, one a row, in the order they were given.

    Attributes:
        gradients: (rows, D) gradient of each example's own mean loss, blocks side by side.
        losses: (rows,) that loss, in nats.
        representations: By name (`pooling@layer`), (rows, d) hidden states.
        sampled: (rows, D) gradients of `sampled_loss`, where factors with the model's own labels were asked for.
    """

    gradients: Tensor
    losses: Tensor
    representations: dict[str, Tensor]
    sampled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.losses)

    def some(self, chosen: slice) -> Features:
        """Of some of the examples."""
        kept = {name: value[chosen] for name, value in self.representations.items()}
        return Features(self.gradients[chosen], self.losses[chosen], kept)


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
        return features_dtype(self.model)

    def collect(
        self,
        items: Sequence[Encoded],
        ids: Sequence[str],
        on_batch: Callable[[int], None] = lambda count: None,
        *,
        factors: FactorSums | None = None,
    ) -> Features:
        """Features of `items`, in their order, on the CPU; `on_batch` hears how many rows each batch finished.

        `factors` are added to: with the data's labels at no extra pass, with the model's own in a second backward pass.

        Raises:
            FinetraceError: There is no item, or a gradient or loss is not finite; the row is named.
        """
        if not items:
            raise FinetraceError("there is no example to take gradients of; give at least one with a response.")
        device = next(self.model.parameters()).device
        gradients = torch.empty(len(items), self.tracking.width, dtype=self.dtype)
        sampled = torch.empty_like(gradients) if factors is not None and factors.labels == "model" else None
        losses = torch.empty(len(items), dtype=self.dtype)
        pooled: dict[str, list[Tensor]] = {each.name: [] for each in self.representations}
        order: list[int] = []
        prefix = self._prefix()
        with (
            GradientRecorder(self.model, self.tracking, self.dtype) as recorder,
            wide_residual(self.model) as narrowing,
        ):
            recorder.factors = factors
            for chosen in batches(items, self.batch_tokens):
                batch = Batch.of([items[i] for i in chosen]).to(device)
                names = [ids[i] for i in chosen]
                loss, rows, hidden = self._pass(recorder, batch, names, narrowing, prefix)
                gradients[chosen] = rows.cpu()
                if sampled is not None:
                    sampled[chosen] = recorder.rows.cpu()
                losses[chosen] = loss.cpu()
                for each in self.representations:
                    pooled[each.name].append(pool(hidden[each.layer], batch, each.pooling).to(self.dtype).cpu())
                _refuse_not_finite(gradients, losses, chosen, ids)
                if sampled is not None:
                    _refuse_not_finite(sampled, losses, chosen, ids)
                order += chosen
                on_batch(len(chosen))
        back = torch.argsort(torch.tensor(order, dtype=torch.long))
        return Features(gradients, losses, {name: torch.cat(parts)[back] for name, parts in pooled.items()}, sampled)

    def factor_sums(self, labels: Labels) -> FactorSums:
        """Empty sums for `collect` to add to."""
        return FactorSums(self.tracking, labels, self.dtype, next(self.model.parameters()).device)

    def _prefix(self) -> Prefix | None:
        """What lies below the lowest tracked layer: another loss of the same batches starts above it."""
        wanted = [parameter for layer in self.tracking.layers for parameter in layer.module.parameters()]
        return wide_prefix(self.model, wanted)

    def _pass(
        self,
        recorder: GradientRecorder,
        batch: Batch,
        ids: Sequence[str],
        narrowing: Narrowing,
        prefix: Prefix | None,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Losses (B,), gradients (B, D) and the hidden states wanted, by layer.

        Where the factors want labels of the model's own, `recorder.rows` holds the gradients of the sampled loss.
        """
        recorder.expect(batch)
        half = next(self.model.parameters()).dtype == torch.float16
        recorder.scale = FLOAT16_LOSS_SCALE if half else 1.0
        wanted = {each.layer for each in self.representations}
        sampling = recorder.factors is not None and recorder.factors.labels == "model"
        with torch.enable_grad():
            with narrowing():
                logits, hidden = token_logits(self.model, batch, hidden_states=bool(wanted - {-1}), prefix=prefix)
            token = cross_entropy(logits, batch.targets, reduction="none")
            loss = example_losses(batch, token)
            recorder.listening = not sampling
            (loss.sum() * recorder.scale).backward(retain_graph=sampling)
            rows = recorder.rows
            if sampling:
                recorder.clear()
                recorder.listening = True
                drawn = cross_entropy(logits, sampled_targets(logits, batch, ids), reduction="none")
                (sampled_loss(drawn, batch) * recorder.scale).backward()
        return loss.detach(), rows, {layer: hidden[layer].detach() for layer in wanted}


def features_dtype(model: nn.Module) -> torch.dtype:
    """Dtype in which a model's gradients are computed: float32 in half precision, else the model's own."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.float32 if dtype in HALF else dtype


def _refuse_not_finite(gradients: Tensor, losses: Tensor, chosen: Sequence[int], ids: Sequence[str]) -> None:
    for i in chosen:
        if not (torch.isfinite(losses[i]) and torch.isfinite(gradients[i].sum())):
            what = "loss" if not torch.isfinite(losses[i]) else "gradient"
            raise FinetraceError(
                f"example {ids[i]} (row {i + 1} of its shard): its {what} is not finite; look at the row, or use "
                "--dtype float32 if the model runs in half precision."
            )
