"""On a CUDA device everything comes out as on the CPU: features, scores, training, answers; and again the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from finetrace.attribution import Problem, make
from finetrace.batching import batch_budget
from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoder
from finetrace.evaluation.retraining import Retraining, Subset
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finetune
from finetrace.generation import generate
from finetrace.index import build_index
from finetrace.index.store import Index
from finetrace.models import Loaded, ModelSpec, load
from finetrace.prefix import forget
from tiny import make_examples, make_llama, relative_error, save_base

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ROWS = 23
METHODS = (
    "gradsim",
    "gradcos",
    "datainf",
    "lissa",
    "lissa:recurrence=released,damping=0.1,damping_rule=entry",
    "exact",
    "exact:scope=joint",
    "exact:solver=primal",
    "exact:solver=cg",
    "exact:solver=nystroem",
    "kfac",
    "ekfac",
    "ekfac:labels=data,normalise=cosine",
    "ekfac:layers=last-fifth,at=start",
    "ekfac:normalise=cosine,layers=last-half,at=start",
    "gradcos:loss_on=probe",
    "gradcos:loss_on=first:2",
    "repsim",
    "repsim:pooling=mean-response",
    "selfinf",
    "gradnorm",
)


def both(base: Path, adapter: Path | None, dtype: Any = "float64") -> dict[str, Loaded]:
    return {device: load(ModelSpec(str(base), adapter and str(adapter), dtype, device)) for device in ("cpu", "cuda")}


def asked() -> list[Any]:
    return [dataclasses.replace(example, id=f"q{i}") for i, example in enumerate(make_examples(4, seed=9))]


def built(loaded: Loaded, folder: Path, **options: Any) -> Index:
    settings = {"rows_per_shard": 10, "batch_tokens": 200, **options}
    return build_index(loaded, make_examples(ROWS), folder, Encoder(loaded.tokenizer), **settings)[0]


@pytest.fixture(scope="module")
def indexes(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    """Of an adapter that was trained, so that it has a start."""
    home = tmp_path_factory.mktemp("cuda")
    base = load(ModelSpec(str(base_folder), None, "float64", "cpu"))
    finetune(base, make_examples(12, seed=3), home / "adapter", FinetuneConfig(epochs=2, learning_rate=1e-2, rank=2))
    loaded = both(base_folder, home / "adapter")
    return {device: built(each, home / device, kronecker="model") for device, each in loaded.items()}


def test_batches_are_larger_on_a_gpu(base_folder: Path, tmp_path: Path) -> None:
    assert batch_budget(torch.device("cuda")) > batch_budget(torch.device("cpu"))
    loaded = load(ModelSpec(str(base_folder), device="cuda", dtype="float32"))
    index = built(loaded, tmp_path / "i", batch_tokens=None)
    assert index.manifest.batch_tokens == batch_budget(loaded.model.device)


def test_features_and_losses(indexes: dict[str, Index]) -> None:
    cpu, cuda = indexes["cpu"], indexes["cuda"]
    assert cuda.device.type == "cuda"
    assert relative_error(cuda.gradients(slice(None)).cpu(), cpu.gradients(slice(None))) < 1e-5
    assert relative_error(cuda.losses.cpu(), cpu.losses) < 1e-5
    for name in cpu.manifest.representations:
        from finetrace.collection import Representation

        wanted = Representation.parse(name)
        assert relative_error(cuda.representation(wanted).cpu(), cpu.representation(wanted)) < 1e-6


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("step", [None, 7])
def test_scores(indexes: dict[str, Index], spec: str, step: int | None) -> None:
    found = {}
    for device, index in indexes.items():
        options = {} if step is None else {"step": step}
        scores = make(spec).score(Problem(index, asked(), **options)).values
        assert isinstance(scores, np.ndarray)
        found[device] = scores
    bound = 1e-3 if "nystroem" in spec else 1e-5  # the least of its eigenvalues are rounding
    assert np.abs(found["cuda"] - found["cpu"]).max() <= bound * np.abs(found["cpu"]).max()


@pytest.mark.parametrize("projection", ["two-sided:4x4", "rademacher:16", "sparse:16"])
def test_projections_are_the_same_matrices(base_folder: Path, tmp_path: Path, projection: str) -> None:
    found = {
        device: built(each, tmp_path / device, projection=projection, modules=["mlp"]).gradients(slice(None)).cpu()
        for device, each in both(base_folder, None).items()
    }
    assert relative_error(found["cuda"], found["cpu"]) < 1e-6


def test_fine_tuning_and_what_it_says(base_folder: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(epochs=2, learning_rate=1e-2, batch_size=3, rank=2, dropout=0)
    examples, losses, texts = make_examples(8), {}, {}
    for device, loaded in both(base_folder, None).items():
        finetune(loaded, examples, tmp_path / device, config)
        losses[device] = mean_losses(loaded.model, Encoder(loaded.tokenizer).encode_all(examples)[0])
        texts[device] = generate(loaded, examples, max_new_tokens=12)
    again = load(ModelSpec(str(base_folder), None, "float64", "cuda"))
    finetune(again, examples, tmp_path / "again", config)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cuda", "again")]
    assert weights[0] == weights[1]
    assert relative_error(losses["cuda"], losses["cpu"]) < 1e-5
    assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("layers", [None, (1,)])
def test_retrainings_repeat(base_folder: Path, tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    """With and without a frozen part below the trained layers; twice the same but for rounding, and as on the CPU."""
    config = FinetuneConfig(epochs=2, learning_rate=1e-2, batch_size=3, rank=2, layers=layers, dropout=0)
    found = {}
    for name, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        forget()
        base = ModelSpec(str(base_folder), None, "float64", device)
        about = Retraining(base, config, tuple(make_examples(8)), tuple(asked()), tmp_path / name)
        found[name] = [each.losses["response"] for each in about.run([Subset((0, 2, 3, 5)), Subset((0, 1, 4), 1)])]
    np.testing.assert_allclose(found["one"], found["two"], rtol=1e-9)
    np.testing.assert_allclose(found["one"], found["cpu"], rtol=1e-5)


def test_an_unfinished_index_ends_with_the_same_bytes(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    loaded = load(ModelSpec(str(base_folder), str(adapter_folder), "float32", "cuda"))
    whole = built(loaded, tmp_path / "whole", kronecker="model")
    again = built(loaded, tmp_path / "again", kronecker="model")
    apart = built(loaded, tmp_path / "apart", kronecker="model", engine=Engine("processes", workers=2))
    files = sorted(path.relative_to(whole.folder) for path in whole.folder.rglob("*.safetensors"))
    assert len(files) > 3
    for name in files:
        for other in (again, apart):
            assert (other.folder / name).read_bytes() == (whole.folder / name).read_bytes(), (other.folder, name)


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_llama(hidden=64, layers=2))
    loaded = load(ModelSpec(str(base), None, "float32", "cuda"))
    rows = [Example.from_prompt("q", "x" * 400, id=f"long{i}") for i in range(256)]
    encoder, track = Encoder(loaded.tokenizer), {"modules": ["mlp"]}
    small, _ = build_index(loaded, rows[:4], tmp_path / "small", encoder, batch_tokens=500, **track)
    said: list[str] = []
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
        halved, _ = build_index(
            loaded, rows, tmp_path / "halved", encoder, batch_tokens=10**6, say=said.append, **track
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("were halved" in text for text in said)
    assert relative_error(halved.gradients(slice(None))[:4], small.gradients(slice(None))) < 1e-4


def test_the_embedded_model_in_bfloat16(embedded: Loaded, tmp_path: Path) -> None:
    """Half precision ranks as float32 does, on the device as well."""
    found = {}
    for name, spec in {"float32": ModelSpec(dtype="float32"), "bfloat16": ModelSpec(dtype="bfloat16")}.items():
        loaded = load(dataclasses.replace(spec, device="cuda"))
        index = built(loaded, tmp_path / name, modules=[r"layers\.2[0-9]\..*v_proj"], projection="two-sided:32x32")
        found[name] = make("gradcos").score(Problem(index, asked())).values
    for ours, theirs in zip(found["bfloat16"], found["float32"], strict=True):
        assert spearmanr(ours, theirs).statistic > 0.97
