"""A shard is written, and noted, while the next one is collected."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from finetrace.collection import Collector
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import build_index, manifest, shards
from finetrace.models import Loaded
from tiny import make_examples

OPTIONS: dict[str, Any] = {"rows_per_shard": 4}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing the first shard ends only once this is set, which the second one does as it begins."""
    begun, write, collect = threading.Event(), shards.write, Collector.collect

    def waiting(folder: Path, features: Any, start: int, *given: Any) -> Any:
        assert start > 0 or begun.wait(60)
        return write(folder, features, start, *given)

    def telling(self: Collector, items: Any, ids: Any, *given: Any, first: int = 0, **options: Any) -> Any:
        if first == 4:
            begun.set()
        return collect(self, items, ids, *given, first=first, **options)

    monkeypatch.setattr(shards, "write", waiting)
    monkeypatch.setattr(Collector, "collect", telling)
    return begun


def test_nothing_waits_for_the_disk(tiny_loaded: Loaded, tmp_path: Path, second: threading.Event) -> None:
    build_index(tiny_loaded, make_examples(10), tmp_path / "i", Encoder(tiny_loaded.tokenizer), **OPTIONS)
    assert [shard.start for shard in manifest.read(tmp_path / "i").shards] == [0, 4, 8]


def test_what_stops_the_next_shard_does_not_lose_this_one(
    tiny_loaded: Loaded, tmp_path: Path, second: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = Collector.collect

    def stopping(self: Collector, *given: Any, first: int = 0, **options: Any) -> Any:
        found = collect(self, *given, first=first, **options)
        if first == 4:
            raise FinetraceError("row 5 is bad")
        return found

    monkeypatch.setattr(Collector, "collect", stopping)
    with pytest.raises(FinetraceError, match="row 5 is bad"):
        build_index(tiny_loaded, make_examples(10), tmp_path / "i", Encoder(tiny_loaded.tokenizer), **OPTIONS)
    assert [shard.start for shard in manifest.read(tmp_path / "i").shards] == [0]


@pytest.mark.parametrize("start", [0, 8])
def test_a_shard_that_cannot_be_written_ends_the_work(
    tiny_loaded: Loaded, tmp_path: Path, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, and the last one, with which no other is under way; shards that are whole stay."""
    write = shards.write

    def failing(folder: Path, features: Any, its: int, *given: Any) -> Any:
        if its == start:
            raise FinetraceError("the disk is full")
        return write(folder, features, its, *given)

    with monkeypatch.context() as patch, pytest.raises(FinetraceError, match="the disk is full"):
        patch.setattr(shards, "write", failing)
        build_index(tiny_loaded, make_examples(10), tmp_path / "i", Encoder(tiny_loaded.tokenizer), **OPTIONS)
    assert [shard.start for shard in manifest.read(tmp_path / "i").shards] == list(range(0, start, 4))
    build_index(tiny_loaded, make_examples(10), tmp_path / "i", Encoder(tiny_loaded.tokenizer), **OPTIONS)
    assert [shard.start for shard in manifest.read(tmp_path / "i").shards] == [0, 4, 8]
