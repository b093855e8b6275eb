"""Sums for Kronecker factors, folded while an index is collected: the same bytes, every shard once, little on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import killed
from finetrace.atomic import part_of, remove_part
from finetrace.collection import Block, Collector, track
from finetrace.collection.factors import FactorSums, Labels
from finetrace.collection.modules import Tracking
from finetrace.curvature import KroneckerBasis
from finetrace.curvature import kronecker as curvature
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import append, build_index, factors, kronecker_factors, manifest, open_index, sums
from finetrace.index.manifest import BlockRecord, Manifest, ShardRecord
from finetrace.models import Loaded, ModelSpec, load
from test_index import files, stopped
from tiny import make_examples

BLOCKS = (Block("a", (2, 3), 0), Block("b", (3, 3), 6), Block("c", (4,), 15))
ENTRIES = 2**2 + 3**2 + 3**2 + 3**2 + 4**2 + 1
WORDS = {"dtype": "float32", "adapter": None, "base_fingerprint": "b", "adapter_fingerprint": None}


def described(count: int, dtype: str = "float32") -> Manifest:
    """An index of `count` shards of two rows, of which nothing but the manifest is there."""
    records = tuple(
        ShardRecord(
            file=f"{2 * i:09d}.safetensors",
            start=2 * i,
            stop=2 * i + 2,
            bytes=1,
            sha256=hashlib.sha256(str(i).encode()).hexdigest(),
        )
        for i in range(count)
    )
    return Manifest(
        finetrace="0",
        model={"name": "m", "tokenizer_fingerprint": "t", "layers": 1, **WORDS, "dtype": dtype},  # type: ignore[arg-type]
        encoding={"loss_on": "response", "max_length": None, "template": None},  # type: ignore[arg-type]
        data_fingerprint="d",
        examples=2 * count,
        tokens=10,
        feature_dtype=dtype,
        batch_tokens=64,
        rows_per_shard=2,
        modules=None,
        blocks=tuple(map(BlockRecord.of, BLOCKS)),
        representations=(),
        skipped={},
        shards=records,
    )


def drawn(shard: ShardRecord, about: Manifest, labels: Labels = "data") -> FactorSums:
    """Sums of one shard, of numbers whose order in a sum can be told from its last bits."""
    found = FactorSums(Tracking((), BLOCKS, {}), labels, about.computed_dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(shard.start)
    for side in (found.left, found.right):
        for value in side.values():
            value += torch.randn(value.shape, generator=generator, dtype=value.dtype).exp()
    found.tokens = {block.name: shard.start + k for k, block in enumerate(BLOCKS)}
    return found


def in_order(about: Manifest, name: str) -> Tensor:
    """One side of a block, added shard after shard in float64."""
    side, _, block = name.partition(".")
    parts = [getattr(drawn(shard, about), side)[block] for shard in about.shards]
    total = torch.zeros(parts[0].shape, dtype=torch.float64)
    for part in parts:
        total += part
    return total


def assert_all_once(folder: Path, about: Manifest) -> sums.Running:
    """What lies there now, running file and parts, is the sum over all shards bit by bit."""
    running = sums.Running(folder, about, "data")
    assert running.agrees(about.shards)
    with running.opened(about.shards[running.count :]) as there:
        for block in BLOCKS:
            for side, size in zip(("left", "right"), block.matrix, strict=True):
                name = f"{side}.{block.name}"
                assert torch.equal(sums.total(there, name, size), in_order(about, name)), name
        count = len(about.shards)
        assert sums.tokens(there).tolist() == [count * (count - 1) + k * count for k in range(len(BLOCKS))]
    return running


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in sums.place(folder, "data").glob("part-*"))


@pytest.mark.parametrize(("dtype", "together"), [("float32", 2), ("float64", 1)])
def test_parts_in_turn_fold_and_early_ones_wait(tmp_path: Path, dtype: str, together: int) -> None:
    about = described(7, dtype)
    assert sums.together(about.computed_dtype.itemsize) == together
    running = sums.Running(tmp_path, about, "data")
    for place in (3, 1, 2):
        sums.write_part(tmp_path, drawn(about.shards[place], about), None, about.shards[place], about)
        running.arrived(about.shards[place])
        assert running.count == 0
    assert len(parts(tmp_path)) == 3
    sums.write_part(tmp_path, drawn(about.shards[0], about), None, about.shards[0], about)
    running.arrived(about.shards[0])  # the gap is closed
    assert (running.count, running.end, parts(tmp_path)) == (4, 8, [])
    for place in (4, 5, 6):
        sums.write_part(tmp_path, drawn(about.shards[place], about), None, about.shards[place], about)
        running.arrived(about.shards[place])
        assert len(parts(tmp_path)) < together
    again = assert_all_once(tmp_path, about)
    assert again.count == 7 - len(parts(tmp_path))
    assert load_file(str(again.path))["left.a"].dtype == torch.float64


def folding(folder: str, count: int) -> None:
    """What the coordinator does with parts that are there."""
    about = described(count)
    running = sums.Running(Path(folder), about, "data")
    for shard in about.shards:
        running.arrived(shard)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes are forked")
def test_killed_at_every_step_of_a_fold_every_shard_counts_once(tmp_path: Path) -> None:
    about = described(5)
    for shard in about.shards:
        sums.write_part(tmp_path / "whole", drawn(shard, about), None, shard, about)
    shutil.copytree(tmp_path / "whole", tmp_path / "kept")
    finished, steps, _ = killed.run(folding, tmp_path / "whole", count=5)
    assert finished
    assert assert_all_once(tmp_path / "whole", about).count == 4
    assert steps > 8
    expected = files(tmp_path / "whole")
    for step in range(steps):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "kept", folder)
        assert not killed.run(folding, folder, die_at=step, count=5)[0]
        assert_all_once(folder, about)
        for left in sums.place(folder, "data").glob(part_of("*", "*")):
            remove_part(left)  # as `sweep` does
        folding(str(folder), 5)
        assert files(folder) == expected, f"killed before step {step}"


def test_parts_and_running_sums_of_other_shards_are_not_taken(tmp_path: Path) -> None:
    about = described(4)
    for shard in about.shards:
        sums.write_part(tmp_path, drawn(shard, about), None, shard, about)
    running = sums.Running(tmp_path, about, "data")
    for shard in about.shards[:3]:
        running.arrived(shard)
    assert running.count == 2
    assert all(running.has(shard.start, 2, shard) for shard in about.shards)
    other = [changed(shard) for shard in about.shards]
    assert not running.has(4, 2, other[2])  # a part
    assert running.agrees(about.shards)
    assert running.agrees(about.shards[1:])  # nobody can say yet
    assert not running.agrees([other[0], *about.shards[1:]])
    assert not running.agrees([about.shards[1], about.shards[0], *about.shards[2:]])
    running.path.write_bytes(running.path.read_bytes()[:20])
    assert sums.Running(tmp_path, about, "data").count == 0
    assert not running.path.exists()


def changed(shard: ShardRecord) -> ShardRecord:
    return shard.model_copy(update={"sha256": "0" * 64})


def test_sums_of_older_formats_go(tmp_path: Path) -> None:
    old = tmp_path / "factors" / "data.parts-2"
    old.mkdir(parents=True)
    (old / "000000000.safetensors").write_bytes(b"x")
    other = tmp_path / "factors" / "model.parts-3"
    other.mkdir()
    sums.Running(tmp_path, described(1), "data")
    assert not old.exists()
    assert other.exists()


@pytest.mark.parametrize("entry", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_disk_that_is_said_is_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: int, count: int
) -> None:
    """At its most, which is while a fold has both running files and the parts; headers are not counted."""
    about = described(count, {4: "float32", 8: "float64"}[entry])
    seen = []
    stream = sums._stream

    def weigh() -> None:
        held = [load_file(str(path)) for path in sums.place(tmp_path, "data").glob("*.safetensors")]
        held += [load_file(str(path)) for path in sums.place(tmp_path, "data").glob(".*.part")]
        seen.append(sum(value.nbytes for each in held for name, value in each.items() if name != "tokens"))

    def weighed(path: Path, *rest: Any) -> None:
        stream(path, *rest)
        weigh()

    monkeypatch.setattr(sums, "_stream", weighed)
    running = sums.Running(tmp_path, about, "data")
    for shard in about.shards:
        sums.write_part(tmp_path, drawn(shard, about), None, shard, about)
        weigh()
        running.arrived(shard)
    assert max(seen) == sums.disk(BLOCKS, count, entry)
    assert sums.written(BLOCKS, 9, entry) == (entry + {4: 4, 8: 8}[entry]) * ENTRIES
    assert sums.disk(BLOCKS, 10**6, entry) == sums.disk(BLOCKS, 9, entry)
    assert sums.disk(BLOCKS, 9, entry, 4) == sums.disk(BLOCKS, 9, entry) + 3 * entry * ENTRIES


@pytest.fixture
def single(base_folder: Path, adapter_folder: Path) -> Loaded:
    return load(ModelSpec(str(base_folder), str(adapter_folder), dtype="float32", device="cpu"))


@pytest.mark.parametrize("labels", ["model", "data"])
def test_factors_are_those_of_sums_that_were_never_folded(
    single: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Labels
) -> None:
    """Bit by bit, and layers that share an input are decomposed once."""
    calls: list[int] = []
    eigen = curvature.eigen
    monkeypatch.setattr(factors, "eigen", lambda total, tokens: (calls.append(len(total)), eigen(total, tokens))[1])
    examples = make_examples(11)
    encoder = Encoder(single.tokenizer)
    index, _ = build_index(single, examples, tmp_path / "i", encoder, rows_per_shard=2, kronecker=labels)
    monkeypatch.undo()
    collector = Collector(single.model, track(single.model), (), index.manifest.batch_tokens)
    encoded = encoder.encode_all(examples)[0]
    totals, rows = [], []
    for start, stop in index.manifest.borders():
        found = collector.factor_sums(labels)
        ids = [example.id for example in examples[start:stop]]
        features = collector.collect(encoded[start:stop], ids, factors=found, first=start)
        totals.append(found)
        rows.append(features.gradients if labels == "data" else features.sampled)
    about = json.loads((tmp_path / "i" / "factors" / f"{labels}.json").read_text())
    there = load_file(str(factors.path(tmp_path / "i", labels)))
    distinct = set()
    for i, (block, record) in enumerate(zip(index.blocks, about["blocks"], strict=True)):
        sides = []
        for side in ("left", "right"):
            total = torch.zeros_like(getattr(totals[0], side)[block.name], dtype=torch.float64)
            for each in totals:
                total += getattr(each, side)[block.name]
            sides.append(total)
            distinct.add((total.numpy().tobytes(), record["tokens"]))
        tokens = sum(each.tokens[block.name] for each in totals)
        basis = KroneckerBasis.of(sides[0], sides[1], tokens, len(examples))
        squares = torch.zeros_like(basis.kfac)
        for part in rows:
            squares += basis.rotate(part[:, block.columns]).double().square().sum(0)
        assert record["tokens"] == tokens
        assert torch.equal(there[f"kfac.{i}"], basis.kfac)
        assert torch.equal(there[f"ekfac.{i}"], squares / len(examples))
        assert torch.equal(there[record["left"]], basis.left.float())
        assert torch.equal(there[record["right"]], basis.right.float())
    assert len(calls) == len(distinct) < 2 * len(index.blocks)


def counted(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[int, bool]]) -> None:
    """First row of every shard that is collected, and whether its sums are."""
    collect = Collector.collect

    def counting(self: Collector, *args: Any, **options: Any) -> Any:
        seen.append((options["first"], options["factors"] is not None))
        return collect(self, *args, **options)

    monkeypatch.setattr(Collector, "collect", counting)


@pytest.mark.parametrize("labels", ["model", "data"])
def test_a_shard_that_is_lost_after_its_sums_were_folded(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Labels
) -> None:
    """It is collected again, and its sums count once."""
    examples, encoder = make_examples(13), Encoder(tiny_loaded.tokenizer)

    def build(name: str) -> None:
        build_index(tiny_loaded, examples, tmp_path / name, encoder, rows_per_shard=4, kronecker=labels)

    build("whole")
    stopped(monkeypatch, lambda: build("i"), 3)
    running = sums.Running(tmp_path / "i", manifest.read(tmp_path / "i"), labels)
    assert running.count == 3  # float64: each by itself
    (tmp_path / "i" / "shards" / "000000004.safetensors").write_bytes(b"broken")
    seen: list[tuple[int, bool]] = []
    counted(monkeypatch, seen)
    build("i")
    assert seen == [(4, labels == "model"), (12, True)]
    assert files(tmp_path / "i") == files(tmp_path / "whole")


def test_a_shard_that_comes_back_with_other_bytes_makes_all_sums_anew(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, encoder = make_examples(13), Encoder(tiny_loaded.tokenizer)
    said: list[str] = []

    def build() -> None:
        build_index(tiny_loaded, examples, tmp_path / "i", encoder, rows_per_shard=4, kronecker="data", say=said.append)

    stopped(monkeypatch, build, 3)
    (tmp_path / "i" / "shards" / "000000004.safetensors").write_bytes(b"broken")
    collect = Collector.collect

    def otherwise(self: Collector, *args: Any, **options: Any) -> Any:
        found = collect(self, *args, **options)
        if options["first"] == 4 and options["factors"] is None:
            found.gradients.mul_(1 + 1e-12)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", otherwise)
        build()
    assert [text for text in said if "collected again" in text]
    before = files(tmp_path / "i")
    shutil.rmtree(tmp_path / "i" / "factors")
    kronecker_factors(open_index(tmp_path / "i", tiny_loaded), "data")
    assert files(tmp_path / "i") == before


def test_rows_appended_while_sums_were_half_made(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, encoder = make_examples(17), Encoder(tiny_loaded.tokenizer)
    for name in ("whole", "i"):
        build_index(tiny_loaded, examples[:12], tmp_path / name, encoder, rows_per_shard=4)
    stopped(monkeypatch, lambda: kronecker_factors(open_index(tmp_path / "i", tiny_loaded), "model"), 2)
    for name in ("whole", "i"):
        append(open_index(tmp_path / name, tiny_loaded), examples[12:])
    seen: list[tuple[int, bool]] = []
    with monkeypatch.context() as patch:
        counted(patch, seen)
        kronecker_factors(open_index(tmp_path / "i", tiny_loaded), "model")
    assert [start for start, _ in seen] == [8, 12, 16]
    kronecker_factors(open_index(tmp_path / "whole", tiny_loaded), "model")
    assert files(tmp_path / "i") == files(tmp_path / "whole")


def test_a_disk_that_is_full_while_sums_are_folded(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, encoder = make_examples(9), Encoder(tiny_loaded.tokenizer)

    def build(name: str) -> None:
        build_index(tiny_loaded, examples, tmp_path / name, encoder, rows_per_shard=4, kronecker="data")

    def full(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sums, "_stream", full)
        with pytest.raises(FinetraceError, match=r"running.safetensors: cannot be written .*free some space"):
            build("i")
    build("i")
    build("whole")
    assert files(tmp_path / "i") == files(tmp_path / "whole")
