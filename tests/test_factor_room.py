"""Kronecker factors in the budget of a projection, and factors that are too large to be made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetrace.collection import track
from finetrace.collection.modules import ALL_LINEAR
from finetrace.encoding import Encoder
from finetrace.index import build_index
from finetrace.index.factor_sizes import LARGEST_SIDE, finishing_bytes, held_bytes
from finetrace.index.sizing import Budget, Plan, fit
from finetrace.models import Loaded
from tiny import make_encoded, make_examples, make_llama

ROWS = 12


@pytest.fixture
def whole(tiny_loaded: Loaded) -> Loaded:
    return Loaded(make_llama(tied=True).float(), tiny_loaded.tokenizer, tiny_loaded.spec)


def largest_seen(monkeypatch: pytest.MonkeyPatch, folder: Path, places: Sequence[str]) -> list[int]:
    """Bytes in some folders of an index whenever a file of tensors has been written there."""
    from finetrace import atomic
    from finetrace.index import factors, shards, sums

    seen: list[int] = []

    def weigh() -> None:
        seen.append(sum(p.stat().st_size for name in places for p in (folder / name).rglob("*") if p.is_file()))

    def write(*args: Any, **kwargs: Any) -> None:
        atomic.write_tensors(*args, **kwargs)
        weigh()

    for module in (factors, shards, sums):
        monkeypatch.setattr(module, "write_tensors", write)
    return seen


@pytest.mark.parametrize("labels", ["data", "model"])
def test_what_auto_chooses_fits_the_disk_with_its_factors(
    whole: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Any
) -> None:
    """The gradients alone would fit unprojected."""
    width = track(whole.model, [ALL_LINEAR]).width
    budget = ROWS * 4 * width * 2 + 40_000
    seen = largest_seen(monkeypatch, tmp_path / "i", ("shards", "factors"))
    said: list[str] = []
    index, _ = build_index(
        whole,
        make_examples(ROWS),
        tmp_path / "i",
        Encoder(whole.tokenizer),
        kronecker=labels,
        rows_per_shard=4,
        disk=budget,
        say=said.append,
    )
    assert index.manifest.projection.startswith("two-sided:")
    assert "rows of" in said[1]
    assert "with their Kronecker factors" in said[1]
    assert max(seen) <= budget
    assert sum(p.stat().st_size for p in (tmp_path / "i" / "factors").iterdir()) > 0


def plan(labels: Any = None) -> Plan:
    return Plan(make_encoded([10] * ROWS), 40, 4, 4, 4, labels)


def test_sums_are_in_the_memory_of_a_collection() -> None:
    tracking = track(make_llama(hidden=64, intermediate_size=96), [ALL_LINEAR])
    matrices = [block.matrix for block in tracking.blocks]
    without, with_sums = (plan(labels).memory(tracking, device=True) for labels in (None, "data"))
    assert with_sums - without == held_bytes(matrices, 4)
    assert (plan().finishing(tracking), plan("data").finishing(tracking)) == (0, finishing_bytes(matrices, 4))


def test_memory_that_holds_no_sums_decides() -> None:
    model = make_llama(hidden=64, intermediate_size=96)
    tracking = track(model, [ALL_LINEAR])
    budget = Budget(1 << 40, sum(plan().memory(tracking, device=each) for each in (False, True)), memory_given=True)
    assert fit(model, [ALL_LINEAR], 0, plan(), budget)[0].kind == "none"
    chosen, why = fit(model, [ALL_LINEAR], 0, plan("data"), budget)
    assert chosen.kind == "two-sided"
    assert "of memory, where" in why


def test_a_side_that_cannot_be_decomposed_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * LARGEST_SIDE**2 + 6 * LARGEST_SIDE + 1 < 2**31 < 2 * (LARGEST_SIDE + 1) ** 2 + 6 * LARGEST_SIDE + 7
    monkeypatch.setattr("finetrace.index.factor_sizes.LARGEST_SIDE", 100)
    model = make_llama()
    unlimited = Budget(1 << 40, None)
    assert fit(model, [ALL_LINEAR], 0, plan(), unlimited)[0].kind == "none"
    chosen, why = fit(model, [ALL_LINEAR], 0, plan("data"), unlimited)
    assert chosen.text == "two-sided:96x96"
    assert "Kronecker factors of lm_head.weight would have a side of 260" in why
