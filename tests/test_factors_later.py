"""Kronecker factors that are fitted once the shards are there: nothing is collected that the index holds, and no bit differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetrace.collection import Collector
from finetrace.encoding import Encoder
from finetrace.index import Index, build_index, kronecker_factors, open_index, views
from finetrace.models import Loaded
from tiny import make_examples, make_llama, with_lora


def build(loaded: Loaded, folder: Path, **options: Any) -> Index:
    return build_index(loaded, make_examples(7), folder, Encoder(loaded.tokenizer), rows_per_shard=3, **options)[0]


def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hidden states are asked for, whenever factors are fitted."""
    seen: list[int] = []

    def collector(model: Any, tracking: Any, wanted: Any, *rest: Any) -> Collector:
        seen.append(len(wanted))
        return Collector(model, tracking, wanted, *rest)

    monkeypatch.setattr(views, "Collector", collector)
    return seen


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("lowest", [0, 2])
def test_no_hidden_states_and_the_same_bytes(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Any, dtype: str, lowest: int
) -> None:
    """By autograd and by hand, from the first layer and above some that carry no adapter."""
    model = with_lora(make_llama(layers=3), layers_to_transform=list(range(lowest, 3)))
    loaded = Loaded(model.float() if dtype == "float32" else model, tiny_loaded.tokenizer, tiny_loaded.spec)
    build(loaded, tmp_path / "once", kronecker=labels)
    seen = heard(monkeypatch)
    kronecker_factors(build(loaded, tmp_path / "later"), labels)
    assert seen == [0]
    once, later = ((tmp_path / name / "factors" / f"{labels}.safetensors").read_bytes() for name in ("once", "later"))
    assert once == later


def test_a_lost_shard_is_mended_with_its_hidden_states(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded(with_lora(make_llama()), tiny_loaded.tokenizer, tiny_loaded.spec)
    build(loaded, tmp_path / "i")
    shard = tmp_path / "i" / "shards" / "000000003.safetensors"
    before = shard.read_bytes()
    shard.unlink()
    seen = heard(monkeypatch)
    assert kronecker_factors(open_index(tmp_path / "i", loaded), "model")
    assert (seen, shard.exists()) == ([0], False)
    build(loaded, tmp_path / "i")
    assert shard.read_bytes() == before


def test_rows_that_are_left_out_may_be_so_for_a_hidden_state(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetrace.index.manifest import LeftOutRecord, write

    loaded = Loaded(with_lora(make_llama()), tiny_loaded.tokenizer, tiny_loaded.spec)
    index = build(loaded, tmp_path / "i")
    gone = LeftOutRecord(id=index.rows.ids[0], row=0, reason="its hidden state is not finite")
    write(index.folder, index.manifest.model_copy(update={"left_out": (gone,)}))
    seen = heard(monkeypatch)
    monkeypatch.setattr(views, "collect_shards", lambda *about: None)
    monkeypatch.setattr(views.factors, "read", lambda *about: {})
    kronecker_factors(open_index(index.folder, loaded), "data")
    assert seen == [len(index.manifest.representations)]
