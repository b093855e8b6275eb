"""Streaming equals memory on projected and on narrow indexes, and products are those of float64 however they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetrace.api import build_index
from finetrace.attribution import Problem, make
from finetrace.attribution import stored_rows as module
from finetrace.attribution.stored_rows import StoredRows, adjacent
from finetrace.collection import Block
from finetrace.curvature import products as products_module
from finetrace.index import Index, sizing
from test_streaming import close, tiny_queries
from tiny import make_examples, make_llama, make_tokenizer, with_lora

KINDS = [
    (None, "float32"),
    (None, "bfloat16"),
    (None, "float16"),
    ("two-sided:3x5", "float32"),
    ("two-sided:3x5", "bfloat16"),
    ("two-sided:3x5", "float16"),
    ("rademacher:7", "float32"),
    ("rademacher:7", "bfloat16"),
    ("rademacher:7", "float16"),
]
SPECS = [
    "gradsim",
    "gradsim:layers=1",
    "gradcos",
    "gradcos:scope=block",
    "exact",
    "exact:solver=cg",
    "exact:solver=dual",
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(each or "whole" for each in kind))
def stored(request, tmp_path_factory) -> Index:
    """23 rows in shards of 16."""
    projection, dtype = request.param
    folder = tmp_path_factory.mktemp("stored") / "idx"
    before, sizing.SHARD_BYTES = sizing.SHARD_BYTES, 1
    try:
        return build_index(
            with_lora(make_llama()).float(),
            make_tokenizer(),
            make_examples(23),
            folder,
            projection=projection,
            feature_dtype=dtype,
        )
    finally:
        sizing.SHARD_BYTES = before


def test_streaming_equals_memory(stored, monkeypatch) -> None:
    features = stored.features(tiny_queries(4))[0]
    specs = SPECS + (["ekfac", "ekfac:normalise=cosine"] if stored.has_factors() else [])
    for spec in specs:
        held = make(spec.split(":solver")[0]).score(Problem(stored, tiny_queries(4), features)).values
        for columns in (7, 1 << 14):  # float64 sums of many products, and one product
            monkeypatch.setattr(module, "COLUMNS", columns)
            found = make(spec).score(Problem(stored, tiny_queries(4), features, step=5))
            assert found.computed["computed"] == "streamed"
            close(found.values, held, 3e-5 if "exact" in spec else 1e-5)


def test_dot_products_are_those_of_float64(stored, monkeypatch) -> None:
    """Against a product of whole matrices that no code of the library takes part in but the reading."""
    features = stored.features(tiny_queries(4))[0]
    for layers in ("all", "1", "0"):
        problem = Problem(stored, tiny_queries(4), features).on("", layers)
        train = torch.cat([stored.gradients(block.columns) for block in problem.blocks], 1).double()
        query = torch.cat([features.gradients[:, block.columns] for block in problem.blocks], 1).double()
        wanted = (query @ train.T).numpy()
        for columns in (7, 1 << 14):
            monkeypatch.setattr(products_module, "COLUMNS", columns)
            close(problem.inner().numpy(), wanted, 1e-6)
            fresh = Problem(stored, tiny_queries(4), features)
            close(make("gradsim", layers=layers).score(fresh).values, wanted, 1e-6)


def test_blocks_multiplied_for_another_method_are_not_multiplied_again(stored, monkeypatch) -> None:
    features = stored.features(tiny_queries(4))[0]
    problem = Problem(stored, tiny_queries(4), features)
    wanted = make("gradsim").score(Problem(stored, tiny_queries(4), features)).values
    make("gradcos").score(problem)
    monkeypatch.setattr(Index, "gradients", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(Index, "stored_gradients", lambda *_: pytest.fail("read again"))
    close(make("gradsim").score(problem).values, wanted, 1e-6)


def test_every_row_is_multiplied_once_whatever_the_step(stored) -> None:
    vectors = torch.randn(3, sum(block.size for block in stored.blocks), generator=torch.Generator().manual_seed(0))
    wanted = (stored.gradients(slice(None)).double() @ vectors.double().T).numpy()
    for step in (1, 5, 16, 23, 100):
        rows = StoredRows(stored, stored.blocks, step, joint=False, device=torch.device("cpu"))
        pieces = list(rows.products(vectors))
        assert [where.start for where, _ in pieces] == list(range(0, 23, step))
        close(np.concatenate([part.numpy() for _, part in pieces]), wanted, 1e-6)


def test_adjacent_blocks_are_one_run_of_columns() -> None:
    blocks = [Block("a", (2, 3), 0), Block("b", (4,), 6), Block("c", (5,), 20), Block("d", (1,), 25)]
    assert adjacent(blocks) == [slice(0, 10), slice(20, 26)]
    assert adjacent([blocks[2], blocks[0]]) == [slice(20, 25), slice(0, 6)]


def test_a_shard_that_lost_a_byte_is_named(stored, tmp_path: Path) -> None:
    import shutil

    from finetrace.errors import FinetraceError

    folder = tmp_path / "idx"
    shutil.copytree(stored.folder, folder)
    copied = Index(folder)
    features = stored.features(tiny_queries(2))[0]
    path = next(iter((folder / "shards").iterdir()))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FinetraceError, match="checksum"):
        make("gradsim").score(Problem(copied, tiny_queries(2), features, step=5))
