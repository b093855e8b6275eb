"""The comparison of two benchmarks that have their first seed in common."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

PAGE = """# T

## Summary, corrected protocol

| method | a | b |
|---|---|---|
| random (control) | 1.0 / 9.0 | 1.0 / 9.0 |
| exact | 50.0 / 40.0 | 100.0 / 90.0 |

## By what a method sees, corrected protocol

| input | method | a | b |
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return import_module("seed_orders")


def test_seeds_of_before_follow_from_their_mean(script: Any) -> None:
    before = script.means(PAGE)
    assert before == {("a", "exact"): 40.0, ("b", "exact"): 90.0}
    values = {"a": (0.46, 0.4, 0.34), "b": (0.9, 0.8, 1.0)}
    rows = [("a", "random", 0, 0.5), *((t, "exact", seed, v) for t in values for seed, v in enumerate(values[t]))]
    found = script.compare(before, pd.DataFrame(rows, columns=["task", "title", "seed", "coverage"]))
    # before: a 46 and twice 37, b thrice 90; now: others 37 and 90, means 40 and 90
    wanted = [2, 0, 0, 0, (81 / 2) ** 0.5, (81 / 2) ** 0.5]
    assert list(found.values()) == pytest.approx(wanted, abs=1e-9)


def test_means_that_moved_are_counted(script: Any) -> None:
    rows = [(t, "exact", seed, v) for t, v in (("a", 0.46), ("b", 0.8)) for seed in range(3)]
    found = script.compare(script.means(PAGE), pd.DataFrame(rows, columns=["task", "title", "seed", "coverage"]))
    assert list(found.values())[:4] == pytest.approx([2, 8, 9.6, 10])
    assert found["and now"] == pytest.approx(0)
