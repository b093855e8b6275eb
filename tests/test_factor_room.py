"""Kronecker factors in the budget of a projection, and factors that are too large to be made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from commands import run
from finetrace.collection import Collector, track
from finetrace.collection.factor_sizes import LARGEST_SIDE, factor_bytes, finishing_bytes, held_bytes
from finetrace.collection.layers import ALL_LINEAR
from finetrace.collection.projection import Projection
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import Index, build_index, factors, kronecker_factors, open_index, sums, view
from finetrace.index.sizing import Budget, Plan, fit
from finetrace.models import Loaded
from finetrace.tracing import BEST_WITHOUT_FACTORS, default_method, standard, unasked_method
from tiny import make_encoded, make_examples, make_llama, save_base

ROWS = 12


@pytest.fixture
def whole(tiny_loaded: Loaded) -> Loaded:
    return Loaded(make_llama(tied=True).float(), tiny_loaded.tokenizer, tiny_loaded.spec)


def largest_seen(monkeypatch: pytest.MonkeyPatch, folder: Path, places: Sequence[str]) -> list[int]:
    """Bytes in some folders of an index whenever a file of tensors has been written there."""
    from finetrace import atomic
    from finetrace.index import shards

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


def test_a_matrix_takes_more_memory_while_it_is_drawn() -> None:
    """The head of a large vocabulary, projected: one row's gradients are small beside the matrix."""
    tracking = track(make_llama(vocab_size=30_000), [ALL_LINEAR], Projection("two-sided", 8, 8))
    entries = 8 * 30_000
    rows = ROWS // 3 * (4 * tracking.width)
    assert plan().memory(tracking, device=False) - rows == 8 * entries
    assert plan().memory(tracking, device=True) > 4 * entries


def test_a_side_that_cannot_be_decomposed_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * LARGEST_SIDE**2 + 6 * LARGEST_SIDE + 1 < 2**31 < 2 * (LARGEST_SIDE + 1) ** 2 + 6 * LARGEST_SIDE + 7
    monkeypatch.setattr("finetrace.collection.factor_sizes.LARGEST_SIDE", 100)
    model = make_llama()
    unlimited = Budget(1 << 40, None)
    assert fit(model, [ALL_LINEAR], 0, plan(), unlimited)[0].kind == "none"
    chosen, why = fit(model, [ALL_LINEAR], 0, plan("data"), unlimited)
    assert chosen.text == "two-sided:96x96"
    assert "Kronecker factors of lm_head.weight would have a side of 260" in why


NEITHER = r"do without them \(a method such as exact or gradcos, and no --kronecker\), or build the index with --projection two-sided"


@pytest.fixture
def index(tmp_path: Path, tiny_loaded: Loaded) -> Index:
    """Of an untied head and both layers, without factors."""
    loaded = Loaded(make_llama().float(), tiny_loaded.tokenizer, tiny_loaded.spec)
    return build_index(loaded, make_examples(4), tmp_path / "i", Encoder(loaded.tokenizer), rows_per_shard=2)[0]


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("scarce", ["memory", "disk"])
def test_factors_that_do_not_fit_are_refused_with_their_largest_block(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scarce: str, late: bool
) -> None:
    """As they would be fitted later, and on the way; nothing is written, and with room they are made."""
    name = {"memory": "available_memory", "disk": "free_disk"}[scarce]
    with monkeypatch.context() as patch:
        patch.setattr(f"finetrace.index.factor_room.{name}", lambda *folder: 1_000_000)
        words = rf"lm_head.weight \(260 x 16\), need [\d.]+ MB .*{scarce}, .* 1 MB .*; {NEITHER}"
        with pytest.raises(FinetraceError, match=words):
            if late:
                kronecker_factors(index, "model")
            else:
                options: Any = {"projection": "none", "rows_per_shard": 2, "kronecker": "model"}
                build_index(index.model(), make_examples(4), tmp_path / "j", index.encoder(), **options)
    assert not (tmp_path / "j").exists()
    assert not (index.folder / "factors").exists()
    assert kronecker_factors(index, "model")


def test_finished_factors_and_what_is_there_of_their_sums_need_no_room(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(factors, "finish", lambda *about: None)
        with pytest.raises(FinetraceError):
            kronecker_factors(index, "data")
    summed = sum(path.stat().st_size for path in (index.folder / "factors").rglob("*.safetensors"))
    assert summed > 100_000
    need = sums.disk(index.blocks, 2, 4) + factor_bytes([block.matrix for block in index.blocks], 4)
    monkeypatch.setattr("finetrace.index.factor_room.free_disk", lambda folder: need - summed - 1)
    with pytest.raises(FinetraceError, match=NEITHER):
        kronecker_factors(index, "data")
    monkeypatch.setattr("finetrace.index.factor_room.free_disk", lambda folder: need - summed)
    bases = kronecker_factors(index, "data")
    for name in ("available_memory", "free_disk"):
        monkeypatch.setattr(f"finetrace.index.factor_room.{name}", lambda *folder: 0)
    assert set(kronecker_factors(index, "data")) == set(bases)


def test_a_view_says_that_its_factors_do_not_fit(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetrace.index.factor_room.available_memory", lambda: 1_000_000)
    with pytest.raises(FinetraceError, match=NEITHER):
        view(index, "all", "data")


def test_sums_that_cannot_be_allocated_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    collector = Collector(model, track(model, [ALL_LINEAR]), ())

    def refuse(*about: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 360000000000 bytes")

    monkeypatch.setattr("finetrace.collection.collect.FactorSums", refuse)
    with pytest.raises(
        FinetraceError, match=rf"543 kB of them for lm_head.weight, and do not fit in memory; {NEITHER}"
    ):
        collector.factor_sums("data")


def test_a_large_vocabulary_is_traced_without_factors(tmp_path: Path, capsys: Any) -> None:
    """Its head has a side that cannot be decomposed, so what needs factors is neither the default nor among `all`."""
    save_base(tmp_path / "base", make_llama(vocab_size=LARGEST_SIDE + 1, hidden=8, num_attention_heads=2).float())
    rows = [{"prompt": f"p{i}", "response": f"r {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "i"
    base = [tmp_path / "rows.jsonl", "--model", tmp_path / "base", "--dtype", "float32"]
    assert run(capsys, "index", *base, "--projection", "none", "--out", place)[0] == 0
    index = open_index(place)
    assert default_method(index) == BEST_WITHOUT_FACTORS
    assert unasked_method(index) == "selfinf"
    assert not any("kfac" in spec for spec in standard(index))
    asked = ["trace", "--index", place, "--ask", "p1", "--answer", "r 1"]
    code, _, err = run(capsys, *asked)
    assert code == 0, err
    words = "lm_head.weight (32,767 x 8), need 47.2 GB of memory"
    for arguments in (
        [*asked, "--method", "ekfac"],
        ["index", *base, "--projection", "none", "--kronecker", "data", "--out", tmp_path / "j"],
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert words in err.splitlines()[-1]
        assert "and no side above 32,766 can be decomposed; do without them" in err.splitlines()[-1]
    assert not (tmp_path / "j").exists()
