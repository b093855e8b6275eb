"""A model without an adapter: every linear layer is tracked, and the projection is the largest that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from commands import run
from finetrace.api import build_index as build_in_memory
from finetrace.attribution import Problem, make
from finetrace.collection import Collector, track
from finetrace.collection.layers import ALL_LINEAR
from finetrace.collection.projection import Projection
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import Index, build_index, open_index, sizing
from finetrace.index.sizing import Budget, Plan, fit, parse_bytes
from finetrace.models import Loaded
from finetrace.tracing import default_method, standard
from tiny import (
    make_encoded,
    make_examples,
    make_gpt2,
    make_llama,
    make_tokenizer,
    names,
    one_at_a_time,
    relative_error,
    save_base,
    with_lora,
)

ROWS = 9


@pytest.fixture
def whole(tiny_loaded: Loaded) -> Loaded:
    return Loaded(make_llama(tied=True), tiny_loaded.tokenizer, tiny_loaded.spec)


def build(loaded: Loaded, folder: Path, **options: Any) -> tuple[Index, list[str]]:
    said: list[str] = []
    encoder = Encoder(loaded.tokenizer)
    return build_index(loaded, make_examples(ROWS), folder, encoder, say=said.append, **options)[0], said


def test_every_linear_layer_is_tracked_and_the_rest_named(whole: Loaded, tmp_path: Path) -> None:
    index, said = build(whole, tmp_path / "i")
    linear = [
        f"{n}.weight" for n, m in whole.model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    ]
    assert [block.name for block in index.blocks] == linear
    assert len(linear) == 14
    assert index.manifest.modules == (ALL_LINEAR,)
    others = {name for name, _ in whole.model.named_parameters()} - set(linear)
    assert set(index.manifest.skipped) == others
    reasons = index.manifest.skipped
    assert reasons["model.embed_tokens.weight"] == "trainable, but an embedding, shared with the vocabulary projection"
    assert reasons["model.norm.weight"] == "trainable, but of a norm"
    assert said[0] == "the model has no adapter, so all of its linear layers are tracked"
    assert said[1].startswith("projection: none; 9 rows of ")
    assert index.manifest.projection == "none"


def test_an_untied_head_is_tracked_and_its_gradient_is_autograds(tiny_loaded: Loaded, tmp_path: Path) -> None:
    loaded = Loaded(make_llama(), tiny_loaded.tokenizer, tiny_loaded.spec)
    index, _ = build(loaded, tmp_path / "i")
    assert index.blocks[-1].name == "lm_head.weight"
    items = list(index.rows.encoded)

    weights = [loaded.model.get_parameter(block.name) for block in index.blocks]
    expected, _ = one_at_a_time(loaded.model, items, weights)
    assert relative_error(index.gradients(slice(None)), expected) < 1e-9


def test_gpt2_is_tracked_with_its_biases(tiny_loaded: Loaded) -> None:
    tracking = track(make_gpt2(), [ALL_LINEAR])
    assert len(tracking.blocks) == 2 * 4 * 2
    assert set(tracking.skipped.values()) == {
        "trainable, but an embedding",
        "trainable, but an embedding, shared with the vocabulary projection",
        "trainable, but of a norm",
    }


def test_all_linear_is_not_for_a_model_with_an_adapter() -> None:
    with pytest.raises(FinetraceError, match="it is the adapter that was trained; leave out --modules"):
        track(with_lora(make_llama()), [ALL_LINEAR])


def plan(rows: int = 100, stored: int = 4) -> Plan:
    return Plan(make_encoded([10] * rows), 40, 4, stored)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_the_largest_projection_that_fits_is_taken(share: float) -> None:
    model = make_llama(hidden=64, intermediate_size=96)
    whole = track(model, [ALL_LINEAR])
    budget = Budget(int(share * plan().disk(whole)), None, True)
    chosen, why = fit(model, [ALL_LINEAR], 3, plan(), budget)
    assert (chosen.kind, chosen.outputs, chosen.seed) == ("two-sided", chosen.inputs, 3)
    assert plan().disk(track(model, [ALL_LINEAR], chosen)) <= budget.disk
    larger = Projection("two-sided", chosen.outputs + 8, chosen.inputs + 8)
    assert plan().disk(track(model, [ALL_LINEAR], larger)) > budget.disk
    assert why.startswith(f"projection: {chosen.text}, the largest of its kind that fits")
    assert "(--disk)" in why


def beside(loaded: Loaded) -> int:
    """Bytes of a row's hidden states and loss in float64."""
    return 8 * (len(DEFAULT_REPRESENTATIONS) * loaded.model.config.hidden_size + 1)


def test_hidden_states_are_in_the_budget_and_in_a_shard(
    whole: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients would fit without them."""
    rows, header = 60, 1000
    projected = 8 * track(whole.model, [ALL_LINEAR], Projection("two-sided", 16, 16)).width + beside(whole)
    monkeypatch.setattr(sizing, "SHARD_BYTES", 50 * projected)
    budget = rows * (8 * track(whole.model, [ALL_LINEAR]).width + beside(whole) // 2)
    examples, encoder = make_examples(rows), Encoder(whole.tokenizer)
    index, _ = build_index(whole, examples, tmp_path / "i", encoder, disk=budget, projection="auto")
    assert index.manifest.projection == "two-sided:16x16"
    assert index.manifest.rows_per_shard == 50
    sizes = [path.stat().st_size for path in (tmp_path / "i" / "shards").iterdir()]
    assert sum(sizes) == pytest.approx(rows * projected, abs=2 * header)
    assert sum(sizes) <= budget
    assert max(sizes) <= sizing.SHARD_BYTES + header


def test_the_rows_of_a_shard_stay_what_they_were(whole: Loaded, tmp_path: Path) -> None:
    first, _ = build(whole, tmp_path / "i", rows_per_shard=4)
    assert build(whole, tmp_path / "i")[0].manifest == first.manifest


def test_memory_decides_too_and_half_precision_takes_half_the_disk() -> None:
    model = make_llama(hidden=64, intermediate_size=96)
    whole = track(model, [ALL_LINEAR])
    assert plan(stored=2).disk(whole) == plan().disk(whole) // 2
    budget = Budget(1 << 40, plan().memory(whole, device=False) // 2, memory_given=True)
    chosen, why = fit(model, [ALL_LINEAR], 0, plan(), budget)
    assert chosen.kind == "two-sided"
    assert "of memory, where" in why
    assert "(--memory)" in why
    assert fit(model, [ALL_LINEAR], 0, plan(), Budget(1 << 40, None))[0] == Projection()


def test_what_does_not_fit_at_all_is_refused(whole: Loaded, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match=r"does not fit even with --projection two-sided:8x8: .* \(--disk\); free"):
        build(whole, tmp_path / "i", disk=100)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 tb", 1500 * 10**9),
        ("512MiB", 512 << 20),
        ("7", 7),
        ("1.5gb", 1_500_000_000),
        ("1k", 1000),
        ("10B", 10),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes("--disk", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "12XB", "1e3", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(FinetraceError, match="not a size; write it as 20GB or 500MB"):
        parse_bytes("--disk", text)


def test_what_auto_chose_stays(whole: Loaded, tmp_path: Path) -> None:
    size = plan(ROWS).disk(track(whole.model, [ALL_LINEAR])) * 2  # float64
    size = size // 3 + ROWS * beside(whole)
    index, said = build(whole, tmp_path / "i", disk=size, projection_seed=5, rows_per_shard=4)
    assert index.manifest.projection == "two-sided:8x8"
    assert index.manifest.projection_seed == 5
    before = {p.name: p.read_bytes() for p in (tmp_path / "i" / "shards").iterdir()}
    (tmp_path / "i" / "shards" / "000000004.safetensors").unlink()
    again, said = build(whole, tmp_path / "i", projection_seed=5, rows_per_shard=4)  # with all the disk there is
    assert again.manifest == index.manifest
    assert {p.name: p.read_bytes() for p in (tmp_path / "i" / "shards").iterdir()} == before
    assert len(said) == 1


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.seen.add(tuple(each.shape))
        return out


def test_two_sides_never_form_the_whole_gradient() -> None:
    model = make_llama(tied=True, intermediate_size=40)
    items = make_encoded([9, 9, 9])
    full = {(3, 40, 16), (3, 16, 40), (3, 16, 16), (3, 640), (3, 256)}
    for text, formed in (("none", True), ("two-sided:4x4", False)):
        with Shapes() as shapes:
            Collector(model, track(model, [ALL_LINEAR], Projection.parse(text)), ()).collect(items, names(items))
        assert bool(full & shapes.seen) == formed


def test_the_facade_and_every_method(tmp_path: Path) -> None:

    folder = tmp_path / "i"
    model = make_llama(tied=True)
    index = build_in_memory(model, make_tokenizer(), make_examples(ROWS), folder, projection="two-sided:8x8")
    assert index.manifest.projection == "two-sided:8x8"
    queries = make_examples(2, seed=5)
    problem = Problem(index, queries)
    specs = standard(index)
    assert any(spec.startswith("ekfac") for spec in specs)
    assert not any("at=start" in spec for spec in specs)
    for spec in (default_method(index), "exact", "kfac", "datainf:layers=last-half", "lissa", "selfinf", "gradnorm"):
        assert np.isfinite(make(spec).score(problem).values).all()
    flat = build_in_memory(model, make_tokenizer(), make_examples(ROWS), tmp_path / "f", projection="sparse:40")
    assert default_method(flat) == "exact:normalise=cosine"
    assert not any("kfac" in spec for spec in standard(flat))
    assert np.isfinite(flat.trace(queries).values).all()


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    save_base(tmp_path / "base", make_llama(tied=True).float())
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "response": f"r {i}"}) + "\n" for i in range(5)))
    base = [data, "--model", tmp_path / "base", "--dtype", "float32", "--batch-tokens", 64]
    code, out, err = run(capsys, "index", *base, "--out", tmp_path / "i", "--disk", "30kB")
    assert code == 0, err
    assert "the model has no adapter, so all of its linear layers are tracked" in err
    assert (
        "projection: two-sided:8x8, the largest of its kind that fits, 896 entries a row; unprojected, 5 rows of" in err
    )
    assert "not tracked: model.embed_tokens.weight (trainable, but an embedding, shared" in err
    assert "gradients projected by two-sided:8x8 (seed 0)" in out
    assert open_index(tmp_path / "i").manifest.projection == "two-sided:8x8"
    code, _, err = run(
        capsys, "trace", "--index", tmp_path / "i", "--ask", "p1", "--answer", "r 1", "--method", "ekfac"
    )
    assert code == 0, err
    for wrong, words in (
        (["--projection", "gauss:4"], "--projection gauss:4: not known"),
        (["--disk", "much"], "--disk much: not a size"),
        (["--projection", "none", "--disk", "1GB"], "--disk and --memory are limits of --projection auto"),
        (["--modules", "q_proj", "--memory", "1GB"], "and the projection is none; use auto, or leave them out"),
        (["--projection", "rademacher:4", "--kronecker", "data"], "no two sides"),
    ):
        code, _, err = run(capsys, "index", *base, "--out", tmp_path / "j", *wrong)
        assert code == 2
        assert words in err
