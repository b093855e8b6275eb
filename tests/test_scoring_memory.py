"""What scoring takes stays within its budget, however many queries there are and however rows are stored."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetrace import fingerprint
from finetrace.api import build_index
from finetrace.attribution import Problem, make
from finetrace.attribution.keeping import Keeping
from finetrace.attribution.memory import SCORE, plan, tile
from finetrace.attribution.ranked import beside, fits, rank
from finetrace.attribution.similarity import PIECE
from finetrace.attribution.streaming import all_blocks
from finetrace.collection import Features
from finetrace.curvature import Products
from finetrace.errors import FinetraceError
from finetrace.index import Index, manifest
from finetrace.index.manifest import BlockRecord, ShardRecord
from finetrace.planning.measure import peak_memory
from test_streaming import tiny_queries
from tiny import make_examples, make_llama, make_tokenizer, with_lora

ALLOCATOR = 24 << 20  # bytes: what is given back to the system late, and the stacks of threads
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def peak(*, again: bool = False) -> int:
    """Bytes of this process's largest resident size; `again` starts it from what is resident now."""
    if again:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def large(
    folder: Path, n: int, width: int, dtype: torch.dtype = torch.float32, shards: int = 2, states: int = 0
) -> Index:
    """n rows of random gradients in one block, and of random hidden states; no text is behind them."""
    model = with_lora(make_llama()).float()
    name = str(dtype).removeprefix("torch.")
    build_index(model, make_tokenizer(), make_examples(1), folder, feature_dtype=name)
    about = manifest.read(folder)
    (folder / "shards" / about.shards[0].file).unlink()
    records = []
    for start in range(0, n, n // shards):
        count = min(n // shards, n - start)
        tensors = {"gradients": torch.randn(count, width, generator=torch.Generator().manual_seed(start)).to(dtype)}
        if dtype == torch.float16:
            tensors["gradients.exponents"] = torch.full((count, 1), start % 3, dtype=torch.int8)
        if states:
            draw = torch.Generator().manual_seed(n + start)
            tensors["representation.last-prompt@-1"] = torch.randn(count, states, generator=draw) + 1
        path = folder / "shards" / f"{start:09d}.safetensors"
        save_file(tensors, str(path))
        records.append(
            ShardRecord(
                file=path.name,
                start=start,
                stop=start + count,
                bytes=path.stat().st_size,
                sha256=fingerprint.of_file(path),
            )
        )
    block = BlockRecord(name=about.blocks[0].name, shape=(8, width // 8), offset=0)
    manifest.write(folder, about.model_copy(update={"examples": n, "blocks": (block,), "shards": tuple(records)}))
    return Index(folder)


def asked(m: int, width: int) -> Features:
    return Features(torch.randn(m, width, generator=torch.Generator().manual_seed(7)), torch.zeros(m), {})


@linux
@pytest.mark.parametrize("spec", ["gradsim", "gradcos", "gradcos:scope=block", "lissa:normalise=cosine,iterations=2"])
def test_thousands_of_queries_fit(tmp_path: Path, spec: str) -> None:
    """Against scores of 2,500 rows and 3,000 queries, 150 MB and more with what is on the way."""
    n, m, width, memory = 2500, 3000, 64, 32 << 20
    index, features = large(tmp_path / "index", n, width), asked(m, width)
    problem = Problem(index, tiny_queries(m), features, memory=memory)
    make(spec).matrix(Problem(index, tiny_queries(8), features.some(slice(0, 8)), memory=memory, step=n))  # libraries
    run = make(spec).run(problem)
    assert run is not None
    before = peak(again=True)
    for _ in all_blocks(run, m):
        pass
    assert peak() - before < memory + ALLOCATOR


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_does_not_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows of 100 MB within 8."""
    n, memory = (100 << 20) // 1024 // dtype.itemsize, 8 << 20
    index, features = large(tmp_path / "index", n, 1024, dtype), asked(4, 1024)
    run = make("gradsim").run(Problem(index, tiny_queries(4), features, memory=memory))
    assert run is not None
    before = peak(again=True)
    for _ in all_blocks(run, 4):
        pass
    assert peak() - before < memory + ALLOCATOR


@linux
@pytest.mark.parametrize("centred", ["true", "false"])
def test_hidden_states_that_were_read_do_not_stay(tmp_path: Path, centred: str) -> None:
    """100 MB of them in ten shards: two of these at most, and the pieces in float64."""
    n, states = (100 << 20) // 4096, 1024
    index, m = large(tmp_path / "index", n, 8, shards=10, states=states), 3
    hidden = {"last-prompt@-1": torch.randn(m, states, generator=torch.Generator().manual_seed(8)) + 1}
    method, features = make(f"repsim:centred={centred}"), Features(asked(m, 8).gradients, torch.zeros(m), hidden)
    make("gradsim").matrix(Problem(index, tiny_queries(m), features))  # libraries, checksums
    before = peak(again=True)
    found = method.matrix(Problem(index, tiny_queries(m), features))
    assert peak() - before < (20 << 20) + 4 * PIECE + ALLOCATOR
    train = index._reader.tensor("representation.last-prompt@-1").double()
    middle = train.mean(0) if centred == "true" else 0.0
    query = hidden["last-prompt@-1"].double() - middle
    wanted = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(train - middle, dim=1).T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [slice(0, 64), slice(8, 24)])
def test_float16_blocks_are_the_gradients(tmp_path: Path, columns: slice) -> None:
    """Across shards, whose exponents differ."""
    index = large(tmp_path / "index", 47, 64, torch.float16, shards=3)
    found = torch.cat([block.clone() for _, block in index.row_blocks(7, columns)])
    assert found.dtype == torch.float32
    assert torch.equal(found, index.gradients(columns))


@pytest.mark.parametrize("memory", [1 << 20, 32 << 20, 1 << 30])
@pytest.mark.parametrize("m", [1, 100, 20_000])
def test_blocks_of_scores_are_in_the_plan(tmp_path: Path, memory: int, m: int) -> None:
    index = large(tmp_path / "index", 400, 64)
    problem = Problem(index, tiny_queries(1), asked(1, 64), memory=memory)
    problem.queries *= m
    made = plan(make("gradcos"), problem, forced=True)
    assert made is not None
    assert made.step * (made.queries * SCORE + 2 * 64 * 4) <= memory // 4
    assert made.queries * 64 * 32 <= memory // 2
    given = Problem(index, tiny_queries(1), asked(1, 64), memory=memory, step=50)
    given.queries *= m
    made = plan(make("gradcos"), given)
    assert made is not None
    assert made.step == 50
    assert made.queries * 50 * SCORE <= memory // 4


def test_rows_as_queries_fit_with_their_products() -> None:
    for width, rows in ((64, 8192), (1024, 512), (1 << 20, 64)):
        together = tile(1 << 30, width, 48, rows)
        assert together * width * 48 <= 1 << 29
        assert together * rows * 16 <= 1 << 27


def test_rows_are_the_strongest_however_many_queries_go_through_together(tmp_path: Path) -> None:
    index, features = large(tmp_path / "index", 300, 64), asked(500, 64)
    wanted = features.gradients.double() @ index.gradients(slice(0, 64)).double().T
    for memory in (100_000, 400_000):
        found = rank(make("gradsim"), Problem(index, tiny_queries(500), features, memory=memory, step=None), 5)
        assert found.computed["queries_at_once"] < 500
        values, order = wanted.topk(5, dim=1)
        torch.testing.assert_close(torch.from_numpy(found.proponents.values), values, rtol=1e-5, atol=1e-5)
        assert (torch.from_numpy(found.proponents.order) == order).double().mean() > 0.99


def test_inner_products_are_kept_beside_what_a_method_holds(tmp_path: Path) -> None:
    """Either fits by itself; both only within their sum, and nothing is kept of one method that another needs room for."""
    n, m = 60, 4
    index, features = large(tmp_path / "index", n, 64), asked(m, 64)
    products, exact = n * (n + m) * 4, make("exact:scope=joint")
    held = exact.held_bytes(Problem(index, tiny_queries(m), features))
    for memory, wanted in ((held + products - 1, False), (held + products, True)):
        problem = Problem(index, tiny_queries(m), features, memory=memory)
        exact.matrix(problem)
        assert (problem.keeping.get(index, index.blocks[0].name) is not None) is wanted
    assert max(held, products) < held + products - 1

    problem = Problem(index, tiny_queries(m), features, memory=held + products)
    make("datainf").matrix(problem)
    assert problem.keeping.get(index, index.blocks[0].name) is not None
    make("exact:solver=cg").matrix(problem)  # streams, within all of the memory
    assert problem.keeping.get(index, index.blocks[0].name) is None


def test_products_over_all_blocks_are_kept_within_the_budget_too(tmp_path: Path) -> None:
    n, m = 60, 4
    index, features, exact = large(tmp_path / "index", n, 64), asked(m, 64), make("exact:scope=joint")
    held = exact.held_bytes(Problem(index, tiny_queries(m), features))
    both = (8 + 4) * n * (n + m)  # beside those of the one block
    for memory, wanted in ((held + both - 1, False), (held + both, True)):
        problem = Problem(index, tiny_queries(m), features, memory=memory)
        exact.matrix(problem)
        assert (problem.joint is problem.joint) is wanted
    problem.keeping.reserve(memory)  # another method that takes all of it
    assert problem.joint is not problem.joint
    rows = index.gradients(slice(0, 64)).double()
    torch.testing.assert_close(problem.joint.gram, rows @ rows.T, rtol=0, atol=2e-5 * float(rows.square().sum(1).max()))


@pytest.mark.parametrize(("spec", "matrix"), [("dual", "600 x 600"), ("primal", "1,024 x 1,024")])
def test_a_solver_that_the_memory_does_not_hold_is_refused(tmp_path: Path, spec: str, matrix: str) -> None:
    index, features = large(tmp_path / "index", 600, 1024), asked(3, 1024)
    problem = Problem(index, tiny_queries(3), features, memory=8 << 20)
    with pytest.raises(
        FinetraceError, match=f"the {spec} solver holds a matrix of {matrix} .* leave the solver to auto"
    ):
        make(f"exact:solver={spec}").matrix(problem)
    found = make("exact").matrix(problem)
    wanted = make("exact").matrix(Problem(index, tiny_queries(3), features, memory=1 << 30))
    assert next(iter(problem.computed.values()))["solver"] in ("cg", "nystroem")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_matrices_that_are_held_count_for_the_methods_after_them(tmp_path: Path) -> None:
    """Of 8 bytes a score; `held_bytes` of each method has its own."""
    n, m, methods = 600, 50, 9
    index, features = large(tmp_path / "index", n, 64), asked(m, 64)
    method, matrices = make("exact:scope=joint"), 8 * n * m * (methods - 1)
    held = method.held_bytes(Problem(index, tiny_queries(m), features))
    for memory, streamed in ((held + matrices, False), (held + matrices - 1, True)):
        problem = Problem(index, tiny_queries(m), features, memory=memory)
        assert fits(problem, methods)
        left = beside(problem, methods)
        method.matrix(left)
        assert (left.computed.get(method.computed_as, {}).get("computed") == "streamed") is streamed
        assert beside(problem, 1) is problem and problem.memory == memory and not problem.computed


def test_views_of_a_problem_keep_within_one_budget() -> None:
    keeping, one = Keeping(1000), Products.of(torch.ones(2, 3), torch.ones(1, 3))
    first, second = object(), object()
    keeping.reserve(100)
    keeping.put(first, "a", one, 600)
    keeping.put(first, "b", one, 600)
    keeping.put(second, "a", one, 600)
    assert [keeping.get(*at) for at in ((first, "a"), (first, "b"), (second, "a"))] == [one, one, None]
    keeping.reserve(401)
    assert keeping.get(first, "a") is None
    keeping.put(second, "a", one, 599)
    assert keeping.get(second, "a") is one
