"""The journal of an index: what a kill, a full disk or another manifest leaves of it, and how rarely the manifest is written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from finetrace.errors import FinetraceError
from finetrace.index import journal, manifest, notes
from finetrace.index.journal import Journal
from finetrace.index.manifest import Arrival, LeftOutRecord, Manifest, ShardRecord
from finetrace.index.notes import Notes

LINES = ['{"a": 1}', "", "\u00e9 " * 40, '{"b": 2}']


def noted(path: Path, base: bytes = b"base") -> bytes:
    kept = Journal(path, base)
    for line in LINES:
        kept.add(line)
    return path.read_bytes()


def test_lines_come_back_and_go_on_where_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert journal.read(path, b"base") == []
    noted(path)
    assert journal.read(path, b"base") == LINES
    again = Journal(path, b"base")
    assert again.lines == 4
    again.add("more")
    assert journal.read(path, b"base") == [*LINES, "more"]
    assert [each.name for each in tmp_path.iterdir()] == ["j"]


def test_cut_anywhere_it_has_the_lines_that_were_whole(tmp_path: Path) -> None:
    path = tmp_path / "j"
    content = noted(path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        found = journal.read(path, b"base")
        assert found == LINES[: len(found)]
        assert len(found) == max(0, content[:end].count(b"\n") - 1)
    first, second = (content.index(b"\n", at) for at in (0, content.index(b"\n") + 1))
    damaged = {
        content[:-3]: LINES[:3],
        content[:1]: [],
        b"": [],
        content[:-3] + b"\0\0\0\n": LINES[:3],
        content[: first + 5] + b"?" + content[first + 6 :]: LINES[1:],
        content[: second - 2] + b"?" + content[second - 1 :]: LINES[1:],
        content[:5] + b"?" + content[6:]: [],
    }
    assert len(damaged) == 7
    for cut, kept in damaged.items():
        path.write_bytes(cut)
        assert journal.read(path, b"base") == kept
        Journal(path, b"base").add("next")
        assert journal.read(path, b"base") == [*kept, "next"]


def test_that_of_another_file_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    noted(path, b"before")
    assert journal.read(path, b"after") == []
    Journal(path, b"after").add("x")
    assert journal.read(path, b"after") == ["x"]
    assert journal.read(path, b"before") == []


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    kept = Journal(tmp_path / "j", b"base")
    kept.add("x")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(FinetraceError, match="cannot be written .*No space left.*; free some space"):
            kept.add("y")
    kept.path.write_bytes(kept.path.read_bytes()[:-2])  # of a full disk half a line is left
    kept.add("z")
    assert journal.read(kept.path, b"base") == ["x", "y", "z"]
    kept.path.unlink()
    with pytest.raises(FinetraceError, match="cannot be written"):  # and no file without a head is begun
        kept.add("a")
    kept.path.mkdir()
    with pytest.raises(FinetraceError, match="j: cannot be read .*; mend that, or remove it"):
        journal.read(kept.path, b"base")


@pytest.fixture
def about() -> Manifest:
    """Of 400 rows, a shard each."""
    prints = {f"{name}_fingerprint": "0" for name in ("base", "adapter", "tokenizer")}
    document = {
        "finetrace": "0",
        "model": {"name": "m", "dtype": "float32", "adapter": None, "layers": 1, **prints},
        "encoding": {"loss_on": "response", "max_length": None, "template": None},
        "data_fingerprint": "0",
        "examples": 400,
        "tokens": 400,
        "feature_dtype": "float32",
        "batch_tokens": 1,
        "rows_per_shard": 1,
        "modules": None,
        "blocks": [],
        "representations": [],
        "skipped": {},
    }
    return Manifest.model_validate_json(json.dumps(document))


def going_on(folder: Path) -> Notes:
    """After all that is there."""
    there = manifest.read(folder)
    return Notes(folder, there, there)


def arrivals(count: int) -> list[Arrival]:
    whole = {"bytes": 5, "sha256": "0"}
    return [
        Arrival(
            shard=ShardRecord(file=f"{i}.safetensors", start=i, stop=i + 1, **whole),  # type: ignore[arg-type]
            left_out=(LeftOutRecord(id=f"e{i}", row=i, reason="bad"),) if i % 7 == 0 else (),
        )
        for i in range(count)
    ]


def test_shards_in_any_order_are_one_manifest_that_is_written_rarely(
    tmp_path: Path, about: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest.write(tmp_path, about)
    written, write = [0], manifest.write

    def counted(folder: Path, what: Manifest) -> None:
        written[0] += 1
        write(folder, what)

    monkeypatch.setattr(notes, "write", counted)
    order = arrivals(400)
    random.Random(0).shuffle(order)
    kept = going_on(tmp_path)
    for place, arrival in enumerate(order, 1):
        kept.add(arrival)
        if place in (1, 63, 64, 65, 66, 200):
            assert manifest.read(tmp_path) == about.having(order[:place])  # what a run that is killed here finds
            kept = going_on(tmp_path)  # and goes on from
    kept.fold()
    found = manifest.read(tmp_path)
    assert [shard.start for shard in found.shards] == list(range(400))
    assert [each.row for each in found.left_out] == list(range(0, 400, 7))
    assert found.complete
    assert 3 <= written[0] <= 6
    assert [path.name for path in tmp_path.iterdir()] == [manifest.NAME]
    assert Manifest.model_validate_json((tmp_path / manifest.NAME).read_text()) == found


def test_however_often_a_run_is_stopped_the_journal_is_no_longer_than_the_manifest(
    tmp_path: Path, about: Manifest
) -> None:
    manifest.write(tmp_path, about)
    kept = going_on(tmp_path)
    for place, arrival in enumerate(arrivals(400)):
        if place % 60 == 0:
            kept = going_on(tmp_path)
        kept.add(arrival)
        lines = len(journal.read(tmp_path / manifest.JOURNAL, (tmp_path / manifest.NAME).read_bytes()))
        whole = len(Manifest.model_validate_json((tmp_path / manifest.NAME).read_text()).shards)
        assert lines <= max(notes.FEWEST, whole)
        assert lines + whole == place + 1


def test_killed_between_manifest_and_journal(tmp_path: Path, about: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the new manifest is there the journal still is; after that it counts for nothing, and goes with the next one."""
    every = arrivals(5)
    for dies in ("write_atomically", "forget_journal"):
        folder = tmp_path / dies
        folder.mkdir()
        manifest.write(folder, about)
        kept = going_on(folder)
        for arrival in every:
            kept.add(arrival)

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(manifest, dies, die)
            with pytest.raises(KeyboardInterrupt):
                manifest.write(folder, about.having(every))
        assert (folder / manifest.JOURNAL).exists()
        assert manifest.read(folder) == about.having(every)
        manifest.fold(folder)
        assert [path.name for path in folder.iterdir()] == [manifest.NAME]
        assert manifest.read(folder) == about.having(every)


def test_who_reads_while_the_journal_goes_into_the_manifest_sees_all_of_it(
    tmp_path: Path, about: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest.write(tmp_path, about)
    kept, every, read = going_on(tmp_path), arrivals(5), journal.read
    for arrival in every:
        kept.add(arrival)

    def late(path: Path, base: bytes) -> list[str]:
        if path.exists():
            manifest.write(tmp_path, about.having(every))
        return read(path, base)

    monkeypatch.setattr(manifest.journal, "read", late)
    assert manifest.read(tmp_path) == about.having(every)


def test_of_two_broken_shards_none_is_noted_while_one_is_mended(tmp_path: Path, about: Manifest) -> None:
    first, second, third = arrivals(3)
    manifest.write(tmp_path, about.having([first, second, third]))
    started = about.having([third]).model_copy(update={"lost": (first.shard, second.shard)})
    kept = Notes(tmp_path, started, manifest.read(tmp_path))
    assert len(manifest.read(tmp_path).shards) == 3
    kept.add(first)
    assert manifest.read(tmp_path).shards == (first.shard, third.shard)
    assert manifest.read(tmp_path).lost == (second.shard,)


def test_a_shard_that_was_broken_is_the_new_one_and_an_old_journal_is_not_heeded(
    tmp_path: Path, about: Manifest
) -> None:
    first, second, third = arrivals(3)
    manifest.write(tmp_path, about)
    kept = going_on(tmp_path)
    for arrival in (first, second):
        kept.add(arrival)
    old = (tmp_path / manifest.JOURNAL).read_bytes()
    kept = Notes(tmp_path, about.having([second]), manifest.read(tmp_path))  # the first was found broken
    mended = Arrival(shard=first.shard.model_copy(update={"sha256": "1"}))
    kept.add(mended)
    assert manifest.read(tmp_path).shards == (mended.shard, second.shard)
    kept.fold()
    assert manifest.read(tmp_path).shards == (mended.shard, second.shard)
    (tmp_path / manifest.JOURNAL).write_bytes(old)  # as if a kill had come before it was removed
    assert manifest.read(tmp_path).shards == (mended.shard, second.shard)
    kept = going_on(tmp_path)
    kept.add(third)
    assert manifest.read(tmp_path).shards == (mended.shard, second.shard, third.shard)
    (tmp_path / manifest.JOURNAL).write_bytes(old)
    going_on(tmp_path).fold()
    assert not (tmp_path / manifest.JOURNAL).exists()
