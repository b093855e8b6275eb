"""Gradients stored in fewer bits: what is lost is rounding alone, is measured, and never passes in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run
from finetrace.attribution import Problem, make
from finetrace.collection import Block
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import build_index, kronecker_factors, open_index, view
from finetrace.index.checking import verify
from finetrace.index.stored import narrow, widen
from finetrace.models import Loaded
from tiny import make_examples, make_llama, relative_error, save_base, with_lora

BLOCKS = (Block("a", (3, 4), 0), Block("b", (5,), 12), Block("c", (2, 2), 17))
WIDTH = 21
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALVES = pytest.mark.parametrize("dtype", list(UNIT), ids=["bfloat16", "float16"])


def rows_of(scales: tuple[float, ...], seed: int = 0) -> torch.Tensor:
    """Random float32 rows, each block of its own size."""
    rows = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed))
    for block, scale in zip(BLOCKS, scales, strict=True):
        rows[:, block.columns] *= scale
    return rows


@HALVES
@pytest.mark.parametrize("scales", [(1, 1, 1), (1e-9, 1e6, 1), (1e-30, 1e-20, 1e30), (1e-3, 0, 1e-12)])
def test_each_block_loses_rounding_alone_at_any_size(dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    rows = rows_of(scales)
    kept = narrow(rows, dtype, BLOCKS)
    assert kept.rows.dtype == dtype
    back = widen(kept.rows, kept.exponents, slice(None), BLOCKS, torch.float32)
    for block in BLOCKS:
        error = (back - rows)[:, block.columns].norm(dim=1)
        assert (error <= 1.01 * UNIT[dtype] * rows[:, block.columns].norm(dim=1)).all()
    worst = ((back - rows).double().norm(dim=1) / rows.double().norm(dim=1)).max()
    assert kept.rounding == pytest.approx(float(worst), rel=1e-5)
    assert 0 < kept.rounding <= UNIT[dtype]


@HALVES
def test_values_that_the_dtype_holds_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(6, WIDTH).to(dtype).float() * 2.0**-40
    kept = narrow(rows, dtype, BLOCKS)
    assert kept.rounding == 0
    assert torch.equal(widen(kept.rows, kept.exponents, slice(None), BLOCKS, torch.float32), rows)


@HALVES
@pytest.mark.parametrize("columns", [slice(0, 5), slice(3, 19), slice(12, 17), slice(18, None), slice(None)])
def test_columns_across_blocks_are_those_of_the_whole(dtype: torch.dtype, columns: slice) -> None:
    kept = narrow(rows_of((1e-7, 1, 1e5)), dtype, BLOCKS)
    whole = widen(kept.rows, kept.exponents, slice(None), BLOCKS, torch.float64)
    assert torch.equal(widen(kept.rows, kept.exponents, columns, BLOCKS, torch.float64), whole[:, columns])


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.bfloat16, 1e-43), (torch.bfloat16, 1e60), (torch.float16, 1e-60), (torch.float16, 1e80)]
)
def test_what_lies_outside_of_the_range_is_refused(dtype: torch.dtype, value: float) -> None:
    rows = rows_of((1, 1, 1)).double()
    rows[2, 17:] = value * torch.tensor([1, 3, 5, 7], dtype=torch.float64)
    with pytest.raises(FinetraceError, match=r"row 3 of its shard: its gradient in c .* use --feature-dtype float32"):
        narrow(rows, dtype, BLOCKS)


@pytest.fixture
def loaded(tiny_loaded: Loaded) -> Loaded:
    """A float32 model with an adapter."""
    spec = replace(tiny_loaded.spec, dtype="float32")
    return Loaded(with_lora(make_llama().float()).float(), tiny_loaded.tokenizer, spec)


def build(loaded: Loaded, folder: Path, **options: Any) -> Any:
    return build_index(loaded, make_examples(13), folder, Encoder(loaded.tokenizer), rows_per_shard=4, **options)[0]


def test_an_index_states_what_it_lost_and_scores_widen(loaded: Loaded, tmp_path: Path) -> None:
    wide = build(loaded, tmp_path / "wide")
    assert (wide.manifest.feature_dtype, wide.manifest.rounding) == ("float32", 0)
    exact = wide.gradients(slice(None))
    size = (tmp_path / "wide" / "shards" / "000000000.safetensors").stat().st_size
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        index = build(loaded, tmp_path / name, feature_dtype=name)
        assert index.manifest.feature_dtype == name
        found = index.gradients(slice(None))
        assert found.dtype == torch.float32
        assert not torch.equal(found, exact)
        assert index.manifest.rounding == pytest.approx(relative_error(found, exact), rel=1e-4)
        assert index.manifest.rounding <= UNIT[dtype]
        assert torch.equal(torch.cat(list(index.stored_gradients())), found)
        assert torch.equal(index.gradients(slice(5, 70), slice(3, 9)), found[3:9, 5:70])
        assert (tmp_path / name / "shards" / "000000000.safetensors").stat().st_size < 0.75 * size
        queries = make_examples(3, seed=5)
        rounded, plain = (make("gradcos").score(Problem(each, queries)).values for each in (index, wide))
        assert abs(rounded - plain).max() <= 1.01 * index.manifest.rounding
        assert abs(rounded - plain).max() > 0


def test_factors_and_views_of_a_narrow_index(loaded: Loaded, tmp_path: Path) -> None:
    wide, narrow_ = build(loaded, tmp_path / "wide"), build(loaded, tmp_path / "half", feature_dtype="float16")
    for labels in ("model", "data"):
        found, expected = kronecker_factors(narrow_, labels), kronecker_factors(wide, labels)
        for name in expected:
            assert found[name].left.dtype == torch.float32
            assert torch.equal(found[name].kfac, expected[name].kfac)  # of sums, which are not narrowed
            assert relative_error(found[name].ekfac, expected[name].ekfac) < 2e-3
    viewed = view(narrow_, "all")
    assert viewed.manifest.feature_dtype == "float16"
    assert viewed.gradients(slice(None)).dtype == torch.float32


def test_a_narrow_index_mends_to_the_same_bytes(loaded: Loaded, tmp_path: Path) -> None:
    whole = build(loaded, tmp_path / "a", feature_dtype="float16")
    build(loaded, tmp_path / "b", feature_dtype="float16")
    broken = tmp_path / "b" / "shards" / "000000004.safetensors"
    before = broken.read_bytes()
    broken.unlink()
    assert [each.path.name for each in verify(tmp_path / "b")] == [broken.name]
    build(loaded, tmp_path / "b", feature_dtype="float16")
    assert broken.read_bytes() == before
    assert (tmp_path / "b" / "manifest.json").read_bytes() == (whole.folder / "manifest.json").read_bytes()
    with pytest.raises(FinetraceError, match="feature_dtype"):
        build(loaded, tmp_path / "b", feature_dtype="bfloat16")


def test_a_float64_model_may_store_less(tiny_loaded: Loaded, tmp_path: Path) -> None:
    wide = build(tiny_loaded, tmp_path / "wide")
    index = build(tiny_loaded, tmp_path / "i", feature_dtype="float32")
    assert index.gradients(slice(None)).dtype == torch.float64
    assert 0 < relative_error(index.gradients(slice(None)), wide.gradients(slice(None))) < 2.0**-24
    queries = make_examples(2, seed=5)
    for spec in ("gradcos", "exact", "ekfac", "datainf"):
        found, expected = (torch.from_numpy(make(spec).score(Problem(each, queries)).values) for each in (index, wide))
        assert relative_error(found, expected) < 1e-6


def test_the_command_says_what_was_lost(tmp_path: Path, capsys: Any) -> None:
    save_base(tmp_path / "base", make_llama().float())
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r {i}"}) + "\n" for i in range(5)))
    base = [data, "--model", tmp_path / "base", "--dtype", "float32", "--modules", "q_proj"]
    code, out, err = run(capsys, "index", *base, "--out", tmp_path / "i", "--feature-dtype", "bfloat16")
    assert code == 0, err
    assert "stored in bfloat16: no gradient moved by more than 0." in out
    assert open_index(tmp_path / "i").manifest.feature_dtype == "bfloat16"
    code, _, err = run(capsys, "index", *base, "--out", tmp_path / "j", "--feature-dtype", "int8")
    assert (code, "--feature-dtype int8: not known; use float32, bfloat16, float16." in err) == (2, True)
