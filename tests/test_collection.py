"""Gradients by hooks against their definition: autograd of one example at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
)

from finetrace.collection import Collector, Features, Representation, track
from finetrace.collection.hooks import _summed
from finetrace.collection.representations import FINAL, POOLINGS
from finetrace.encoding import Encoded, Encoder
from finetrace.errors import FinetraceError
from finetrace.forward import Batch, example_losses, token_losses
from tiny import (
    SMALL,
    VOCABULARY,
    conversation,
    make_encoded,
    make_examples,
    make_gpt2,
    make_llama,
    names,
    one_at_a_time,
    relative_error,
    with_lora,
)

LENGTHS = [9, 31, 2, 17, 17, 40, 3, 25, 12, 38]
BUDGETS = [1, 60, 100_000]
TOLERANCE = 1e-10


def tracked_parameters(tracking: Any) -> list[torch.nn.Parameter]:
    """The parameters of the blocks, in their order."""
    found = []
    for layer in tracking.layers:
        found.append(layer.module.weight)
        found += [layer.module.bias] if layer.bias is not None else []
    return found


def collect(
    model: Any,
    items: Sequence[Encoded],
    modules: Sequence[str] | None = None,
    budget: int = 100_000,
    wanted: tuple[Representation, ...] = FINAL,
) -> Features:
    return Collector(model, track(model, modules), wanted, budget).collect(items, names(items))


MODELS = {
    "llama-lora": lambda: (with_lora(make_llama()), None),
    "llama-lora-every-linear": lambda: (with_lora(make_llama(), "all-linear"), None),
    "llama-lora-upper-layer": lambda: (with_lora(make_llama(), layers_to_transform=[1]), None),
    "llama-lora-tied": lambda: (with_lora(make_llama(tied=True)), None),
    "llama-lora-head": lambda: (with_lora(make_llama(), ["q_proj", "lm_head"]), None),
    "llama-lora-tied-head": lambda: (with_lora(make_llama(tied=True), ["v_proj", "lm_head"]), None),
    "llama-lora-bias": lambda: (with_lora(make_llama(), lora_bias=True), None),
    "llama-rslora": lambda: (with_lora(make_llama(), use_rslora=True), None),
    "gpt2-lora": lambda: (with_lora(make_gpt2(), ["c_attn", "c_proj"], fan_in_fan_out=True), None),
    "llama-linear": lambda: (make_llama(), [r"q_proj$", r"down_proj$"]),
    "llama-linear-bias": lambda: (make_llama(attention_bias=True), [r"layers\.[01]\.self_attn"]),
    "llama-head": lambda: (make_llama(), ["lm_head"]),
    "llama-head-and-layers": lambda: (make_llama(), ["."]),
    "gpt2-conv1d": lambda: (make_gpt2(), [r"\.mlp\.", "c_attn"]),
    "llama-lora-modules": lambda: (with_lora(make_llama()), [r"layers\.1"]),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_hooks_equal_autograd(name: str, budget: int) -> None:
    model, modules = MODELS[name]()
    items = make_encoded(LENGTHS)
    tracking = track(model, modules)
    if "bias" in name or "gpt2-conv1d" in name:
        assert any(layer.bias is not None for layer in tracking.layers)
        for layer in tracking.layers:
            if layer.bias is not None:
                torch.nn.init.normal_(layer.module.bias, std=0.1)
    gradients, losses = one_at_a_time(model, items, tracked_parameters(tracking))
    found = Collector(model, tracking, batch_tokens=budget).collect(items, names(items))
    assert found.gradients.dtype == torch.float64
    assert found.gradients.shape == (len(items), tracking.width) == gradients.shape
    assert relative_error(found.gradients, gradients) < TOLERANCE
    assert relative_error(found.losses, losses) < TOLERANCE
    for block, parameter in zip(tracking.blocks, tracked_parameters(tracking), strict=True):
        assert block.shape == tuple(parameter.shape)
        assert gradients[:, block.columns].norm() > 0, "a test of zeros tests nothing"


def test_a_layer_called_twice_adds_up() -> None:
    model = make_llama(layers=3)
    model.model.layers[2] = model.model.layers[0]
    model = with_lora(model)
    tracking = track(model)
    assert len(tracking.layers) == 8  # two layers, two projections, A and B
    items = make_encoded(LENGTHS)
    gradients, losses = one_at_a_time(model, items, tracked_parameters(tracking))
    found = collect(model, items)
    assert relative_error(found.gradients, gradients) < TOLERANCE
    assert relative_error(found.losses, losses) < TOLERANCE


def test_the_gradient_predicts_a_step() -> None:
    """Finite differences know nothing of autograd."""
    model = with_lora(make_llama())
    items = make_encoded([20, 11])
    tracking = track(model)
    found = Collector(model, tracking).collect(items, names(items))
    direction = torch.randn(tracking.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for layer in track(moved).layers:
                layer.module.weight += sign * 1e-5 * direction[layer.weight.columns].reshape(layer.weight.shape)
        losses.append(Collector(moved, track(moved)).collect(items, names(items)).losses)
    assert torch.allclose((losses[0] - losses[1]) / 2e-5, found.gradients @ direction, rtol=1e-7)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("build", [lambda: with_lora(make_llama(layers=3)), lambda: with_lora(make_gpt2(), ["c_attn"])])
def test_representations_are_the_models_own(build: Any, pooling: Any) -> None:
    model = build()
    layers = model.config.num_hidden_layers
    items = make_encoded(LENGTHS)
    wanted = tuple(Representation(layer, pooling).resolve(layers) for layer in range(layers + 1))
    found = collect(model, items, budget=120, wanted=wanted)
    assert list(found.representations) == [f"{pooling}@{layer - layers - 1}" for layer in range(layers + 1)]
    for i, item in enumerate(items):
        with torch.no_grad():
            output = model(input_ids=torch.from_numpy(item.ids).long()[None], output_hidden_states=True)
        loss_tokens = torch.from_numpy(item.weights > 0)
        for layer, state in enumerate(output.hidden_states):
            expected = {
                "last-prompt": state[0, item.prompt_length - 1],
                "last-token": state[0, int(loss_tokens.nonzero().max())],
                "mean-response": state[0, loss_tokens].mean(0),
            }[pooling]
            got = found.representations[wanted[layer].name][i]
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_names_of_representations() -> None:
    assert Representation.parse("last-prompt") == Representation(-1, "last-prompt")
    assert Representation.parse("mean-response@3").resolve(4) == Representation(-2, "mean-response")
    assert Representation.parse("last-token@-5").resolve(4) == Representation(-5, "last-token")
    assert Representation(4).resolve(4) == Representation(-1)
    assert Representation.parse("mean-response@0.75").resolve(30) == Representation(-9, "mean-response")  # layer 22
    assert Representation(0.5).resolve(2) == Representation(-2)
    assert Representation(0.75).resolve(1) == Representation(-1)  # the embedding is no layer
    with pytest.raises(TypeError, match="resolve it"):
        _ = Representation(0.75).place
    with pytest.raises(FinetraceError, match=r"layer 1\.5: a share"):
        Representation(1.5).resolve(4)
    for text in ("last", "", "last-token@x", "last-token@--3", "last-token@1-2", "last-token@²", "last-token@"):
        with pytest.raises(FinetraceError, match="not a representation"):
            Representation.parse(text)
    for layer in (5, -6):
        with pytest.raises(FinetraceError, match=r"layer -?\d: the model has layers 0 \(embedding\) to 4"):
            Representation(layer).resolve(4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(1, 400), st.randoms(use_true_random=False))
def test_neither_batch_nor_order_matters(lengths: list[int], budget: int, draw: Any) -> None:
    model = SHARED_MODEL
    items = make_encoded(lengths)
    order = list(range(len(items)))
    draw.shuffle(order)
    one = collect(model, items, budget=1)
    other = collect(model, [items[i] for i in order], budget=budget)
    assert relative_error(other.gradients, one.gradients[order]) < TOLERANCE
    assert relative_error(other.losses, one.losses[order]) < TOLERANCE
    for name, rows in one.representations.items():
        assert relative_error(other.representations[name], rows[order]) < TOLERANCE


SHARED_MODEL = with_lora(make_llama())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(final_logit_softcapping=2.0, attn_logit_softcapping=3.0, sliding_window=8, head_dim=8),
        GraniteConfig(logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.5),
        CohereConfig(logit_scale=0.25),
        Phi3Config(),
    ],
    ids=lambda config: config.model_type,
)
def test_scaled_and_capped_logits(config: Any) -> None:
    for key, value in {**SMALL, "max_position_embeddings": 128}.items():
        setattr(config, key, value)
    if config.model_type == "gemma2":
        config.layer_types = ["sliding_attention", "full_attention"]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    targets = ["qkv_proj"] if config.model_type == "phi3" else ["q_proj", "v_proj"]
    model = with_lora(model, targets)
    items = make_encoded(LENGTHS)
    gradients, losses = one_at_a_time(model, items, tracked_parameters(track(model)))
    found = collect(model, items, budget=100)
    assert relative_error(found.losses, losses) < TOLERANCE
    # norms and softmax are float32 whatever the model is, and going back round otherwise in other batches on some processors
    near = TOLERANCE if config.model_type == "granite" else 1e-7
    assert relative_error(found.gradients, gradients) < near
    for item, loss in zip(items, found.losses, strict=True):
        ids = torch.from_numpy(item.ids).long()[None]
        labels = torch.where(torch.from_numpy(item.weights > 0)[None], ids, -100)
        with torch.no_grad():
            own = model(input_ids=ids, labels=labels).loss  # transformers computes it in float32
        assert float(own) == pytest.approx(float(loss), rel=1e-5)


def test_token_losses_of_a_batch() -> None:
    model = make_llama()
    batch = Batch.of(make_encoded([5, 12, 8]))
    assert len(batch) == 3
    assert batch.counts == tuple(torch.bincount(batch.example).tolist())
    with torch.no_grad():
        losses, layers = token_losses(model, batch)
        whole = model(input_ids=batch.ids).logits.log_softmax(-1)  # (B, T, vocabulary)
    expected = torch.stack(
        [
            -whole[row // 12, row % 12, target]
            for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)
        ]
    )
    assert torch.allclose(losses, expected, rtol=1e-12)
    assert set(layers) == {-1}
    assert torch.allclose(
        example_losses(batch, torch.ones_like(losses)), torch.ones(3, dtype=torch.float64), atol=1e-15
    )


# what is refused


def test_one_weight_of_two_layers_is_refused() -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    for pattern, shown, other in (
        ("up_proj", 0, 1),
        (r"layers\.0\.mlp\.up_proj", 0, 1),
        (r"layers\.1\.mlp\.up_proj", 1, 0),
    ):
        place = r"layers\.{}\.mlp\.up_proj"
        match = place.format(shown) + ": this layer shares its weight with model." + place.format(other)
        with pytest.raises(FinetraceError, match=match + ".* name other layers"):
            track(model, [pattern])


def test_one_weight_of_two_layers_is_refused_where_one_of_them_is_named() -> None:
    """Layers that an adapter repeats have one base weight; its gradient had been that of one of them alone."""
    model = with_lora(make_llama(layers=3), layer_replication=[(0, 2), (1, 3)])
    with pytest.raises(
        FinetraceError, match=r"layers\.1.*base_layer: this layer shares its weight with model\.layers\.2"
    ):
        track(model, [r"layers\.1\..*q_proj\.base_layer"])
    assert len(track(model, [r"layers\.0\..*q_proj\.base_layer"]).blocks) == 1
    assert len(track(model).blocks) == 16


def test_one_pattern_is_not_read_letter_by_letter(llama: Any) -> None:
    assert track(llama, "v_proj") == track(llama, ["v_proj"])


@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_under_dora_is_refused(biased: bool) -> None:
    """It is taken off the layer's output and added again; the weight's gradient is right."""
    model = with_lora(make_llama(attention_bias=biased), use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    modules = [r"v_proj\.base_layer"]
    if biased:
        with pytest.raises(FinetraceError, match=r"v_proj\.base_layer: under DoraLinearVariant .* bias cannot be seen"):
            track(model, modules)
        return
    items = make_encoded(LENGTHS)
    gradients, _ = one_at_a_time(model, items, tracked_parameters(track(model, modules)))
    assert relative_error(collect(model, items, modules).gradients, gradients) < TOLERANCE


def test_what_no_pass_calls_is_not_tracked() -> None:
    """Adapters that are not at work, and what `modules_to_save` has taken the place of; the others as they are loaded again."""
    model = with_lora(make_llama(), ["v_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    first = [f"model.layers.{layer}.self_attn.v_proj.lora_B.default.weight" for layer in (0, 1)]
    assert [block.name for block in track(model, ["lora_B"]).blocks] == first
    model.set_adapter("other")
    assert [block.name for block in track(model, ["lora_B"]).blocks] == first
    assert (
        track(model, ["lora_B"]).layers[0].module
        is model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["other"]
    )
    assert set(track(model, ["base_layer"]).skipped) == {
        f"model.layers.{layer}.self_attn.v_proj.lora_{side}.other.weight" for layer in (0, 1) for side in "AB"
    }
    for parameter in model.parameters():  # as they are once loaded
        parameter.requires_grad_(False)
    assert len(track(model, ["base_layer"]).skipped) == 4
    model.disable_adapter_layers()
    with pytest.raises(FinetraceError, match="lora_B: no linear layer has such a name"):
        track(model, ["lora_B"])
    saved = with_lora(make_llama(), modules_to_save=["lm_head"])
    assert [block.name for block in track(saved, ["lm_head"]).blocks] == ["lm_head.modules_to_save.default.weight"]


def test_a_tied_head_is_refused(llama_tied: Any) -> None:
    with pytest.raises(FinetraceError, match="lm_head: this layer shares its weight with the input embedding"):
        track(llama_tied, ["lm_head"])
    with pytest.raises(FinetraceError, match=r"lm_head.*shares its weight with the input embedding"):
        track(with_lora(make_llama(tied=True), ["lm_head"]), [r"lm_head\.base_layer"])


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Its rows' losses had hung on the padding of their batches."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **sizes)).double().eval()
    with pytest.raises(FinetraceError, match="is_decoder=False.*no causal language model"):
        track(model, ["query"])
    assert track(BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, is_decoder=True, **sizes)), ["query"]).blocks
    other = make_llama(is_decoder=False)  # as some write it who mean no encoder and decoder
    assert track(other, ["q_proj"]).blocks
    other.config.is_causal = False
    with pytest.raises(FinetraceError, match="is_causal=False"):
        track(other, ["q_proj"])


def test_what_cannot_be_tracked_is_said(llama: Any) -> None:
    with pytest.raises(FinetraceError, match=r"no LoRA adapter .* --adapter, or name linear layers with --modules"):
        track(llama)
    with pytest.raises(FinetraceError, match=r"--modules nothing: no linear layer has such a name; there are model\."):
        track(llama, ["nothing"])
    with pytest.raises(FinetraceError, match=r"--modules \(: not a regular expression"):
        track(llama, ["("])
    with pytest.raises(FinetraceError, match="no linear layer"):
        track(llama, ["q_proj", "embed_tokens"])


@pytest.mark.parametrize(
    ("targets", "options"),
    [(["q_proj"], {"use_dora": True}), (["embed_tokens"], {})],
)
def test_other_kinds_of_lora_are_refused(targets: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(FinetraceError, match="no exact per-example gradient"):
        track(with_lora(make_llama(), targets, **options))


def test_an_adapter_that_is_not_at_work_is_refused(llama: Any) -> None:
    """Also where it is only that of one layer, whose gradients would be zero."""
    model = with_lora(llama)
    count = len(track(model).blocks)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    for off, on, state in (
        (layer.merge, layer.unmerge, "layers.1.self_attn.v_proj: its adapter is merged"),
        (model.merge_adapter, model.unmerge_adapter, "its adapter is merged, .* unmerge_adapter"),
        (
            model.disable_adapter_layers,
            model.enable_adapter_layers,
            "its adapter is disabled, .* enable_adapter_layers",
        ),
    ):
        off()
        with pytest.raises(FinetraceError, match=state):
            track(model)
        on()
        assert len(track(model).blocks) == count


def test_trained_weights_that_are_not_seen_are_named(llama: Any) -> None:
    assert track(with_lora(llama)).skipped == {}
    model = with_lora(make_llama(), modules_to_save=["lm_head"])
    assert list(track(model).skipped) == ["lm_head.modules_to_save.default.weight"]
    for parameter in model.parameters():  # as a model is that was loaded to be asked
        parameter.requires_grad_(False)
    assert list(track(model).skipped) == ["lm_head.modules_to_save.default.weight"]


def test_modules_to_save_do_not_disturb() -> None:
    model = with_lora(make_llama(), modules_to_save=["lm_head"])
    items = make_encoded(LENGTHS)
    tracking = track(model)
    gradients, _ = one_at_a_time(model, items, tracked_parameters(tracking))
    assert relative_error(collect(model, items).gradients, gradients) < TOLERANCE


class Flat(torch.nn.Module):
    """A layer that sees all tokens in one row, or some of them."""

    def __init__(self, inner: torch.nn.Module, every: int) -> None:
        super().__init__()
        self.expert = inner
        self.every = every

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        made = torch.zeros_like(flat)
        made[:: self.every] = self.expert(flat[:: self.every])
        return made.reshape(hidden.shape)


def flattened(every: int) -> Any:
    """A Llama whose first perceptron is such a layer."""
    model = make_llama()
    model.model.layers[0].mlp = Flat(model.model.layers[0].mlp, every)
    return model


def test_routed_experts_are_refused() -> None:
    """They see tokens without saying whose they are."""
    with pytest.raises(FinetraceError, match=r"mlp\.expert\.gate_proj\.weight: .* leave it out of --modules"):
        collect(flattened(2), make_encoded([5, 6]), ["gate_proj"])


@pytest.mark.parametrize("budget", BUDGETS)
def test_tokens_in_one_row_are_told_apart(budget: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=512, init_std=0.3, pad_token_id=0, **sizes
    )
    cases = [
        (flattened(1), ["gate_proj"]),
        (OPTForCausalLM(config).double().eval(), ["fc1", "fc2"]),
        (with_lora(OPTForCausalLM(config).double().eval(), ["fc1", "fc2", "v_proj"]), None),
    ]
    items = make_encoded(LENGTHS)
    for model, modules in cases:
        tracking = track(model, modules)
        gradients, _ = one_at_a_time(model, items, tracked_parameters(tracking))
        assert relative_error(collect(model, items, modules, budget).gradients, gradients) < TOLERANCE


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_poisoned_row_is_named(budget: int) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    model = with_lora(model)
    items = make_encoded(LENGTHS)
    for item in items:
        item.ids[item.ids == 7] = 8
    items[5].ids[0] = 7
    with pytest.raises(FinetraceError, match=r"example r5 \(row 6\): its loss is not finite"):
        collect(model, items, budget=budget)


def test_an_infinite_gradient_is_named() -> None:
    model = with_lora(make_llama())
    items = make_encoded([12, 15])

    def poison(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda delta: delta / 0)

    model.get_output_embeddings().register_forward_hook(poison)
    with pytest.raises(FinetraceError, match=r"example r1 .*: its gradient is not finite"):
        collect(model, items, budget=1)


def test_nothing_to_collect() -> None:
    with pytest.raises(FinetraceError, match="no example"):
        collect(with_lora(make_llama()), [])


# the model is left as it was


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything a pass could leave behind."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    flags = [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return hooks, flags, [module.training for module in model.modules()], weights


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:3] == other[:3]
    assert all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))


@pytest.mark.parametrize("training", ["eval", "train", "mixed"])
def test_the_model_is_left_as_it_was(training: str) -> None:
    model = with_lora(make_llama())
    model.train(training != "eval")
    if training == "mixed":
        model.get_base_model().model.layers[0].eval()
        next(model.parameters()).requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)  # transformers puts its own hooks in at this
    before = state_of(model)
    collect(model, make_encoded(LENGTHS), budget=80, wanted=(Representation(-2), Representation(-1, "last-token")))
    assert_same(before, state_of(model))


@pytest.mark.parametrize("where", ["callback", "forward", "backward"])
def test_the_model_is_left_as_it_was_by_an_exception(where: str) -> None:
    model = with_lora(make_llama()).train()

    def forward(module: Any, args: Any, output: torch.Tensor) -> None:
        if where == "forward":
            raise KeyboardInterrupt
        if where == "backward" and output.requires_grad:
            output.register_hook(callback)

    def callback(_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.norm.register_forward_hook(forward)
    before = state_of(model)
    collector = Collector(model, track(model), batch_tokens=40)
    items = make_encoded(LENGTHS)
    with pytest.raises(KeyboardInterrupt):
        collector.collect(items, names(items), callback if where == "callback" else lambda count: None)
    assert_same(before, state_of(model))
    handle.remove()


def test_dropout_is_off_during_a_pass() -> None:
    model = with_lora(make_llama())
    items = make_encoded(LENGTHS)
    expected = collect(model, items)
    assert torch.equal(collect(model.train(), items).gradients, expected.gradients)


def test_progress_hears_of_every_row() -> None:
    model = with_lora(make_llama())
    items = make_encoded(LENGTHS)
    heard: list[int] = []
    Collector(model, track(model), batch_tokens=60).collect(items, names(items), heard.append)
    assert sum(heard) == len(items)
    assert len(heard) > 1


def test_within_no_grad() -> None:
    """A caller's no_grad changes nothing."""
    model = with_lora(make_llama())
    items = make_encoded([8, 9])
    expected = collect(model, items).gradients
    with torch.no_grad():
        assert torch.equal(collect(model, items).gradients, expected)


# half and single precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    model = with_lora(make_llama())
    items = make_encoded(LENGTHS)
    exact = collect(model, items)
    found = collect(model.to(dtype), items, budget=100)
    assert found.gradients.dtype == found.losses.dtype == torch.float32
    assert all(rows.dtype == torch.float32 for rows in found.representations.values())
    cosine = torch.nn.functional.cosine_similarity(found.gradients.double(), exact.gradients)
    assert cosine.min() > 0.95
    ratio = found.gradients.double().norm(dim=1) / exact.gradients.norm(dim=1)
    assert ratio.min() > 0.8
    assert ratio.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_a_kind_of_their_own_in_half_precision(dtype: torch.dtype) -> None:
    """Nemotron adds 1 to the weight of a norm; in half precision it had ended in a traceback."""
    torch.manual_seed(0)
    config = NemotronConfig(**{key: value for key, value in SMALL.items() if key != "initializer_range"}, head_dim=8)
    model, items = NemotronForCausalLM(config).eval(), make_encoded(LENGTHS)
    exact = collect(model, items, ["self_attn"], wanted=())
    found = collect(model.to(dtype), items, ["self_attn"], wanted=())
    assert relative_error(found.gradients, exact.gradients) < (0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("head", ["base", "adapter"])
def test_embedded_model_in_float32(embedded: Any, head: str) -> None:
    """On the real model too: batched gradients are those of one example at a time."""
    model = copy.copy(embedded.model)
    lora = with_lora(model, layers_to_transform=[28, 29], rank=4) if head == "adapter" else model
    modules = None if head == "adapter" else [r"layers\.29\.self_attn\.(q|v)_proj"]
    try:
        encoder = Encoder(embedded.tokenizer)
        answers = [
            "Four.",
            "It is a bird that swims.",
            "No",
            "Because the sun is low then, its light goes a longer way.",
        ]
        items = [
            encoder.encode(conversation("Why is that so, and what is it?"[: 8 * k + 7], a))
            for k, a in enumerate(answers)
        ]
        tracking = track(lora, modules)
        gradients, losses = one_at_a_time(lora, items, tracked_parameters(tracking))
        for budget in (1, 150, 4096):
            found = Collector(lora, tracking, batch_tokens=budget).collect(items, names(items))
            assert relative_error(found.gradients, gradients) < 1e-4
            assert relative_error(found.losses, losses) < 1e-5
    finally:
        if head == "adapter":
            lora.unload()
        for parameter in embedded.model.parameters():
            parameter.requires_grad_(True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_equals_the_cpu() -> None:
    model = with_lora(make_llama())
    items = make_encoded(LENGTHS)
    expected = collect(model, items)
    found = collect(model.cuda(), items, budget=100)
    assert found.gradients.device.type == "cpu"
    assert relative_error(found.gradients, expected.gradients) < 1e-5  # rotary angles are float32 everywhere
    assert relative_error(found.losses, expected.losses) < 1e-6


def test_frozen_layers_are_looked_through_only_where_they_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of the layers take whole passes; those of the last layer, or none, do not."""
    asked: list[int] = []
    whole = "finetrace.collection.collect.wide_prefix"
    monkeypatch.setattr(whole, lambda model, wanted: asked.append(len(list(wanted))))
    model, items = with_lora(make_llama(), layers_to_transform=[1]), make_encoded(LENGTHS)
    for wanted, times in ((FINAL, 1), ((), 2), ((Representation(-2, "mean-response"),), 2)):
        collect(model, items, wanted=wanted)
        assert len(asked) == times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_has_a_gradient_however_long_a_row_is(dtype: torch.dtype) -> None:
    """Terms that point anywhere sum to the root of their number; a bound that grows with the number reached it in bfloat16."""
    for tokens in (1, 3, 40_000):
        delta = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = _summed(delta, 1, dtype)
        assert torch.equal(found, delta.sum(1))
        assert not _summed(delta - found[:, None] / tokens, 1, dtype).any()


def test_a_gradient_that_is_rounding_is_none(tokenizer: Any) -> None:
    """A key's bias in a model whose positions do not turn keys: a softmax does not see it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(
        vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=512, init_std=0.3, pad_token_id=0, **sizes
    )
    items, _ = Encoder(tokenizer).encode_all(make_examples(5))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = OPTForCausalLM(config).to(dtype).eval()
        tracking = track(model, ["self_attn"])
        for batch_tokens in (1, 2048):
            found = Collector(model, tracking, (), batch_tokens).collect(items, [f"{i}" for i in range(5)]).gradients
            for block in tracking.blocks:
                norms = found[:, block.columns].norm(dim=1)
                assert (norms == 0).all() if block.name.endswith("k_proj.bias") else (norms > 1e-4).all(), block.name
