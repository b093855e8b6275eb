"""The search of hidden states sees what an index of the same model holds."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetrace.attribution import Problem, make
from finetrace.collection.representations import POOLINGS, Representation
from finetrace.encoding import Encoder
from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.index import build_index
from finetrace.models import Loaded, ModelSpec
from finetrace.reading import write_examples
from tiny import make_examples

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS = 2


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("choose_representation")


@pytest.mark.slow
def test_it_finds_what_repsim_finds(search: Any, tiny_loaded: Loaded, tmp_path: Path, monkeypatch: Any) -> None:
    examples = make_examples(24)
    train, queries = examples[:18], examples[18:]
    kinds = [Representation(layer, pooling) for layer in range(LAYERS + 1) for pooling in POOLINGS]
    encoder = Encoder(tiny_loaded.tokenizer)
    tiny_loaded.model.peft_config["default"].init_lora_weights = True  # as if its B had begun at zero
    problems = {
        at: Problem(build_index(tiny_loaded, train, tmp_path / at, encoder, representations=kinds, at=at)[0], queries)
        for at in ("end", "start")
    }
    for name, rows in (("train", train), ("queries", queries)):
        write_examples(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "cell.json").write_text(json.dumps({"dtype": "float64"}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "finetune.yaml").write_text("model: tiny\n")
    specs = {ModelSpec("tiny", str(tmp_path / "adapter"), "float64", "cpu"): tiny_loaded}
    monkeypatch.setattr(search, "load", lambda spec: specs[spec])

    found = search.kept(tmp_path)
    relevant = relevance([row.label for row in train], [query.label for query in queries])
    assert relevant.any()
    assert len(found) == (LAYERS + 1) * len(POOLINGS) * 4
    for at, layer, pooling, centred in product(problems, range(LAYERS + 1), POOLINGS, (False, True)):
        scores = make(f"repsim:layer={layer},pooling={pooling}", centred=centred).score(problems[at]).values
        name = f"layer={layer},pooling={pooling},at={at}{',centred' * centred}"
        wanted = {key: float(np.nanmean(METRICS[key](scores, relevant))) for key in found[name]}
        assert found[name] == pytest.approx(wanted, rel=1e-12), name
    assert found["layer=1,pooling=last-token,at=end"] != found["layer=1,pooling=last-token,at=start"]

    monkeypatch.setattr(search, "measure", None)  # it is read back, not measured again
    assert search.kept(tmp_path) == found


def test_gradients_without_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("centred_gradients")
    rng = np.random.default_rng(0)
    train, queries = rng.normal(size=(7, 5)) + 1, rng.normal(size=(3, 5)) + 1
    for centred in (False, True):
        middle = train.mean(0) if centred else 0.0
        rows, asked = train - middle, queries - middle
        wanted = asked @ rows.T / np.linalg.norm(rows, axis=1)
        found = module.cosines(queries @ train.T, train @ train.T, centred=centred)
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
