"""Hooks that turn one backward pass of a batch into one gradient an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from finetrace.collection.factors import FactorSums
from finetrace.collection.modules import Block, Tracked, Tracking
from finetrace.collection.precision import wide
from finetrace.collection.unseen import Looked, refuse_other_products
from finetrace.errors import FinetraceError
from finetrace.forward import Batch

# units of precision of the terms below which a sum is none; in half precision so many would be most of a real sum
ROUNDING = 1000
ROUNDING_IN_HALF = {torch.float16: 40, torch.bfloat16: 12}


class GradientRecorder:
    """While open, every backward pass fills `rows`: (B, D), the gradient of each example's own loss.

    For a linear map y_t = W a_t, dL/dW = sum_t delta_t a_t^T with delta_t = dL/dy_t; the batch's loss is the sum of the
    examples' losses, so the sum over an example's own tokens is that example's gradient (mathematics as in Goodfellow,
    arXiv 1510.01799). The weights are frozen meanwhile, so no gradient of the sum is computed, and the graph starts at
    the lowest tracked layer. Where both sides are projected, a_t and delta_t are so before they are multiplied, and the sum
    over t is that of the projected gradient, P_out (dL/dW) P_in^T.
    """

    def __init__(self, model: nn.Module, tracking: Tracking, dtype: torch.dtype, looked: Looked | None = None) -> None:
        self.model = model
        self.tracking = tracking
        self.dtype = dtype
        self.rows: Tensor = torch.empty(0)
        self.factors: FactorSums | None = None
        self.listening = False  # whether the next backward pass belongs in the factors
        self.scale = 1.0  # of the loss that is propagated; divided out of every gradient
        self._batch: Batch | None = None
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._training: list[nn.Module] = []
        self._called: set[int] = set()  # modules that a pass called
        self._looked = looked or Looked()

    def __enter__(self) -> GradientRecorder:
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._frozen = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for layer in self.tracking.layers:
            self._handles.append(layer.module.register_forward_pre_hook(_start_graph))
            self._handles.append(layer.module.register_forward_hook(self._watch(layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for module in self._training:
            module.training = True

    def beside(self) -> GradientRecorder:
        """One for another batch at the same time, whose gradients are handed to it: it hears no pass."""
        return GradientRecorder(self.model, self.tracking, self.dtype, self._looked)

    def expect(self, batch: Batch) -> None:
        """Get ready for one forward pass of `batch`, and a backward pass."""
        self._batch = batch
        if self.factors is not None:
            self.factors.begin()
        self.clear()

    def forget(self) -> None:
        """Drop what a pass left that did not come to its end."""
        self._batch = None
        self.rows = torch.empty(0)
        if self.factors is not None:
            self.factors.begin()

    def clear(self) -> None:
        """Get ready for another backward pass of the same batch."""
        assert self._batch is not None, "expect() comes first"
        device = self._batch.ids.device
        self.rows = torch.zeros(len(self._batch), self.tracking.width, dtype=self.dtype, device=device)

    def multiplies(self, layer: Tracked) -> bool:
        """Whether a layer's gradient is the plain product of both sides, so that it may be made elsewhere and added."""
        plain = layer.bias is None and not layer.transposed and not layer.is_head and self.scale == 1
        return plain and layer.weight.name not in self.tracking.sides

    def projected(self, layer: Tracked, inputs: Tensor) -> Tensor:
        """The inputs of a call as `accumulate` wants them."""
        sides = self.tracking.sides.get(layer.weight.name)
        if sides is None:
            return inputs
        with wide(inputs.device):
            return sides.project_inputs(inputs.to(self.dtype))

    def see(self, layer: Tracked, inputs: Tensor) -> None:
        """Note the inputs of a call, once a batch, in the factors."""
        if self.factors is not None and self._batch is not None:
            with wide(inputs.device):
                self.factors.see_inputs(layer, inputs, self._batch)

    def check(self, refuse: Callable[[Sequence[Tracked]], None]) -> None:
        """After the first pass: `refuse` may look at the layers that it did not call, in passes that are not heard."""
        if self._looked.done:
            return
        silent = [layer for layer in self.tracking.layers if id(layer.module) not in self._called]
        if silent:
            batch, self._batch = self._batch, None
            try:
                refuse(silent)
            finally:
                self._batch = batch
        self._looked.done = True

    @property
    def hears(self) -> bool:
        """Whether the backward pass that is under way belongs in factors."""
        return self.factors is not None and self.listening

    def see_deltas(self, layer: Tracked, delta: Tensor) -> None:
        """Note dL/dy (B, T, out) of a call in the factors, where the pass belongs there."""
        if self.factors is not None and self.listening and self._batch is not None:
            self.factors.see_deltas(layer, delta, self._batch)

    def _watch(self, layer: Tracked) -> Any:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._called.add(id(module))
            if self._batch is None or not torch.is_grad_enabled():  # no gradient flows through a call without a graph
                return
            if not self._looked.done:
                refuse_other_products(layer, args[0], output)
            inputs = args[0].detach()
            if not layer.is_head:
                inputs = _by_example(inputs, self._batch)
            inputs = self.projected(layer, inputs)
            self.see(layer, inputs)

            def backward(delta: Tensor) -> None:
                self.accumulate(layer, inputs, delta)

            output.register_hook(backward)

        return forward

    def accumulate(self, layer: Tracked, inputs: Tensor, delta: Tensor) -> None:
        """Add sum_t delta_t a_t^T of every example; a layer called several times in a pass adds up."""
        batch = self._batch
        assert batch is not None, "expect() comes before the pass"
        inputs, coarse, delta = inputs.to(delta.device, self.dtype), delta.dtype, delta.to(self.dtype)
        if not layer.is_head:
            delta = _by_example(delta, batch)
        if self.scale != 1:
            delta = delta / self.scale
        sides = self.tracking.sides.get(layer.weight.name)
        if sides is not None:  # the inputs were projected on the way forward
            delta = sides.project_deltas(delta)
        self.see_deltas(layer, delta)
        # (B, T, in), (B, T, out); the head: (1, >= R, .)
        if layer.is_head:
            rows = len(batch.rows)
            pairs = list(zip(inputs[0, :rows].split(batch.counts), delta[0, :rows].split(batch.counts), strict=True))
            weight = torch.stack([d.T @ a for a, d in pairs])  # (B, out, in)
            bias = torch.stack([_summed(d, 0, coarse) for _, d in pairs])
        else:
            if inputs.dim() != 3 or inputs.shape[0] != len(batch):
                raise FinetraceError(
                    f"{layer.weight.name}: this layer sees an input of shape {tuple(inputs.shape)}, not one sequence an "
                    "example (routed experts do that), so its gradients cannot be told apart; leave it out of --modules, or "
                    "of the layers that get an adapter."
                )
            weight = torch.bmm(delta.transpose(1, 2), inputs)  # (B, out, in)
            bias = _summed(delta, 1, coarse)  # (B, out)
        if layer.transposed:
            weight = weight.transpose(1, 2)
        self.add(layer.weight, weight.flatten(1))
        if layer.bias is not None:
            self.add(layer.bias, bias)

    def add(self, block: Block, rows: Tensor) -> None:
        """Add (B, d) gradients of a block, flattened, projected where it is."""
        flat = self.tracking.flat.get(block.name)
        made = rows if flat is None else flat.project(rows)
        self.rows[:, block.columns] += made.to(self.rows.device)  # layers may lie on several devices


def _by_example(seen: Tensor, batch: Batch) -> Tensor:
    """(B, T, d) of a layer that sees all tokens in one row (B T, d), as OPT's do."""
    return seen.unflatten(0, batch.ids.shape) if seen.dim() == 2 and len(seen) == batch.ids.numel() else seen


def _summed(delta: Tensor, tokens: int, computed: torch.dtype) -> Tensor:
    """The sum over tokens, 0 where nothing but rounding is left of it.

    A softmax does not see a key's bias where no position turns keys. Its gradient is 0, and what rounding makes of it would be
    scaled up to the size of others by damping and norms that go block by block. The rounding is that of the dtype in which
    `delta` was `computed`, and is held against the root of the terms' summed squares: both it and a real sum of terms that
    point anywhere grow with the root of their number.
    """
    found = delta.sum(tokens)
    size = torch.linalg.vector_norm(torch.linalg.vector_norm(delta, dim=-1), dim=tokens)
    units = ROUNDING_IN_HALF.get(computed, ROUNDING)
    real = torch.linalg.vector_norm(found, dim=-1) > units * torch.finfo(computed).eps * size
    return found * real.unsqueeze(-1)


def _start_graph(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The first tracked layer to run makes its input a leaf: nothing below it needs a graph."""
    if not torch.is_grad_enabled() or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(True), *args[1:])
