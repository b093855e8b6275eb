"""Per-example gradients of a plain Llama without autograd: what a batch shares is computed once, and nothing in vain.

Weights are frozen, so only gradients of inputs are needed. The opening that all examples of a batch share, as a template's
system prompt is, passes once on the way forward; what is padding, or lies behind the loss, never; the last layer's perceptron
sees the rows of the loss alone, and the vocabulary's logits are made some rows at a time. Results are those of the model's own
pass up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from finetrace.attention import LONGEST, MOST_WEIGHTS
from finetrace.collection.factors import drawn, uniforms
from finetrace.collection.fused_layer import Kept, Layer, Place
from finetrace.collection.fused_layout import Layout
from finetrace.collection.fused_parts import Workspace
from finetrace.collection.fused_plan import Plan, plan
from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.modules import Tracking
from finetrace.encoding import Encoded
from finetrace.forward import LEAST_ROWS, Batch, example_losses
from finetrace.prefix import Prefix

HEAD_ROWS = 256  # of logits at a time, all of which pass over the whole vocabulary matrix
PASSING = 4  # layers' worth of what is under way in one
CHANCE_ROWS = 8  # of chances at a time, which stay in the processor's cache


@dataclass(frozen=True)
class Fused:
    """The fused pass of one model.

    Attributes:
        plan: Its weights.
        workspace: Memory that the batches share.
    """

    plan: Plan
    workspace: Workspace = field(default_factory=Workspace)

    @classmethod
    def of(cls, model: nn.Module, tracking: Tracking) -> Fused | None:
        """`None` where the model, or something that listens to it, is not known to this pass."""
        found = plan(model, tracking)
        return None if found is None else cls(found)

    def within(self, workspace: Workspace) -> Fused:
        """The same pass in other memory, for a batch at the same time."""
        return Fused(self.plan, workspace)

    def fits(self, items: Sequence[Encoded]) -> bool:
        """Whether a batch is padded on the right alone and short enough to keep its attention."""
        heads = max(layer.shape.heads for layer in self.plan.layers)
        width = max(len(item.ids) for item in items)
        short = width <= LONGEST and len(items) * heads * width**2 <= MOST_WEIGHTS
        return short and all(item.padding == 0 and item.prompt_length > 0 for item in items)

    def batch_bytes(self, tokens: int) -> int:
        """What a batch of so many tokens holds at most, about: of layers what their backward pass needs, and logits.

        Attention is taken to be as wide as it may be, so that batches of one size have one size here.
        """
        kept = []
        for layer in self.plan.layers:
            heads = layer.shape.heads * LONGEST + (layer.shape.heads + 2 * layer.shape.groups) * layer.shape.width
            narrow = heads + 2 * len(layer.gate.weight)
            kept.append(
                2 * layer.qkv.weight.shape[1] * self.plan.wide.itemsize + narrow * self.plan.head.dtype.itemsize
            )
        most = sum(kept[self.plan.lowest :]) + PASSING * max(kept)
        return tokens * most + HEAD_ROWS * len(self.plan.head) * self.plan.head.dtype.itemsize

    @torch.no_grad()
    def run(
        self,
        recorder: GradientRecorder,
        batch: Batch,
        ids: Sequence[str],
        wanted: set[int],
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Losses (B,), gradients (B, D) and the hidden states wanted, by layer counted from the end.

        Hidden states are (B, T, d), right where a representation looks and anything elsewhere. Where the recorder's factors
        want labels of the model's own, `recorder.rows` holds the gradients of the sampled loss. A `prefix` remembers what lies
        below the lowest tracked layer, where no other hidden states than the last are wanted.
        """
        recorder.expect(batch)
        layout = Layout.of(batch)
        place = self._place(layout)
        hidden: dict[int, Tensor] = {}
        kept: list[Kept] = []
        layers = self.plan.layers

        def below() -> Tensor:
            """(F, d) what enters the lowest layer with something tracked."""
            x = self.plan.embedding.index_select(0, layout.ids).to(self.plan.wide)
            for layer in layers[: self.plan.lowest]:
                notice(layer, x)
                x, _ = layer.forward(x, place, 0, keep=False)
            return x.clone() if self.plan.lowest else x  # out of the workspace

        def notice(layer: Layer, x: Tensor) -> None:
            if layer.number - len(layers) - 1 in wanted:
                hidden[layer.number - len(layers) - 1] = _pooled(x[layout.wanted :], layout)

        key = b"%d " % torch.get_num_threads() + layout.key  # more threads may round otherwise
        x = below() if prefix is None or wanted - {-1} else prefix.remembered(key, below)
        # factors count the last layer's other tokens too, and few rows are multiplied less exactly
        short = self.plan.lean and len(batch.rows) >= LEAST_ROWS
        upper = layout.wanted if short else 0
        for layer in layers[self.plan.lowest :]:
            notice(layer, x)
            x, held = layer.forward(x, place, upper if layer.number == len(layers) - 1 else 0, keep=True)
            assert held is not None
            kept.append(held)
        x = x[layout.wanted - upper :]
        scales = self.plan.norm.scales(x)
        final = self.plan.norm.forward(x, scales)  # (F - wanted, d)
        if -1 in wanted:
            hidden[-1] = _pooled(final, layout)
        rows = slice(layout.loss.start - layout.wanted, layout.loss.stop - layout.wanted)
        sampling = recorder.factors is not None and recorder.factors.labels == "model"
        token, seeds = self._head(final[rows], batch, uniforms(batch, ids) if sampling else None)
        found = []
        for number, seed in enumerate(seeds):
            if number:
                recorder.clear()
            recorder.listening = number == len(seeds) - 1
            grad = torch.zeros(len(layout.carrying), x.shape[1], dtype=x.dtype)
            tail = grad[len(grad) - len(seed) :]
            self.plan.norm.backward(tail, seed, x, scales, layout.last, self.workspace)
            for layer, held in zip(reversed(layers[self.plan.lowest :]), reversed(kept), strict=True):
                pairs = layout.last if layer.number == len(layers) - 1 and short else layout.whole
                layer.backward(grad, held, place, recorder, pairs, layer.number == self.plan.lowest)
            found.append(recorder.rows)
        return example_losses(batch, token), found[0], hidden

    def _head(self, final: Tensor, batch: Batch, uniform: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """(R,) losses of tokens, and (R, d) gradients of the batch's loss, and of the sampled one where it is wanted."""
        head, wide = self.plan.head, self.plan.wide
        narrow = final.to(head.dtype)
        losses = final.new_empty(len(final))
        seeds = [torch.empty_like(final) for _ in range(1 if uniform is None else 2)]
        weights = batch.weights.to(wide).unsqueeze(1)
        labels = [batch.targets] if uniform is None else [batch.targets, torch.empty_like(batch.targets)]
        right = [torch.empty_like(losses) for _ in labels]  # the chances of the labels
        for part in _parts(len(final), HEAD_ROWS):
            size = part.stop - part.start
            some = torch.cat([narrow[part], narrow.new_zeros(max(0, LEAST_ROWS - size), narrow.shape[1])])
            chances = self.workspace.take("logits", (len(some), len(head)), head.dtype)
            torch.mm(some, head.T, out=chances)
            for few in _parts(size, CHANCE_ROWS):
                rows, every = slice(part.start + few.start, part.start + few.stop), torch.arange(few.stop - few.start)
                logits = chances[few].to(wide)
                found = torch.softmax(logits, -1)
                # the largest logit less the logarithm of its chance is the logarithm of the sum
                losses[rows] = logits.amax(1) - found.amax(1).log() - logits[every, labels[0][rows]]
                if uniform is not None:
                    labels[1][rows] = drawn(logits, uniform[rows])
                for chance, label in zip(right, labels, strict=True):
                    chance[rows] = found[every, label[rows]]
                chances[few] = found
            every = torch.arange(size)
            for seed, label, chance, weight in zip(seeds, labels, right, (weights, weights.sqrt()), strict=False):
                chances[every, label[part]] = (chance[part] - 1).to(head.dtype)
                seed[part] = torch.mm(chances, head)[:size] * weight[part]
                chances[every, label[part]] = chance[part].to(head.dtype)
        return losses, seeds

    def _place(self, layout: Layout) -> Place:
        shape, wide = self.plan.layers[0].shape, self.plan.wide
        causal = torch.ones(layout.width, layout.width, dtype=torch.bool).tril()
        bias = torch.zeros(causal.shape, dtype=wide).masked_fill_(~causal, -torch.inf)
        angles = torch.arange(layout.width).float()[:, None] * self.plan.frequencies
        turns = angles.cos().to(wide).unsqueeze(1), angles.sin().to(wide).unsqueeze(1)  # (T, 1, D / 2)
        forward = turns[0].index_select(0, layout.positions), turns[1].index_select(0, layout.positions)
        backward = turns[0] * shape.width**-0.5, -turns[1] * shape.width**-0.5
        return Place(layout, bias.repeat(shape.heads // shape.groups, 1), forward, backward, self.workspace)


def _parts(count: int, most: int) -> list[slice]:
    """As many equal parts as it takes for none to have more than `most`."""
    parts = -(-count // most)
    return [slice(count * k // parts, count * (k + 1) // parts) for k in range(parts)]


def _pooled(values: Tensor, layout: Layout) -> Tensor:
    """(B, T, d) of the forward rows from `wanted` on; zero elsewhere."""
    padded = values.new_zeros(layout.count * layout.width, values.shape[1])
    padded.index_copy_(0, layout.places[layout.wanted :], values)
    return padded.view(layout.count, layout.width, -1)
