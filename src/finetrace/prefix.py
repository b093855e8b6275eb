"""The frozen layers below the lowest one of interest: their output is computed once and found again.

Training an adapter on the last layers of a model, or taking gradients there, needs from the layers below nothing but their
output, which never changes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from finetrace.arithmetic import settings_of
from finetrace.modes import evaluating

CAPACITY = 1 << 30  # bytes of hidden states that are kept for one prefix
STORES = 2  # prefixes that a process remembers, those of training and of collection
TRIAL = 64  # tokens, spread over the vocabulary
TOLERANCE = 1e-3  # of the largest logit: the same kernels ran on the same numbers, so it is far below


class Prefix:
    """What the layers below `first` make of the texts that pass.

    Attributes:
        model: A causal language model.
        layers: Its transformer layers, in order.
        first: The lowest layer that is computed again; at least 1.
        singly: Every example passes by itself the first time, so that its states do not hang on its batch and batches may
            change from epoch to epoch. Otherwise a batch passes as it is, and the same batch is found again.
        states: (T, d) by example or (B, T, d) by batch, on the CPU.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], first: int, singly: bool, states: dict[bytes, Tensor]
    ) -> None:
        self.model = model
        self.layers = layers
        self.first = first
        self.singly = singly
        self.states = states
        self._tuples = False  # whether a layer returns a tuple

    @contextmanager
    def sparing(self, ids: Tensor, lengths: Sequence[int], mask: Tensor | None = None) -> Iterator[None]:
        """While open, a pass over the batch starts above the prefix, or leaves the prefix's states to start from.

        Args:
            ids: (B, T) padded on the right.
            lengths: Tokens of each example.
            mask: (B, T) 0 where an example was padded on its left.
        """
        if self.singly:
            found = [self._one(ids, length, mask, row) for row, length in enumerate(lengths)]
            hidden = found[0].new_zeros(*ids.shape, found[0].shape[-1])  # no real token ever sees the padding
            for row, state in enumerate(found):
                hidden[row, : len(state)] = state
            with self.starting(hidden.to(ids.device)):
                yield
            return
        key = _key(ids, mask)
        if key in self.states:
            with self.starting(self.states[key].to(ids.device)):
                yield
            return
        with self.watching(lambda hidden: self._keep(key, hidden.cpu())):
            yield

    def remembered(self, key: bytes, compute: Callable[[], Tensor]) -> Tensor:
        """The states of a batch that are known by `key`; `compute` makes them the first time. Threads may ask at once."""
        known = self.states.get(key)
        if known is not None:
            return known
        made = compute()
        self._keep(key, made)
        return made

    def _one(self, ids: Tensor, length: int, mask: Tensor | None, row: int) -> Tensor:
        """(T, d) of one example, computed now unless it is there."""
        alone, seen = ids[row : row + 1, :length], None if mask is None else mask[row : row + 1, :length]
        key = _key(alone, seen)
        if key not in self.states:

            def stop(hidden: Tensor) -> None:
                self.states[key] = hidden[0].cpu()
                raise _EnoughError

            options = {} if seen is None else {"attention_mask": seen}
            try:
                with self.watching(stop), torch.no_grad():
                    self.model(input_ids=alone, use_cache=False, **options)
            except _EnoughError:
                pass
        return self.states[key]

    def _keep(self, key: bytes, hidden: Tensor) -> None:
        """Keep a batch; the oldest ones make room for it."""
        with _keeping:
            while self.states and _size(self.states) + hidden.nbytes > CAPACITY:
                del self.states[next(iter(self.states))]
            if hidden.nbytes <= CAPACITY:
                self.states[key] = hidden

    @contextmanager
    def watching(self, heard: Callable[[Tensor], None]) -> Iterator[None]:
        """While open, `heard` gets the hidden states (B, T, d) that enter the layer `first`."""

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard((args[0] if args else kwargs["hidden_states"]).detach())

        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        handles = [
            self.layers[self.first].register_forward_pre_hook(enters, with_kwargs=True),
            self.layers[self.first - 1].register_forward_hook(leaves),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def starting(self, hidden: Tensor) -> Iterator[None]:
        """While open, the layers of the prefix compute nothing and pass `hidden` (B, T, d) on."""

        def passing(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self._tuples else hidden

        own = [(layer, layer.__dict__.get("forward")) for layer in self.layers[: self.first]]  # accelerate sets some
        for layer, _ in own:
            layer.forward = passing
        try:
            yield
        finally:
            for layer, forward in own:
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def sound(self) -> Tensor | None:
        """What enters the layer `first` for a trial text, or `None` where it cannot be kept.

        It cannot where a pass cut short ends elsewhere than a whole one, since layers share more than their hidden states;
        nor where training draws something below the layer, such as dropout.
        """
        training = self.model.training
        entered: list[Tensor] = []
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        device = next(self.model.parameters()).device
        ids = torch.linspace(0, vocabulary - 1, TRIAL, device=device).long()[None]
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), evaluating(self.model):
                with self.watching(entered.append):
                    whole = self.model(input_ids=ids, use_cache=False).logits
                with self.starting(entered[0]):
                    short = self.model(input_ids=ids, use_cache=False).logits
                if training:
                    self.model.train()
                    with self.watching(entered.append):
                        self.model(input_ids=ids, use_cache=False)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # another architecture than these lines know; its passes stay whole
        close = torch.allclose(whole, short, rtol=TOLERANCE, atol=TOLERANCE * float(whole.abs().max()))
        return entered[0] if close and torch.equal(entered[0], entered[-1]) else None


_keeping = threading.Lock()


class _EnoughError(Exception):
    """The pass has come as far as it was wanted."""


_stores: dict[tuple[str, str, int, bool], dict[bytes, Tensor]] = {}


def frozen_prefix(
    model: nn.Module, wanted: Iterable[nn.Parameter], precision: str, *, singly: bool, tokens: int = 0
) -> Prefix | None:
    """The prefix below the lowest layer that holds one of `wanted`, or `None` where there is nothing to spare.

    Args:
        model: A causal language model, with or without an adapter.
        wanted: The parameters whose gradients are taken.
        precision: Of the passes; states are shared by passes of one precision over equal weights.
        singly: See `Prefix`.
        tokens: How many will pass in all; where their states would not fit `CAPACITY`, nothing is kept.
    """
    layers = _layers(model)
    if layers is None:
        return None
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return None  # it computes layers a second time, when no states are at hand
    places = {id(p): i for i, layer in reversed(list(enumerate(layers))) for p in layer.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    above = {id(p) for p in head.parameters()} - {id(p) for p in embedding.parameters()}
    found = [places.get(id(p), 0) for p in wanted if id(p) not in above]
    first = min(found, default=0)
    needed = tokens * embedding.weight.shape[-1] * embedding.weight.element_size()
    if first == 0 or needed > CAPACITY:
        return None
    prefix = Prefix(model, list(layers), first, singly, {})
    entered = prefix.sound()
    if entered is None:
        return None
    decided = _decided(model, list(layers), first, above)
    if decided is None:
        return prefix  # for itself alone
    # beside them, what the layers make of a trial text tells an adapter that is switched off or scaled from one that is not
    trial = xxhash.xxh3_128_hexdigest(entered.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    key = (f"{decided} {trial}", precision, first, singly)
    if key not in _stores and len(_stores) == STORES:
        del _stores[next(iter(_stores))]
    prefix.states = _stores.setdefault(key, {})
    if singly and _size(prefix.states) + needed > CAPACITY:
        prefix.states.clear()
    return prefix


def forget() -> None:
    """Give the memory back."""
    _stores.clear()


def _layers(model: nn.Module) -> nn.ModuleList | None:
    """The one list of as many modules as the model has layers."""
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == depth]
    return lists[0] if len(lists) == 1 else None


def _decided(model: nn.Module, layers: Sequence[nn.Module], first: int, above: set[int]) -> str | None:
    """Of every bit that decides what enters the layer `first`, and of settings that weights do not show.

    `None` where some of it is not in memory. `above`: the head's own parameters.
    """
    upper = above | {id(each) for layer in layers[first:] for each in (*layer.parameters(), *layer.buffers())}
    digest = xxhash.xxh3_128(json.dumps(settings_of(model)).encode())
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in upper:
            continue
        if tensor.is_meta:
            return None
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _size(states: dict[bytes, Tensor]) -> int:
    return sum(each.nbytes for each in states.values())


def _key(ids: Tensor, mask: Tensor | None) -> bytes:
    """The tokens, their shape, and what of them is padding."""
    parts = [str(tuple(ids.shape)).encode(), ids.cpu().numpy().tobytes()]
    return b"|".join(parts if mask is None else [*parts, mask.to(torch.uint8).cpu().numpy().tobytes()])
