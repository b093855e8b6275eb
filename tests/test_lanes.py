"""Batches side by side give, bit by bit, what they give one after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from finetrace.collection import Collector, Representation, lanes, track
from finetrace.collection.batch_pass import BatchPass
from finetrace.collection.fused import Fused
from finetrace.collection.lanes import Ahead, Lanes
from finetrace.encoding import Encoder
from finetrace.index import build_index
from finetrace.models import Loaded
from finetrace.planning import measure
from finetrace.planning.cost import Shape
from finetrace.planning.counts import Piece, pieces_of
from finetrace.planning.rounds import Rounds
from fused_models import ITEMS, MODELS
from tiny import make_encoded, make_examples, make_llama, names, with_lora

BUDGET = 60  # tokens, so that the rows of the tests make eight batches


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Three threads of torch, of which each lane gets one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def one_lane() -> None:
    """One batch after another, with as many threads as each has in a lane."""
    torch.set_num_threads(1)


def collected(model: Any, modules: Any, dtype: torch.dtype, labels: Any = None, **options: Any) -> dict[str, Tensor]:
    items = ITEMS["a common opening"]
    collector = Collector(model.to(dtype), track(model, modules), (Representation(-1),), BUDGET, fused=True)
    sums = collector.factor_sums(labels) if labels else None
    found = collector.collect(items, names(items), factors=sums, **options)
    values = {"gradients": found.gradients, "losses": found.losses, **found.representations}
    if sums is not None:
        values |= {f"left {name}": each for name, each in sums.left.items()}
        values |= {f"right {name}": each for name, each in sums.right.items()}
        values |= {f"tokens {name}": torch.tensor(each) for name, each in sums.tokens.items()}
    if found.sampled is not None:
        values["sampled"] = found.sampled
    return values | {"halved": torch.tensor(found.halved)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", ["model", "data", None])
@pytest.mark.parametrize("name", MODELS)
def test_no_bit_changes(name: str, labels: Any, dtype: torch.dtype) -> None:
    """Gradients, losses, hidden states and factors; in one model, with layers below the lowest tracked one, states are kept."""
    model, modules = MODELS[name]()
    beside = collected(model, modules, dtype, labels)
    assert torch.get_num_threads() == 3
    one_lane()
    assert same(beside, collected(model, modules, dtype, labels))


def test_batches_are_under_way_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the first three passes waits until the two others have begun, which one after another they never would."""
    meeting, calls = threading.Barrier(3, timeout=60), [0]
    run = Fused.run

    def waiting(self: Fused, *given: Any) -> Any:
        calls[0] += 1
        assert torch.get_num_threads() == 1
        if calls[0] <= 3:
            meeting.wait()
        return run(self, *given)

    monkeypatch.setattr(Fused, "run", waiting)
    assert collected(*MODELS["lora"](), torch.float32)["gradients"].isfinite().all()


@pytest.mark.parametrize("always", [False, True])
def test_memory_that_does_not_suffice_for_several(always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others a batch is out of memory: it is tried by itself, and halved only if it does not fit there either."""
    model, modules = MODELS["lora"]()
    one_lane()
    whole = collected(model, modules, torch.float64, "model")
    torch.set_num_threads(3)
    run, under_way, failed = Fused.run, [0], [0]

    def short(self: Fused, recorder: Any, batch: Any, *given: Any) -> Any:
        under_way[0] += 1
        time.sleep(0.01)
        try:
            if (under_way[0] > 1 and not failed[0]) or (always and len(batch) > 1):
                failed[0] += 1
                raise MemoryError
            return run(self, recorder, batch, *given)
        finally:
            under_way[0] -= 1

    monkeypatch.setattr(Fused, "run", short)
    found = collected(model, modules, torch.float64, "model")
    assert failed[0] > 0
    assert bool(found.pop("halved")) == always
    assert found.keys() == whole.keys() - {"halved"}
    for name, each in found.items():
        assert torch.allclose(each, whole[name], rtol=1e-9, atol=1e-12)  # some with more threads


def test_rows_that_are_left_out_are_in_no_sum() -> None:
    model, modules = MODELS["lora"]()
    gone = {1: "told so", 8: "told so"}
    beside = collected(model, modules, torch.float64, "data", left_out=gone)
    one_lane()
    assert same(beside, collected(model, modules, torch.float64, "data", left_out=gone))
    assert len(beside["losses"]) == len(ITEMS["a common opening"]) - 2


def test_batches_by_hand_come_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which then have all threads; a row among them that is left out has its batch again with all of them, too."""
    model, modules = MODELS["lora"]()
    items = [*ITEMS["a common opening"], *make_encoded([300, 270])]
    seen: list[tuple[bool, int]] = []
    measure = BatchPass.measure

    def noting(self: BatchPass, its: Any, *given: Any) -> Any:
        seen.append((max(len(item.ids) for item in its) <= 256, torch.get_num_threads()))
        return measure(self, its, *given)

    monkeypatch.setattr(BatchPass, "measure", noting)
    collector = Collector(model.float(), track(model, modules), (), BUDGET, fused=True)
    found = collector.collect(items, names(items))
    assert [hand for hand, _ in seen] == sorted((hand for hand, _ in seen), reverse=True)
    assert {threads for hand, threads in seen if hand} == {1}
    assert [threads for hand, threads in seen if not hand] == [3, 3]
    shards = pieces_of(items, 100, BUDGET, collector.side_by_side()[1])
    assert [piece.beside for piece in shards[0]] == [hand for hand, _ in seen]
    seen.clear()
    gone = next(piece.rows[0] for piece in shards[0] if len(piece.rows) > 1)
    again = collector.collect(items, names(items), left_out={gone: "told so"})
    assert {threads for hand, threads in seen if hand} == {1, 3}
    kept = [i for i in range(len(items)) if i != gone]
    assert torch.allclose(again.gradients, found.gradients[kept], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 4, 8])
@pytest.mark.parametrize("batches", range(1, 18))
def test_time_is_that_of_rounds(batches: int, at_once: int) -> None:
    """Batches of a second each with one lane's threads, of a share of it, here a quarter more, with all of them."""
    shard = [Piece((k,), 10, 10, 1) for k in range(batches)]
    rounds = Rounds(at_once)
    together = rounds.together(shard)
    true = -(-together // at_once) + (batches - together) * 1.25 / at_once
    if at_once == 1:
        true = batches
    said = sum(rounds.share(shard, k, 1.25) / at_once for k in range(batches))
    assert said == pytest.approx(true)
    finished = [k // at_once + 1 if k < together else -(-together // at_once) + k + 1 for k in range(batches)]
    for k in range(batches - 1):
        assert not rounds.ends(shard, k) or finished[k + 1] > finished[k]
    assert rounds.ends(shard, batches - 1)


def test_an_error_in_a_lane_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Fused, *given: Any) -> Any:
        raise ValueError("not this one")

    monkeypatch.setattr(Fused, "run", wrong)
    with pytest.raises(ValueError, match="not this one"):
        collected(*MODELS["lora"](), torch.float32)
    assert torch.get_num_threads() == 3
    assert not [each for each in threading.enumerate() if each.name.startswith("collecting")]


def test_an_index_has_the_same_bytes(tiny_loaded: Any, tmp_path: Any) -> None:
    """With factors, and shards of several batches."""
    examples, encoder, bytes_ = make_examples(40), Encoder(tiny_loaded.tokenizer), []
    loaded = Loaded(with_lora(make_llama()).float(), tiny_loaded.tokenizer, tiny_loaded.spec)
    for name in ("beside", "after"):
        if name == "after":
            one_lane()
        options: Any = {"kronecker": "model", "rows_per_shard": 16, "batch_tokens": 100}
        build_index(loaded, examples, tmp_path / name, encoder, **options)
        files = sorted(each for each in (tmp_path / name).rglob("*.safetensors"))
        bytes_.append([(str(each.relative_to(tmp_path / name)), each.read_bytes()) for each in files])
    assert len(bytes_[0]) > 3
    assert bytes_[0] == bytes_[1]


@pytest.mark.parametrize(
    ("batches", "count", "together"), [(7, 2, 6), (8, 2, 8), (1, 2, 0), (3, 4, 3), (2, 4, 0), (6, 4, 4)]
)
def test_a_last_round_that_is_half_empty_has_all_threads(batches: int, count: int, together: int) -> None:
    assert Lanes(count).rounds(batches) == together
    made = [[k] for k in range(batches)]
    heard = []
    with Ahead(lambda lane, batch: batch[0] + 1, made, Lanes(count)) as ahead:
        for batch in made:
            found = ahead.take(batch)
            heard.append(found is not None)
            assert found in (None, batch[0] + 1)
    assert heard == [place < together for place in range(batches)]


@pytest.mark.parametrize(
    ("threads", "memory", "cores", "lanes_", "each"),
    [
        (1, None, 1, 1, 1),
        (2, None, 2, 2, 1),
        (16, None, 16, 8, 2),
        (4, 16_000, 4, 4, 1),
        (4, 8_000, 4, 2, 2),
        (4, 8_000, 8, 1, 4),  # the other half of the memory is another process's
        (4, 100, 4, 1, 4),
    ],
)
def test_as_many_as_there_are_threads_and_memory_for(
    threads: int, memory: int | None, cores: int, lanes_: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "total_memory", lambda: memory)
    monkeypatch.setattr(lanes, "cores", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert Lanes.of(1000) == Lanes(lanes_, each)


def test_a_batch_that_is_measured_has_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will have in the index, and its share of the time they take together."""
    model = with_lora(make_llama()).float()
    collector, items = Collector(model, track(model), (), BUDGET), ITEMS["a common opening"]
    piece = pieces_of(items, 100, BUDGET)[0][0]
    run, calls = Fused.run, [0]

    def slow(self: Fused, *given: Any) -> Any:
        calls[0] += 1
        time.sleep(0.3)
        return run(self, *given)

    monkeypatch.setattr(Fused, "run", slow)
    shape = Shape.of(model, collector.tracking)
    beside = measure.run(collector, items, piece, shape)
    assert calls == [collector.side_by_side()[0]] == [3]
    alone = measure.run(collector, items, piece, shape, alone=True)
    assert calls == [4]
    assert beside.seconds < 0.25 < 0.3 <= alone.seconds
    assert (beside.operations, beside.tokens) == (alone.operations, alone.tokens)
