"""Memory that the pass by hand lends by name: nothing is read before it is written, or after it was lent again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from finetrace.collection import Collector, Representation, track
from finetrace.collection.fused_parts import Workspace
from fused_models import ITEMS, MODELS
from tiny import names


def of_nan(self: Workspace, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that nothing else has."""
    return torch.full(tuple(shape), torch.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", ["model", "data"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_that_is_lent_changes_no_bit(
    name: str, labels: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what memory gives that is fresh every time and full of NaN."""
    model, modules = MODELS[name]()
    model, items, found = model.to(dtype), ITEMS["a common opening"], []
    for lent in (True, False):
        if not lent:
            monkeypatch.setattr(Workspace, "take", of_nan)
        collector = Collector(model, track(model, modules), (Representation(-2),), 120, fused=True)
        sums = collector.factor_sums(labels)
        each = collector.collect(items, names(items), factors=sums)
        values = [
            each.gradients,
            each.losses,
            *each.representations.values(),
            *sums.left.values(),
            *sums.right.values(),
        ]
        found.append([*values, each.sampled] if labels == "model" else values)
    assert all(each.isfinite().all() for each in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_of_a_name_is_lent_again() -> None:
    workspace = Workspace()
    first = workspace.take("a", (2, 3), torch.float32).fill_(1)
    assert workspace.take("a", (2, 3), torch.float32) is first
    other = workspace.take("b", (2, 3), torch.float32).fill_(2)
    assert torch.equal(workspace.take("a", (3, 1), torch.float32), torch.ones(3, 1))  # the same memory in another shape
    larger = workspace.take("a", (5, 2), torch.float32).fill_(3)
    assert workspace.take("a", (2, 3), torch.float32).data_ptr() == larger.data_ptr()
    narrow = workspace.take("a", (2, 3), torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (2, 3)
    assert torch.equal(other, torch.full((2, 3), 2.0))
    wide = workspace.take("wide", (1 << 21,), torch.float32)
    assert (
        workspace.take("wide", ((5 << 21) // 4,), torch.float32).data_ptr() == wide.data_ptr()
    )  # a little more fits, too
    assert wide.fill_(3).sum() == 3 << 21
    workspace.clear()
    assert workspace.take("b", (2, 3), torch.float32) is not other
