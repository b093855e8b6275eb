"""One forward and one backward pass over one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from finetrace.collection.factors import FactorSums, sampled_loss, sampled_targets
from finetrace.collection.features import Features
from finetrace.collection.fused import Fused
from finetrace.collection.fused_parts import Workspace
from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.precision import Narrowing
from finetrace.collection.representations import Representation, pool
from finetrace.collection.unseen import refuse_read
from finetrace.cross_entropy import cross_entropy
from finetrace.encoding import Encoded
from finetrace.forward import Batch, example_losses, token_logits
from finetrace.prefix import Prefix

FLOAT16_LOSS_SCALE = 1024.0  # keeps small gradients out of float16's subnormals; divided out again exactly


@dataclass(frozen=True)
class Measured:
    """What a pass made of a batch: its features, and what it adds to Kronecker factors once it is committed."""

    features: Features
    sums: FactorSums | None


@dataclass(frozen=True)
class BatchPass:
    """What passes over batches, one after another, have in common.

    Attributes:
        model: The model, on its device.
        representations: The hidden states wanted.
        dtype: Of the features.
        recorder: Of the gradients.
        narrowing: Of the residual stream.
        prefix: What lies below the lowest tracked layer.
        fused: The pass by hand, for batches that fit it.
    """

    model: nn.Module
    representations: tuple[Representation, ...]
    dtype: torch.dtype
    recorder: GradientRecorder
    narrowing: Narrowing
    prefix: Prefix | None
    fused: Fused | None

    def beside(self, workspace: Workspace) -> BatchPass:
        """For batches at the same time that fit the pass by hand, in memory of their own."""
        assert self.fused is not None, "autograd's hooks hear one batch at a time"
        return replace(self, recorder=self.recorder.beside(), fused=self.fused.within(workspace))

    def forget(self) -> None:
        """Let go of what a pass left that did not come to its end."""
        self.recorder.forget()
        self.clear()

    def clear(self) -> None:
        """Give back the memory that batches leave to one another, between two of them."""
        if self.fused is not None:
            self.fused.workspace.clear()

    def measure(self, items: Sequence[Encoded], ids: Sequence[str], factors: FactorSums | None) -> Measured:
        """The features of one batch, on the CPU."""
        sums = self.recorder.factors = factors.beside() if factors is not None else None
        batch = Batch.of(items).to(next(self.model.parameters()).device)
        if self.fused is not None and self.fused.fits(items):
            wanted = {each.place for each in self.representations}
            loss, rows, hidden = self.fused.run(self.recorder, batch, ids, wanted, self.prefix)
        else:
            loss, rows, hidden = self._pass(batch, ids)
        sampling = sums is not None and sums.labels == "model"
        pooled = {
            each.name: pool(hidden[each.place], batch, each.pooling).to(self.dtype).cpu()
            for each in self.representations
        }
        drawn = self.recorder.rows.cpu() if sampling else None
        return Measured(Features(rows.cpu(), loss.to(self.dtype).cpu(), pooled, sampled=drawn), sums)

    def _pass(self, batch: Batch, ids: Sequence[str]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Losses (B,), gradients (B, D) and the hidden states wanted, by layer.

        Where the factors want labels of the model's own, `recorder.rows` holds the gradients of the sampled loss.
        """
        recorder, narrowing = self.recorder, self.narrowing
        recorder.expect(batch)
        half = next(self.model.parameters()).dtype == torch.float16
        recorder.scale = FLOAT16_LOSS_SCALE if half else 1.0
        wanted = {each.place for each in self.representations}
        sampling = recorder.factors is not None and recorder.factors.labels == "model"
        with torch.enable_grad():
            with narrowing():
                logits, hidden = token_logits(self.model, batch, hidden_states=bool(wanted - {-1}), prefix=self.prefix)
            token = cross_entropy(logits, batch.targets)
            loss = example_losses(batch, token)
            recorder.listening = not sampling
            (loss.sum() * recorder.scale).backward(retain_graph=sampling)
            rows = recorder.rows
            if sampling:
                recorder.clear()
                recorder.listening = True
                drawn = cross_entropy(logits, sampled_targets(logits, batch, ids))
                (sampled_loss(drawn, batch) * recorder.scale).backward()
        recorder.check(lambda layers: refuse_read(self.model, layers, batch, narrowing))
        return loss.detach(), rows, {layer: hidden[layer].detach() for layer in wanted}
