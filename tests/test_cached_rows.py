"""DataInf's preconditioned rows: kept for queries to come, where there is room, and never a score that is another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetrace.attribution import Problem, make
from finetrace.index.cache import HEADER, NAMED, Cache
from finetrace.index.store import Index
from test_cache import copied, kept  # noqa: F401  (a fixture)
from test_streaming import features, index, tiny_queries  # noqa: F401  (fixtures)

ROOM = 1 << 30


def scores(copied, features, spec="datainf", cache=ROOM, order=(0, 1, 2, 3)):  # noqa: F811
    queries = tiny_queries(4)
    asked = Problem(copied, [queries[i] for i in order], features.some(torch.tensor(order)), cache=cache)
    return make(spec).score(asked).values


def rows_of(copied) -> list[Path]:  # noqa: F811
    return [path for path in kept(copied) if "datainf-rows" in path.name]


def near(found, wanted, features) -> bool:  # noqa: F811
    """To some units of the gradients' precision."""
    precision = 30 * torch.finfo(features.gradients.dtype).eps
    return np.allclose(found, wanted, rtol=precision, atol=precision * np.abs(wanted).max())


@pytest.mark.parametrize("damping", [0.01, 3.0])
def test_new_queries_are_one_product_with_what_is_kept(copied, features, damping, monkeypatch):  # noqa: F811
    """Narrow blocks and wide ones: the tiny model has more rows than some blocks have entries."""
    spec = f"datainf:damping={damping}"
    widths = [block.size for block in copied.blocks]
    assert min(widths) < len(copied) < max(widths)
    wanted = scores(copied, features, spec, cache=0, order=(2, 0))
    scores(copied, features, spec, order=(1, 3))
    for read in ("gradients", "stored_gradients", "row_blocks"):
        monkeypatch.setattr(Index, read, lambda *_: pytest.fail("the gradients were read again"))
    assert near(scores(copied, features, spec, order=(2, 0)), wanted, features)


def test_another_damping_has_rows_of_its_own(copied, features):  # noqa: F811
    scores(copied, features, "datainf:damping=0.5")
    found = scores(copied, features, "datainf:damping=0.05")
    assert near(found, scores(copied, features, "datainf:damping=0.05", cache=0), features)


def test_rows_that_take_more_than_half_of_the_cache_are_not_made(copied, features):  # noqa: F811
    wanted = scores(copied, features, cache=0)
    whole = len(copied) * sum(block.size for block in copied.blocks) * features.gradients.element_size()
    assert np.array_equal(scores(copied, features, cache=2 * whole), wanted)
    assert not rows_of(copied)
    assert near(scores(copied, features, cache=2 * (whole + HEADER + NAMED)), wanted, features)
    assert rows_of(copied)


def test_a_cosine_has_products_of_its_own(copied, features):  # noqa: F811
    """It multiplies queries with rows in any case."""
    scores(copied, features, "datainf:normalise=cosine")
    assert not rows_of(copied)


def test_methods_before_share_what_they_multiplied(copied, features):  # noqa: F811
    shared = Problem(copied, tiny_queries(4), features, cache=ROOM)
    make("exact:solver=dual").score(shared)
    assert np.array_equal(make("datainf").score(shared).values, scores(copied, features, cache=0))
    assert not rows_of(copied)


def test_a_dot_product_after_it_reads_the_rows_in_one_pass(copied, features):  # noqa: F811
    """Products that DataInf did without are not taken for multiplied."""
    shared = Problem(copied, tiny_queries(4), features, cache=ROOM)
    make("datainf").score(shared)
    alone = make("gradsim").score(Problem(copied, tiny_queries(4), features)).values
    assert np.array_equal(make("gradsim").score(shared).values, alone)


def test_a_disk_that_takes_no_rows_is_tried_once(copied, features, monkeypatch):  # noqa: F811
    tried = []

    def full(self, path, tensors):
        tried.append(path.name.split("-")[0])
        return False

    wanted = scores(copied, features, cache=0)
    monkeypatch.setattr(Cache, "_write", full)
    assert near(scores(copied, features), wanted, features)
    assert tried.count("datainf") == 1
