"""Self-influence equals the diagonal of the train-train score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetrace.attribution import Problem, make
from finetrace.benchmark.matrices import suspicion
from finetrace.encoding import Encoder
from finetrace.index import build_index
from finetrace.models import Loaded
from tiny import make_examples


@pytest.mark.parametrize("curvature", ["gradsim", "datainf", "lissa", "exact", "kfac", "ekfac"])
def test_it_is_the_diagonal_of_train_against_train(tmp_path: Path, tiny_loaded: Loaded, curvature: str) -> None:
    examples = make_examples(9)
    index, _ = build_index(
        tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer), rows_per_shard=4, batch_tokens=100
    )
    problem = Problem(index, examples)
    for loss_on in ("", "first:3"):
        whole = make(f"{curvature}:loss_on={loss_on}" if loss_on else curvature).score(problem).values
        found = make("selfinf", curvature=curvature, loss_on=loss_on).score(problem)
        assert np.allclose(found.values[0], np.diagonal(whole), rtol=1e-7, atol=1e-14)
        assert np.array_equal(found.values[0], found.values[-1])
        assert "its own" in found.unit


def test_suspicion_is_high_for_rows_that_harm_the_validation_set() -> None:
    scores = np.array([[1.0, -2.0, 0.5], [3.0, -4.0, 0.5]])
    assert np.array_equal(suspicion(make("exact"), scores), [[-2.0, 3.0, -0.5]])
    assert np.array_equal(suspicion(make("selfinf"), scores[:1]), scores[:1])
