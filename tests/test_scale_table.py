"""The table of scale reckons with the program's own shapes, blocks, schedule and memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetrace.attribution import make
from finetrace.collection import Collector, track
from finetrace.collection.layers import ALL_LINEAR
from finetrace.collection.projection import Projection
from finetrace.planning.cost import Shape
from finetrace.planning.extrapolation import _shared
from finetrace.planning.schedule import schedule
from tiny import make_encoded, make_llama, names, with_lora

PATH = Path(__file__).parent.parent / "benchmarks" / "scale_table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("scale_table", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_table"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale_table"]


def architecture(table, model):
    config = model.config
    return table.Architecture(
        name="tiny",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        shared=config.num_key_value_heads,
        width=config.head_dim,
        inner=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def test_layers_that_share_an_input_share_a_side_of_their_factors(table):
    model = make_llama()
    layout = table.lora(architecture(table, model), rank=2)
    tuned = with_lora(model, rank=2, targets=("q_proj", "v_proj"))
    collector = Collector(tuned, track(tuned), (), 1000)
    sums, items = collector.factor_sums("data"), make_encoded([5, 9])
    collector.collect(items, names(items), factors=sums)
    assert _shared(sums) == list(layout.shared)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "two_sided", "one_layer"])
def test_layouts_are_those_of_a_loaded_model(table, kind, tied):
    model = make_llama(tie_word_embeddings=tied)
    about = architecture(table, model)
    if kind == "lora":
        layout = table.lora(about, rank=2)
        model = with_lora(model, rank=2, targets=("q_proj", "v_proj"))
        tracking = track(model)
    elif kind == "two_sided":
        layout = table.two_sided(about, k=5)
        tracking = track(model, [ALL_LINEAR], Projection("two-sided", 5, 5))
    else:
        layout = table.one_layer(about, k=5)
        last = rf"layers\.{about.layers - 1}\.mlp\.down_proj"
        tracking = track(model, [last], Projection("two-sided", 5, 5))
    assert layout.shape == Shape.of(model, tracking)
    assert layout.entries == tracking.width
    assert layout.widths == [block.size for block in tracking.blocks]
    matrices = sum(k * d for each in tracking.sides.values() for d, k in (each.outputs, each.inputs) if k < d)
    assert layout.drawn == 2 * matrices


def test_the_models_have_the_weights_that_their_names_say(table):
    assert [round(each.weights / 1e9, 1) for each in table.MODELS] == [0.1, 8.0, 70.6]


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_workers_share_whole_shards_as_the_plan_has_them(table, workers):
    layout = table.lora(table.MODELS[0])
    at = machine(table)
    count, rows = table.shards(layout, 10**4, 2)
    each = rows * (layout.operations(200, 100) / 1e12 + layout.row_bytes(2) / at.disk)
    full = schedule([each] * (10**4 // rows) + [each * (10**4 % rows) / rows], workers, at.startup).seconds
    got = table.collection(layout, 10**4, at, workers, 1e12)
    assert count == -(-(10**4) // rows)
    assert full <= got * (1 + 1e-9), "the last shard is smaller"
    assert got <= full + each
    if workers == 1:
        assert got == pytest.approx(full)


@pytest.mark.parametrize(("n", "m"), [(100, 3), (10**4, 16), (10**6, 16)])
def test_memory_of_exact_is_that_of_the_method(table, n, m):
    widths = [16_384, 4096]
    problem = SimpleNamespace(
        n=n,
        m=m,
        blocks=[SimpleNamespace(size=width) for width in widths],
        features=SimpleNamespace(gradients=torch.zeros(1, dtype=torch.float32)),
    )
    needed = make("exact").held_bytes(problem)
    held = table.exact(widths, n, m, needed)
    assert held.solver.endswith("in memory")
    assert held.held == needed
    assert not table.exact(widths, n, m, needed - 1).solver.endswith("in memory")


def test_a_cosine_beyond_every_matrix_has_no_number(table):
    wide = [32_768] * 4
    assert table.exact(wide, 10**6, 16, 64e9).solver == "nystroem"
    assert table.exact(wide, 10**6, 16, 64e9, cosine=True) is None
    assert table.exact(wide, 10**6, 16, 128e9, cosine=True).solver == "primal"


def test_it_prints_every_model_and_count(table, capsys):
    table.print_tables(machine(table))
    printed = capsys.readouterr().out
    assert printed.count("\n**") == 7
    assert printed.count("| 70B |") == 7 * 3
    for word in ("10⁴", "10⁶", "10⁸"):
        assert word in printed


def machine(table):
    return table.Machine(
        tflops=4e14,
        cpu_tflops=1e11,
        float32_tflops=3e13,
        eigen_tflops=2e10,
        disk=2e9,
        memory=64e9,
        workers=64,
        queries=16,
        tokens=200,
        loss_tokens=100,
        startup=60.0,
    )
