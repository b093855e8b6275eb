"""The collection pass: batches in, gradients, representations and losses out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from finetrace.batching import batches
from finetrace.collection.batch_pass import BatchPass, Measured
from finetrace.collection.factor_sizes import WITHOUT, both_sides, largest
from finetrace.collection.factors import FactorSums, Labels
from finetrace.collection.faults import halves, not_finite, unless_out_of_memory
from finetrace.collection.features import Features, Gathering
from finetrace.collection.fused import Fused
from finetrace.collection.fused_parts import Workspace
from finetrace.collection.hooks import GradientRecorder
from finetrace.collection.lanes import Ahead, Lanes
from finetrace.collection.modules import Tracking
from finetrace.collection.precision import HALF, wide_prefix, wide_residual
from finetrace.collection.representations import FINAL, Representation
from finetrace.collection.unseen import Looked
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.prefix import Prefix
from finetrace.reproducible import reproducible
from finetrace.rotary import batch_tokens_within
from finetrace.units import size

BY_HAND = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Collector:
    """One forward and one backward pass over encoded examples.

    Attributes:
        model: The model, on its device.
        tracking: The layers whose gradients are wanted.
        representations: The hidden states wanted.
        batch_tokens: Padded tokens a batch holds at most; a longer example travels alone.
        fused: Compute plain Llamas by hand in place of autograd (see `fused`), where that is possible; `None` does so in
            bfloat16 and float32, and leaves float64 to autograd.
    """

    model: nn.Module
    tracking: Tracking
    representations: tuple[Representation, ...] = FINAL
    batch_tokens: int = 2048
    fused: bool | None = None
    _workspaces: list[Workspace] = field(default_factory=list, init=False, repr=False, compare=False)
    _looked: Looked = field(default_factory=Looked, init=False, repr=False, compare=False)

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
        first: int = 0,
        left_out: Mapping[int, str] = {},
        skip_bad: bool = False,
        made: Sequence[list[int]] | None = None,
    ) -> Features:
        """Features of `items`, in their order, on the CPU; `on_batch` hears how many rows each batch finished.

        A batch for which memory does not suffice is halved and tried again, down to one row. A row whose loss, gradient or
        hidden state is not finite is looked at once more by itself, so that its neighbours' padding is not taken for it.

        Args:
            items: Examples with a response.
            ids: Their ids, for messages and for the labels that are drawn.
            on_batch: Hears of rows that are done.
            factors: Are added to: with the data's labels at no extra pass, with the model's own in a second backward pass.
            first: The row of the data that `items` begin with, for messages.
            left_out: Positions in `items` that are left out whatever their values, with the reason.
            skip_bad: Leave out a row that is not finite, and note it in `Features.left_out`, in place of stopping.
            made: Positions in `items` of the batches, where they are not to be made by length.

        Raises:
            FinetraceError: There is no item, a row is not finite, or does not fit in memory by itself; the row is named.
        """
        if not items:
            raise FinetraceError("there is no example to take gradients of; give at least one with a response.")
        gathered = self._room(len(items), factors is not None and factors.labels == "model")
        fused = self._fused()
        lanes = self._lanes(fused)
        prefix = self._prefix()
        made = batches(items, batch_tokens_within(self.model, items, self.batch_tokens, ids)) if made is None else made
        fits = self.fits_hand(fused)
        made = sorted(made, key=lambda chosen: not fits([items[i] for i in chosen]))  # those side by side come first
        todo = deque(made)
        with (
            reproducible(next(self.model.parameters()).device),
            GradientRecorder(self.model, self.tracking, self.dtype, self._looked) as recorder,
            wide_residual(self.model) as narrowing,
        ):
            self._workspaces.extend(Workspace() for _ in range(len(self._workspaces), lanes.count))
            fused = fused.within(self._workspaces[0]) if fused is not None else None
            one = BatchPass(self.model, self.representations, self.dtype, recorder, narrowing, prefix, fused)
            passes = [one, *(one.beside(self._workspaces[lane]) for lane in range(1, lanes.count))]

            def measure(lane: int, chosen: list[int]) -> Measured | None:
                rows, names = [items[i] for i in chosen], [ids[i] for i in chosen]
                return unless_out_of_memory(partial(passes[lane].measure, rows, names, factors), passes[lane].forget)

            def alone(chosen: list[int]) -> Measured | None:
                found = measure(0, chosen)
                if found is None and len(passes) > 1:
                    for other in passes[1:]:
                        other.clear()
                    found = measure(0, chosen)
                return found

            by_hand = [each for each in made if fits([items[i] for i in each])]
            with Ahead(measure, by_hand, lanes) as ahead:
                while todo:
                    chosen = todo.popleft()
                    measured = ahead.take(chosen) or alone(chosen)
                    if measured is None:
                        if len(chosen) == 1:
                            raise FinetraceError(_too_large(ids[chosen[0]], first + chosen[0], items[chosen[0]]))
                        todo.extendleft(reversed(halves(chosen)))
                        gathered.halved += 1
                        continue
                    found = measured.features
                    gathered.put(chosen, found)
                    bad = {chosen[row]: reason for row, reason in not_finite(found).items()}
                    known = {i: left_out[i] for i in chosen if i in left_out}
                    if len(chosen) == 1 and bad and not known:
                        if not skip_bad:
                            raise FinetraceError(_not_finite(ids[chosen[0]], first + chosen[0], bad[chosen[0]]))
                        known = bad
                    gathered.left_out |= known
                    if known:
                        on_batch(len(known))
                    if bad or known:
                        rest = [i for i in chosen if i not in bad and i not in known]
                        todo.extendleft([i] for i in reversed(chosen) if i in bad and i not in known)
                        todo.extendleft([rest] if rest else [])
                        continue
                    if measured.sums is not None:
                        measured.sums.commit()
                    on_batch(len(chosen))
        return gathered.features()

    def side_by_side(self) -> tuple[int, Callable[[Sequence[Encoded]], bool]]:
        """How many batches are collected side by side, and which; the others go after them, by themselves."""
        fused = self._fused()
        return self._lanes(fused).count, self.fits_hand(fused)

    @staticmethod
    def fits_hand(fused: Fused | None) -> Callable[[Sequence[Encoded]], bool]:
        """Whether a batch is computed by hand."""
        return (lambda items: False) if fused is None else fused.fits

    def _lanes(self, fused: Fused | None) -> Lanes:
        """With or without Kronecker factors, which each batch adds to by itself: equal shards are to have equal bits."""
        if fused is None:
            return Lanes(1, torch.get_num_threads())
        sums = both_sides([block.matrix for block in self.tracking.blocks]) * self.dtype.itemsize
        return Lanes.of(fused.batch_bytes(self.batch_tokens) + sums)

    def release(self) -> None:
        """Give back the memory that one call of `collect` leaves to the next."""
        self._workspaces.clear()

    def factor_sums(self, labels: Labels) -> FactorSums:
        """Empty sums for `collect` to add to.

        Raises:
            FinetraceError: They do not fit in memory; the largest block is named.
        """
        device = next(self.model.parameters()).device
        found = unless_out_of_memory(partial(FactorSums, self.tracking, labels, self.dtype, device))
        if found is None:
            raise FinetraceError(_no_room_for_sums(self.tracking, self.dtype))
        return found

    def _room(self, count: int, sampled: bool) -> Gathering:
        room = unless_out_of_memory(partial(Gathering, count, self.tracking.width, self.dtype, sampled))
        if room is None:
            taken = count * self.tracking.width * torch.finfo(self.dtype).bits / 8e9
            raise FinetraceError(
                f"{count} rows of {self.tracking.width:,} gradient entries ({taken:.2f} GB) do not fit in memory; track fewer "
                "layers with --modules, or use a machine with more memory."
            )
        return room

    def _fused(self) -> Fused | None:
        if self.fused or (self.fused is None and next(self.model.parameters()).dtype in BY_HAND):
            return Fused.of(self.model, self.tracking)
        return None

    def _prefix(self) -> Prefix | None:
        """What lies below the lowest tracked layer: another loss of the same batches starts above it.

        `None` where hidden states of the layers are wanted, which takes whole passes.
        """
        if {each.place for each in self.representations} - {-1}:
            return None
        wanted = [parameter for layer in self.tracking.layers for parameter in layer.module.parameters()]
        return wide_prefix(self.model, wanted)


def features_dtype(model: nn.Module) -> torch.dtype:
    """Dtype in which a model's gradients are computed: float32 in half precision, else the model's own."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.float32 if dtype in HALF else dtype


def _not_finite(name: str, row: int, reason: str) -> str:
    return (
        f"example {name} (row {row + 1}): {reason}; look at the row, use --dtype float32 if the model runs in half "
        "precision, or leave such rows out where the index is built: finetrace index --skip-bad."
    )


def _no_room_for_sums(tracking: Tracking, dtype: torch.dtype) -> str:
    most = largest(tracking.blocks)
    whole, its = (dtype.itemsize * both_sides([b.matrix for b in blocks]) for blocks in (tracking.blocks, [most]))
    return (
        f"the sums for Kronecker factors take {size(whole)}, {size(its)} of them for {most.name}, and do not fit in memory; "
        f"{WITHOUT}"
    )


def _too_large(name: str, row: int, item: Encoded) -> str:
    return (
        f"example {name} (row {row + 1}): its {len(item.ids)} tokens do not fit in memory, even by themselves; cut it with "
        "--max-length, remove it, or use a machine with more memory."
    )
