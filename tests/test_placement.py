"""Layers on several devices: the numbers of one device, and one sentence for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run
from finetrace import placement, prefix
from finetrace.collection import Collector, Representation, collect, track
from finetrace.collection.fused_plan import plan
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.index import build_index
from finetrace.models import Loaded, ModelSpec, load
from finetrace.reading import write_examples
from test_index import files
from tiny import make_encoded, make_examples, make_gpt2, names, relative_error, save_base

LLAMA = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
GPT2 = ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head")
LENGTHS = [9, 31, 4, 17, 17, 40, 5, 25]


class Named(str):
    """A device by a name of its own: accelerate takes what equals "cpu" for a place where weights wait."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


NAMES = (torch.device("cpu"), Named("cpu"))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PLACES = [
    pytest.param(NAMES, 0.0, id="two names of the CPU"),
    pytest.param((0, torch.device("cpu")), 1e-5, id="a GPU and the CPU", marks=[pytest.mark.cuda, CUDA]),
    pytest.param((0, 1), 1e-5, id="two GPUs", marks=[pytest.mark.cuda, TWO]),
]


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads with the first modules on one device and the rest on another, in the order of `modules`."""

    def loaded(spec: ModelSpec, modules: tuple[str, ...], places: tuple[Any, Any], first: int = 3) -> Loaded:
        devices = {name: places[i >= first] for i, name in enumerate(modules)}
        with monkeypatch.context() as patch:
            patch.setattr(placement, "asked", lambda device_map: devices)
            found = load(ModelSpec(spec.model, spec.adapter, spec.dtype, device_map="auto"))
        assert any(hasattr(module, "_hf_hook") for module in found.model.modules()), "accelerate is not at work"
        return found

    return loaded


@pytest.mark.parametrize(("places", "tolerance"), PLACES)
@pytest.mark.parametrize("modules", [None, [r"self_attn", r"lm_head"], [r"layers\.1\.mlp"]])
def test_features_and_sums_are_those_of_one_device(
    base_folder: Path, adapter_folder: Path, spread: Any, places: Any, tolerance: float, modules: Any
) -> None:
    """With LoRA, with the head, and with layers that a frozen prefix lies below."""
    spec = ModelSpec(str(base_folder), None if modules else str(adapter_folder), "float64", "cpu")
    items = make_encoded(LENGTHS)
    wanted = [Representation(), Representation(-2, "mean-response")]
    if modules and "mlp" in modules[0]:
        del wanted[1]  # a pass that asks for hidden states goes through all layers
    found = []
    for loaded in (load(spec), spread(spec, LLAMA, places)):
        prefix.forget()
        tracking = track(loaded.model, modules)
        collector = Collector(loaded.model, tracking, wanted, 70, fused=False)
        sums = collector.factor_sums("model")
        collector.collect(items, names(items))  # what a prefix keeps is found again
        found.append((collector.collect(items, names(items), factors=sums), sums))
    (one, its), (several, theirs) = found
    assert one.sampled is not None and several.sampled is not None
    pairs = [(several.gradients, one.gradients), (several.sampled, one.sampled), (several.losses, one.losses)]
    pairs += [(several.representations[name], value) for name, value in one.representations.items()]
    pairs += [(theirs.left[name].cpu(), value) for name, value in its.left.items()]
    pairs += [(theirs.right[name].cpu(), value) for name, value in its.right.items()]
    assert theirs.tokens == its.tokens
    for ours, expected in pairs:
        assert ours.device.type == "cpu"
        assert torch.equal(ours, expected) if tolerance == 0 else relative_error(ours, expected) < tolerance


@pytest.mark.parametrize(("places", "tolerance"), PLACES[:1])
def test_half_precision_keeps_its_wide_sums(tmp_path: Path, spread: Any, places: Any, tolerance: float) -> None:
    """Norms of GPT-2 are computed in float32, also where accelerate stands before them; afterwards all is as it was."""
    save_base(tmp_path / "gpt2", make_gpt2())
    spec = ModelSpec(str(tmp_path / "gpt2"), None, "bfloat16", "cpu")
    items = make_encoded(LENGTHS)
    found = []
    for loaded in (load(spec), spread(spec, GPT2, places)):
        before = [module.__dict__.get("_old_forward") for module in loaded.model.modules()]
        collector = Collector(loaded.model, track(loaded.model, ["c_attn"]), (), 70)
        found.append(collector.collect(items, names(items)).gradients)
        assert [module.__dict__.get("_old_forward") for module in loaded.model.modules()] == before
    assert torch.equal(found[0], found[1])


def test_an_index_has_the_bytes_of_one_device(
    base_folder: Path, adapter_folder: Path, spread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By autograd on the CPU; the pass by hand does not know a model that accelerate stands before."""
    monkeypatch.setattr(collect, "BY_HAND", ())
    spec = ModelSpec(str(base_folder), str(adapter_folder), "float32", "cpu")
    for name, loaded in (("one", load(spec)), ("several", spread(spec, LLAMA, NAMES))):
        assert (plan(loaded.model, track(loaded.model)) is None) == (name == "several")
        build_index(
            loaded, make_examples(7), tmp_path / name, Encoder(loaded.tokenizer), rows_per_shard=3, kronecker="model"
        )
    assert files(tmp_path / "one") == files(tmp_path / "several")


def test_what_a_map_may_be(tmp_path: Path) -> None:
    assert placement.asked(None) is None
    assert [placement.asked(word) for word in placement.WORDS] == list(placement.WORDS)
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"model": 0, "lm_head": "cpu"}))
    assert placement.asked(str(path)) == {"model": 0, "lm_head": "cpu"}
    for content in ("{", "[1]", '{"model": null}'):
        path.write_text(content)
        with pytest.raises(FinetraceError, match=r"--device-map .*map\.json.*auto, balanced"):
            placement.asked(str(path))
    with pytest.raises(FinetraceError, match="--device-map everywhere: neither a word nor a file"):
        placement.asked("everywhere")


def test_weights_that_wait_in_memory_are_refused(base_folder: Path, spread: Any) -> None:
    """Beside a device that computes, accelerate keeps what is on "cpu" there only between passes."""
    spec = ModelSpec(str(base_folder), None, "float64", "cpu")
    with pytest.raises(FinetraceError, match="the devices have no room for .* weights, .* for one"):
        spread(spec, LLAMA, (torch.device("cpu"), "cpu"))


def test_weights_that_wait_on_disk_are_refused(base_folder: Path, tmp_path: Path, capsys: Any) -> None:
    data, devices = tmp_path / "train.jsonl", tmp_path / "map.json"
    write_examples(data, make_examples(3))
    devices.write_text(json.dumps({name: "disk" if "layers.1" in name else "cpu" for name in LLAMA}))
    asked = ["index", data, "--out", tmp_path / "i", "--model", base_folder, "--device-map", devices]
    code, out, err = run(capsys, *asked)
    assert (code, out) == (2, "")
    assert "the devices have no room for" in err
    assert "Traceback" not in err
    assert not (tmp_path / "i").exists()


def test_a_map_onto_one_device_is_that_device(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data, devices = tmp_path / "train.jsonl", tmp_path / "map.json"
    write_examples(data, make_examples(5))
    devices.write_text(json.dumps({"": "cpu"}))
    asked = ["index", data, "--model", base_folder, "--adapter", adapter_folder, "--dtype", "float64", "--out"]
    assert run(capsys, *asked, tmp_path / "one", "--device", "cpu")[0] == 0
    assert run(capsys, *asked, tmp_path / "two", "--device-map", devices)[0] == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    tracing = ["trace", "--index", tmp_path / "two", "--ask", "abc", "--answer", "abd", "--method", "gradsim"]
    tracing += ["--format", "csv"]
    plain = run(capsys, *tracing, "--device", "cpu")
    mapped = run(capsys, *tracing, "--device-map", devices)
    assert plain[0] == mapped[0] == 0
    assert plain[1] == mapped[1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["index", "DATA", "--out", "i", "--device", "cpu"], "leave out --device cpu"),
        (["index", "DATA", "--out", "i", "--workers", "2"], "leave out --workers, or use --engine ray"),
        (["validate", "--index", "i", "--queries", "DATA"], "retraining has its model on one device"),
        (["clean", "--index", "i", "--bad", "DATA", "--retrain"], "retraining has its model on one device"),
    ],
)
def test_what_cannot_go_together(tmp_path: Path, base_folder: Path, capsys: Any, command: list[str], said: str) -> None:
    data = tmp_path / "train.jsonl"
    write_examples(data, make_examples(3))
    words = [str(data) if word == "DATA" else word for word in command]
    words += ["--model", str(base_folder)] if command[0] == "index" else []
    code, out, err = run(capsys, *words, "--device-map", "auto")
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_model_in_memory_with_weights_elsewhere_is_refused() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(FinetraceError, match=r"mine: the devices have no room for 2 weights, weight for one"):
        placement.refuse_offloaded(model, "mine")
