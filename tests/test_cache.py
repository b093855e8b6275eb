"""What an index keeps of its own scoring: found again, never wrong, and not needed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from finetrace.attribution import Problem, make
from finetrace.curvature.passes import Sizes
from finetrace.index import cache as cache_module
from finetrace.index import open_index
from finetrace.index.cache import Cache
from test_streaming import features, index, tiny_queries  # noqa: F401  (fixtures)
from tiny import make_examples

SPECS = (
    "exact:normalise=cosine",
    "exact:scope=joint",
    "exact:solver=primal",
    "datainf:normalise=relatif",
    "ekfac:normalise=cosine,labels=data",
    "gradcos",
    "gradnorm",
)


@pytest.fixture
def copied(index, features, tmp_path):  # noqa: F811
    make("ekfac:labels=data").score(Problem(index, tiny_queries(4), features))  # its factors
    folder = tmp_path / "idx"
    shutil.copytree(index.folder, folder)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return open_index(folder)


def problem(copied, features, **more):  # noqa: F811
    return Problem(copied, tiny_queries(4), features, **{"cache": 1 << 30, **more})


def kept(copied) -> list[Path]:
    return sorted((copied.folder / "cache").glob("*.safetensors"))


@pytest.mark.parametrize("step", [None, 6])
@pytest.mark.parametrize("spec", SPECS)
def test_the_second_query_finds_what_the_first_kept(copied, features, spec, step):  # noqa: F811
    wanted = make(spec).score(problem(copied, features, cache=0, step=step)).values
    assert not (copied.folder / "cache").exists()
    first = make(spec).score(problem(copied, features, step=step)).values
    before = {path: path.stat().st_ino for path in kept(copied)}
    assert before
    again = make(spec).score(problem(copied, features, step=step))
    assert {path: path.stat().st_ino for path in kept(copied)} == before
    assert np.array_equal(first, again.values)
    by_rows = spec.startswith("datainf") and step is None and features.gradients.dtype == torch.float32
    near = 1e-6 if by_rows else 1e-12  # one product with float32 rows in place of two with inner products
    assert np.allclose(first, wanted, rtol=near, atol=near * np.abs(wanted).max())
    if "exact" in spec:
        assert again.computed["residual"] < 1e-5


def test_nothing_of_the_gram_matrix_is_computed_twice(copied, features, monkeypatch):  # noqa: F811
    make("exact").score(problem(copied, features))
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *_: pytest.fail("a factor was computed again"))
    make("exact").score(problem(copied, features))


def test_solutions_of_the_same_queries_are_kept(copied, features, monkeypatch):  # noqa: F811
    first = make("exact:solver=nystroem").score(problem(copied, features, step=6))
    from finetrace.curvature.conjugate_gradients import IterativeStream

    monkeypatch.setattr(IterativeStream, "_run", lambda *_: pytest.fail("solved again"))
    again = make("exact:solver=nystroem").score(problem(copied, features, step=6))
    assert np.array_equal(first.values, again.values)
    assert again.computed["solver"] == "nystroem"
    assert again.computed["residual"] == pytest.approx(first.computed["residual"])


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("exact:solver=primal", "finetrace.curvature.primal.dense_fisher"),
        ("exact:solver=primal,normalise=cosine", "finetrace.curvature.primal.dense_fisher"),
        ("exact:solver=dual", "torch.linalg.cholesky"),
        ("exact:solver=dual,scope=joint", "torch.linalg.cholesky"),
        ("exact:solver=nystroem", "finetrace.attribution.exact.nystroem"),
        ("datainf:normalise=cosine", "finetrace.curvature.datainf.dense_fisher"),
    ],
)
def test_other_queries_find_the_factors_where_rows_are_streamed(
    copied,
    features,  # noqa: F811
    spec,
    made,
    monkeypatch,
):
    def others(**more):
        turned = features.some(torch.arange(3, -1, -1))
        return Problem(copied, tiny_queries(4)[::-1], turned, step=6, **{"cache": 1 << 30, **more})

    first = make(spec).score(problem(copied, features, step=6))
    damped = spec + ",damping=0.4"
    wanted = [make(each).score(others(cache=0)).values for each in (spec, damped)]
    assert np.allclose(make(damped).score(others()).values, wanted[1], rtol=1e-9, atol=1e-14)  # factors of its own
    monkeypatch.setattr(made, lambda *_, **__: pytest.fail("made again"))
    found = make(spec).score(others())
    assert np.allclose(found.values, wanted[0], rtol=1e-9, atol=1e-14)
    assert not np.allclose(wanted[0], wanted[1])
    assert found.computed.get("residual", 0) <= 1e-6
    if "primal" in spec:  # what makes the factors is one pass, and a measured solution another
        assert found.computed["passes"] == first.computed["passes"] - 1


@pytest.mark.parametrize("spec", ["exact:damping=1e-3", "exact:scope=joint,solver=cg"])
def test_streamed_or_found_the_rounding_of_products_is_named_as_in_memory(copied, features, spec):  # noqa: F811
    wanted = make(spec.replace(",solver=cg", "")).score(problem(copied, features, cache=0)).computed["rounding"]
    for _ in ("made", "found"):
        assert make(spec).score(problem(copied, features, step=6)).computed["rounding"] == pytest.approx(
            wanted, rel=1e-6
        )
    assert wanted > 0


def test_a_block_that_a_norm_leaves_out_is_not_taken_from_what_has_none(copied, features, monkeypatch):  # noqa: F811
    """Where a block's rows are all zero, cosines leave it out, and bare products need not look."""

    def without(self, rows):
        found = sizes(self, rows)
        return Sizes(found.squares, found.traces * (torch.arange(len(found.traces)) > 0))

    sizes = Problem.sizes
    monkeypatch.setattr(Problem, "sizes", without)
    spec = "ekfac:labels=data"
    wanted = make(f"{spec},normalise=cosine").score(problem(copied, features, cache=0, step=6)).values
    make(spec).score(problem(copied, features, step=6))
    found = make(f"{spec},normalise=cosine").score(problem(copied, features, step=6)).values
    assert np.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_factors_are_found_however_many_blocks_memory_held_together(copied, features, monkeypatch):  # noqa: F811
    spec, groups = "exact:solver=primal", []
    wanted = make(spec).score(problem(copied, features, cache=0, step=6)).values

    def packed(room):
        def of(segments, _):
            groups.append(room)
            return [list(range(len(segments)))[k : k + room] for k in range(0, len(segments), room)]

        return of

    monkeypatch.setattr("finetrace.attribution.exact.packed", packed(1))
    first = make(spec).score(problem(copied, features, step=6)).values
    files = {path for path in kept(copied) if "primal-factor" in path.name}
    assert len(files) == len(copied.blocks)
    monkeypatch.setattr("finetrace.attribution.exact.packed", packed(3))
    monkeypatch.setattr("finetrace.curvature.primal.dense_fisher", lambda *_, **__: pytest.fail("made again"))
    others = Problem(copied, tiny_queries(4)[::-1], features.some(torch.arange(3, -1, -1)), step=6, cache=1 << 30)
    found = make(spec).score(others).values[::-1]
    assert {path for path in kept(copied) if "primal-factor" in path.name} == files
    assert set(groups) == {1, 3}
    for each in (first, found):
        np.testing.assert_allclose(each, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_another_damping_layer_or_query_is_another_value(copied, features):  # noqa: F811
    for spec in ("exact", "exact:damping=0.5", "exact:layers=1", "datainf:normalise=cosine,damping=0.3"):
        wanted = make(spec).score(problem(copied, features, cache=0)).values
        assert np.allclose(make(spec).score(problem(copied, features)).values, wanted, rtol=1e-12, atol=1e-14), spec
    other = tiny_queries(4)[::-1]
    turned = features.some(torch.arange(3, -1, -1))
    found = make("exact:solver=cg").score(Problem(copied, other, turned, step=6, cache=1 << 30)).values
    wanted = make("exact:solver=cg").score(problem(copied, features, step=6)).values
    assert np.allclose(found[::-1], wanted, rtol=1e-4)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "format"])
def test_what_is_broken_is_computed_again(copied, features, damage, monkeypatch):  # noqa: F811
    wanted = make("exact").score(problem(copied, features)).values
    if damage == "format":
        monkeypatch.setattr(cache_module, "FORMAT", "0")  # as if the files were of another format
    for path in kept(copied):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-5] ^= 64
        elif damage == "cut":
            content = content[: len(content) // 2]
        elif damage == "empty":
            content = bytearray()
        path.write_bytes(bytes(content))
    assert np.array_equal(make("exact").score(problem(copied, features)).values, wanted)
    monkeypatch.undo()
    assert np.array_equal(make("exact").score(problem(copied, features)).values, wanted)


def test_a_checksum_is_compared_once_and_again_when_the_file_is_another(copied, monkeypatch):
    counted, checksum = [], cache_module._checksum
    cache = Cache(copied.folder, copied.manifest)

    def value(made=2.0):
        return cache.fetch("x", copied.blocks, lambda: torch.full((3,), made))

    value()
    monkeypatch.setattr(cache_module, "_checksum", lambda tensors: counted.append(1) or checksum(tensors))
    for _ in range(3):
        assert torch.equal(value(), torch.full((3,), 2.0))
    assert len(counted) == 1
    (path,) = kept(copied)
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(bytes(content))  # the same inode and size
    assert torch.equal(value(5.0), torch.full((3,), 5.0))
    (path,) = kept(copied)
    value()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.with_suffix(".other").write_bytes(bytes(content))
    os.utime(path.with_suffix(".other"), ns=times)
    path.with_suffix(".other").replace(path)  # the same size and time, another inode
    assert torch.equal(value(7.0), torch.full((3,), 7.0))


def test_what_is_read_is_nobody_elses_and_stays(copied):
    cache = Cache(copied.folder, copied.manifest)
    values = torch.arange(5000.0)
    cache.fetch("x", copied.blocks, lambda: values)
    found = cache.fetch("x", copied.blocks, lambda: pytest.fail("made again"))
    found[:10] = -1  # a caller that writes to it
    again = cache.fetch("x", copied.blocks, lambda: pytest.fail("made again"))
    assert torch.equal(again, values)
    (path,) = kept(copied)
    path.unlink()
    assert torch.equal(again, values)
    assert torch.equal(found[10:], values[10:])


def test_a_file_that_another_process_removes_while_it_is_opened_is_made_again(copied, monkeypatch):
    cache = Cache(copied.folder, copied.manifest)
    cache.fetch("x", copied.blocks, lambda: torch.ones(3))
    (path,) = kept(copied)
    opened = torch.UntypedStorage.from_file

    def gone(*given, **named):
        path.unlink(missing_ok=True)
        return opened(*given, **named)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", gone)
    assert torch.equal(cache.fetch("x", copied.blocks, lambda: torch.full((3,), 2.0)), torch.full((3,), 2.0))


def test_a_cache_of_somebody_else_is_read(copied, monkeypatch):
    """Who may read a file need not be allowed to set its time."""
    cache = Cache(copied.folder, copied.manifest)
    cache.fetch("x", copied.blocks, lambda: torch.ones(3))

    def refused(*_, **__):
        raise PermissionError("not the owner")

    monkeypatch.setattr(os, "utime", refused)
    for _ in range(2):
        assert torch.equal(cache.fetch("x", copied.blocks, lambda: torch.zeros(3)), torch.ones(3))


def test_an_index_of_other_gradients_never_finds_it(copied, features):  # noqa: F811
    before = Cache(copied.folder, copied.manifest)
    value = before.fetch("x", copied.blocks, lambda: torch.ones(2))
    shards = copied.manifest.shards
    changed = copied.manifest.model_copy(
        update={"shards": (shards[0].model_copy(update={"sha256": "0" * 64}), *shards[1:])}
    )
    assert torch.equal(Cache(copied.folder, copied.manifest).fetch("x", copied.blocks, lambda: torch.zeros(2)), value)
    assert torch.equal(Cache(copied.folder, changed).fetch("x", copied.blocks, lambda: torch.zeros(2)), torch.zeros(2))


def test_an_index_that_cannot_be_written_still_answers(copied, features):  # noqa: F811
    wanted = make("exact").score(problem(copied, features, cache=0)).values
    (copied.folder / "cache").write_text("a file where the folder would be")
    assert np.array_equal(make("exact").score(problem(copied, features)).values, wanted)
    assert (copied.folder / "cache").read_text() == "a file where the folder would be"


def test_the_limit_holds_and_what_was_used_last_stays(copied):
    tensors = {name: torch.full((400,), float(value)) for value, name in enumerate("abcdef")}  # 1600 bytes and a header
    for name, tensor in tensors.items():  # each by a run of its own
        cache = Cache(copied.folder, copied.manifest, limit=10_000)
        cache.fetch(name, (), lambda tensor=tensor: tensor)
        cache.fetch("a", (), lambda: pytest.fail("what is used goes last"))
        time.sleep(0.02)
    assert sum(path.stat().st_size for path in kept(copied)) <= 10_000
    names = {path.name.split("-")[0] for path in kept(copied)}
    assert {"a", "f"} <= names
    assert "b" not in names
    cache.fetch("large", (), lambda: torch.zeros(5000))
    assert not list((copied.folder / "cache").glob("large-*"))
    assert not list((copied.folder / "cache").glob("*.part"))


def in_all(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("cache/*.safetensors"))


def test_the_limit_is_of_an_index_and_its_views_together(copied, index):  # noqa: F811
    opened = open_index(copied.folder, index.model())
    methods = [make(f"exact:loss_on={loss}") for loss in ("response", "all", "first:2")]

    def asked(seed: int, limit: int) -> None:
        queries = [dataclasses.replace(each, id=f"q{i}") for i, each in enumerate(make_examples(2, seed=seed))]
        at_once = Problem(opened, queries, cache=limit)
        for method in methods:
            method.score(at_once)

    asked(9, 1 << 30)
    whole = in_all(copied.folder)
    places = [copied.folder, *(copied.folder / "views").iterdir()]
    files = {path: path.stat().st_ino for home in places for path in (home / "cache").iterdir()}
    assert all(list((home / "cache").iterdir()) for home in places)
    asked(9, 1 << 30)
    assert {path: path.stat().st_ino for path in files} == files
    for home in places:
        shutil.rmtree(home / "cache")
    limit = whole * 2 // 3
    asked(9, limit)
    assert 0 < in_all(copied.folder) <= limit
    files = {path: path.stat().st_ino for home in places for path in (home / "cache").glob("*")}
    asked(9, limit)  # of one problem, none takes the place of another's
    assert {path: path.stat().st_ino for path in files} == files
    cache = Cache(places[1], open_index(places[1]).manifest, limit)
    fresh = limit // 3 // 4
    for name in "abc":
        cache.fetch(name, (), lambda: torch.zeros(fresh))
        assert in_all(copied.folder) <= limit
    assert (
        len(list((places[1] / "cache").glob("[ab]-*"))) == 2
    )  # in place of what was used longest ago, wherever it lay


def test_files_of_others_are_never_removed(copied, tmp_path):
    """Where somebody put a link to a folder of theirs, or of ours, in the place of the cache."""
    others = [tmp_path / name for name in ("model.safetensors", "model-00001-of-00002.safetensors", "download.part")]
    for path in others:
        path.write_bytes(b"x" * 9000)
        os.utime(path, (1, 1))
    (copied.folder / "cache").symlink_to(tmp_path)
    cache = Cache(copied.folder, copied.manifest, limit=10_000)
    assert torch.equal(cache.fetch("a", (), lambda: torch.ones(400)), torch.ones(400))
    assert all(path.exists() for path in others)


def test_a_query_that_needs_more_than_the_limit_finds_what_fits(copied):
    """Values asked for in a cycle: a least recently used one is always the next that is needed."""

    def query() -> tuple[int, dict[Path, int]]:
        made = []
        cache = Cache(copied.folder, copied.manifest, limit=10_000)
        for name in "abcdefgh":
            value = cache.fetch(name, (), lambda name=name: made.append(name) or torch.full((400,), float(ord(name))))
            assert torch.equal(value, torch.full((400,), float(ord(name))))
        return len(made), {path: path.stat().st_ino for path in kept(copied)}

    assert query()[0] == 8
    files = {path: path.stat().st_ino for path in kept(copied)}
    assert len(files) >= 4
    for _ in range(2):
        assert query() == (8 - len(files), files)  # nothing is written again
    Cache(copied.folder, copied.manifest, limit=10_000).fetch("z", (), lambda: torch.zeros(400))
    assert list((copied.folder / "cache").glob("z-*"))  # in place of what an earlier query left
