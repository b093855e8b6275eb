"""The index of random numbers that the benchmark of scoring times: its methods are those that it can be asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from finetrace.attribution import Problem, make
from finetrace.index import Index
from finetrace.tracing import run_methods, standard
from tiny import make_examples

PATH = Path(__file__).parent.parent / "benchmarks" / "scoring.py"


@pytest.fixture(scope="module")
def scoring() -> Any:
    spec = importlib.util.spec_from_file_location("scoring", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scoring"] = module
    spec.loader.exec_module(module)
    return module


def test_every_method_that_is_timed_can_be_scored(scoring: Any, tmp_path: Path) -> None:
    scoring.write_index(tmp_path / "i", 4, per_shard=3)
    index = Index(tmp_path / "i")
    width = sum(block.size for block in index.blocks)
    assert width == 230_400
    timed = scoring.methods(index)
    labels = {each.label for each in timed}
    assert {make(spec).label for spec in standard(index) if "=" not in spec} <= labels
    problem = Problem(index, make_examples(2), scoring.random_features(2, width, 1_000_000))
    quick = [each for each in timed if each.name not in ("kfac", "ekfac", "lissa")]  # those need factors, or long
    results = run_methods(problem, quick)
    assert all(result.scores.values.shape == (2, 4) for result in results)
