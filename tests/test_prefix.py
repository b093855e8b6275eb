"""Starting above the frozen layers: the same losses, gradients and adapters, and fewer layers run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from finetrace import prefix, training
from finetrace.collection import Collector, track
from finetrace.encoding import Encoder
from finetrace.finetuning import FinetuneConfig, finetune
from finetrace.forward import Batch, token_losses
from finetrace.models import ModelSpec, load
from finetrace.prefix import forget, frozen_prefix
from tiny import make_encoded, make_examples, make_gpt2, make_llama, make_tokenizer, save_base, with_lora


@pytest.fixture(autouse=True)
def empty() -> Any:
    forget()
    yield
    forget()


def gemma2() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=260, num_hidden_layers=3, head_dim=4, pad_token_id=0, bos_token_id=None, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


MODELS = {
    "llama": (lambda: make_llama(layers=3), "layers.2.*(q_proj|v_proj)"),
    "tied": (lambda: make_llama(layers=3, tied=True), "layers.[12].*(q_proj|v_proj)"),
    "gpt2": (lambda: make_gpt2(), "h.1.*c_attn"),
    "gemma2": (gemma2, "layers.2.*v_proj"),
}


def losses_and_gradients(model: Any, batch: Batch, found: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    losses = token_losses(model, batch, prefix=found)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    return losses.detach(), list(torch.autograd.grad(losses.mean(), trained))


def runs(layer: Any) -> list[int]:
    """Grows whenever a layer computes."""
    counted: list[int] = []
    norm = next(module for name, module in layer.named_modules() if "norm" in name or name == "ln_1")
    norm.register_forward_hook(lambda *_: counted.append(1))
    return counted


@pytest.mark.parametrize("singly", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_losses_and_gradients_are_those_of_whole_passes(name: str, singly: bool) -> None:
    build, targets = MODELS[name]
    model = with_lora(build(), rf".*\.{targets}")
    trained = [p for p in model.parameters() if p.requires_grad]
    found = frozen_prefix(model, trained, "x", singly=singly)
    assert found is not None
    assert found.first == {"llama": 2, "tied": 1, "gpt2": 1, "gemma2": 2}[name]
    items = make_encoded([9, 14, 5, 11, 7])
    batches = [Batch.of(items[:3]), Batch.of(items[3:]), Batch.of(items[1:4])]  # the last one in another company
    counted = runs(found.layers[0])
    for turn in range(2):
        for batch in batches if singly or turn else batches[:2] * 2:
            losses, gradients = losses_and_gradients(model, batch, found)
            expected, theirs = losses_and_gradients(model, batch)
            near = 1e-8 if name == "gemma2" else 1e-10  # its norms and softmax are float32, whatever the model is
            torch.testing.assert_close(losses, expected, rtol=near, atol=near)
            for mine, other in zip(gradients, theirs, strict=True):
                torch.testing.assert_close(mine, other, rtol=max(1e-8, near), atol=near)
        counted.clear()
        for batch in batches[:2]:
            token_losses(model, batch, prefix=found)
        assert not counted


def test_left_padding_is_part_of_what_is_kept() -> None:
    model, tokenizer = with_lora(make_llama(), r".*layers.1.*q_proj"), make_tokenizer()
    found = frozen_prefix(model, [p for p in model.parameters() if p.requires_grad], "x", singly=True)
    for width in (0, 60, 70):
        batch = Batch.of(Encoder(tokenizer, "response", pad_to=width or None).encode_all(make_examples(4))[0])
        losses, _ = losses_and_gradients(model, batch, found)
        torch.testing.assert_close(losses, losses_and_gradients(model, batch)[0], rtol=1e-10, atol=1e-10)


def test_nothing_is_spared_where_the_lowest_layer_is_wanted() -> None:
    model = with_lora(make_llama())
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert frozen_prefix(model, adapter, "x", singly=True) is None
    last = [p for n, p in model.named_parameters() if "layers.1." in n and "lora" in n]
    assert frozen_prefix(model, last, "x", singly=True) is not None
    assert frozen_prefix(model, [*last, model.get_input_embeddings().weight], "x", singly=True) is None
    assert frozen_prefix(model, [*last, *model.get_output_embeddings().parameters()], "x", singly=True) is not None
    tied = with_lora(make_llama(tied=True), r".*layers.1.*q_proj")
    assert frozen_prefix(tied, tied.get_output_embeddings().parameters(), "x", singly=True) is None


def test_what_does_not_fit_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(make_llama(), r".*layers.1.*q_proj")
    wanted = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(prefix, "CAPACITY", 16 * 8 * 20)  # twenty tokens of 16 float64
    assert frozen_prefix(model, wanted, "x", singly=True, tokens=21) is None
    found = frozen_prefix(model, wanted, "x", singly=False)
    assert found is not None
    for lengths in ((5, 5), (4, 4), (2, 2)):  # ten tokens, eight more, and four for which there is no room
        token_losses(model, Batch.of(make_encoded(list(lengths))), prefix=found)
    assert sorted(state.shape[:2].numel() for state in found.states.values()) == [4, 8]  # the oldest made room


def test_dropout_below_leaves_training_whole() -> None:
    model = with_lora(make_gpt2(), r".*h.1.*c_attn")
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert frozen_prefix(model, wanted, "x", singly=True) is not None
    assert frozen_prefix(model.train(), wanted, "x", singly=True) is None  # GPT-2 drops 0.1 everywhere


def test_runs_of_one_base_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(make_llama(), r".*layers.1.*q_proj")
    wanted = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(prefix, "CAPACITY", 16 * 8 * 20)
    for seed in range(4):
        found = frozen_prefix(model, wanted, "x", singly=True, tokens=12)
        assert found is not None
        token_losses(model, Batch.of(make_encoded([6, 6], seed=seed)), prefix=found)
        assert sum(state.nbytes for state in found.states.values()) <= prefix.CAPACITY


def test_functional_dropout_below_leaves_training_whole() -> None:
    model = make_llama(attention_dropout=0.5)
    model = with_lora(model, r".*layers.1.*q_proj").train()
    assert frozen_prefix(model, [p for p in model.parameters() if p.requires_grad], "x", singly=True) is None
    before = torch.get_rng_state()
    assert frozen_prefix(model.eval(), [p for p in model.parameters() if p.requires_grad], "x", singly=True) is not None
    assert torch.equal(before, torch.get_rng_state())


def test_states_are_not_shared_between_models_that_differ_below() -> None:
    model = with_lora(make_llama(layers=3))
    wanted = [p for n, p in model.named_parameters() if "layers.2." in n and "lora" in n]
    batch = Batch.of(make_encoded([9, 5]))
    losses = []
    for change in (None, "adapter", "weight"):
        with torch.no_grad():
            if change == "adapter":
                next(p for n, p in model.named_parameters() if "layers.0." in n and "lora_B" in n).mul_(2)
            if change == "weight":
                model.get_base_model().model.layers[1].mlp.down_proj.weight[3, 5] += 1
        found = frozen_prefix(model, wanted, "x", singly=False)
        assert found is not None
        for _ in range(2):
            losses.append(token_losses(model, batch, prefix=found)[0])
        torch.testing.assert_close(losses[-1], token_losses(model, batch)[0])
    assert not torch.equal(losses[1], losses[3])
    assert not torch.equal(losses[3], losses[5])


def test_states_are_not_shared_where_the_trial_looks_the_same() -> None:
    """Models whose chat tokens alone differ, or what lies beyond the trial's length, are others."""
    batch = Batch.of(make_encoded([9, 5]))
    models = [with_lora(make_llama(layers=3)) for _ in range(3)]
    embedding = models[1].get_input_embeddings().weight
    trial = set(torch.linspace(0, len(embedding) - 1, prefix.TRIAL).long().tolist())
    unseen = [token for token in range(len(embedding)) if token not in trial]
    with torch.no_grad():
        embedding[unseen] += 1
    models[2].config.sliding_window = 3  # that the trial's numbers do not show here: it is read at loading
    stores = []
    for model in models:
        wanted = [p for n, p in model.named_parameters() if "layers.2." in n and "lora" in n]
        found = frozen_prefix(model, wanted, "x", singly=False)
        assert found is not None
        stores.append(found.states)
        for _ in range(2):
            torch.testing.assert_close(
                token_losses(model, batch, prefix=found)[0], token_losses(model, batch)[0], rtol=0, atol=0
            )
    assert len({id(states) for states in stores}) == 3
    shared = []
    for model in (with_lora(make_llama(layers=3)), with_lora(make_llama(layers=3))):  # equal models do share
        wanted = [p for n, p in model.named_parameters() if "layers.2." in n and "lora" in n]
        found = frozen_prefix(model, wanted, "x", singly=False)
        assert found is not None
        shared.append(found.states)
    assert shared[0] is shared[1]


def test_a_shared_layer_counts_where_it_is_first_used() -> None:
    model = make_llama(layers=3)
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    shared = list(model.model.layers[2].self_attn.parameters())
    assert frozen_prefix(model, shared, "x", singly=True) is None


def test_checkpointed_models_stay_whole_and_flags_are_left_as_they_were() -> None:
    model = with_lora(make_llama(), r".*layers.1.*q_proj")
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.train()
    model.get_base_model().model.norm.eval()
    assert frozen_prefix(model, wanted, "x", singly=True) is not None
    assert model.training
    assert not model.get_base_model().model.norm.training
    model.gradient_checkpointing_enable()
    assert frozen_prefix(model, wanted, "x", singly=True) is None


def test_a_model_whose_layers_share_more_stays_whole() -> None:
    model = with_lora(make_llama(layers=3), r".*layers.2.*q_proj")
    layers, left = model.get_base_model().model.layers, []
    first, last = layers[0].forward, layers[2].forward
    layers[0].forward = lambda hidden, *args, **kwargs: left.append(1) or first(hidden, *args, **kwargs)
    layers[2].forward = lambda hidden, *args, **kwargs: last(hidden, *args, **kwargs) * len(left and [left.pop()] * 2)
    assert frozen_prefix(model, [p for p in model.parameters() if p.requires_grad], "x", singly=True) is None


def trained(folder: Path, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    loaded = load(ModelSpec(str(folder), dtype="float32", device="cpu"))
    config = FinetuneConfig(epochs=3, learning_rate=1e-2, batch_size=3, layers=(2,), target_modules=("q_proj",), **more)
    finetune(loaded, make_examples(8), out, config)
    return load_file(str(out / "adapter_model.safetensors"))


def test_the_adapter_is_that_of_whole_passes_and_the_same_bits_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base(tmp_path / "base", make_llama(layers=3).float())
    first, again = trained(folder, tmp_path / "1"), trained(folder, tmp_path / "2")  # the second finds states
    forget()
    fresh = trained(folder, tmp_path / "3")
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, fresh[name])
    monkeypatch.setattr(training, "frozen_prefix", lambda *_, **__: None)
    for name, tensor in trained(folder, tmp_path / "4").items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-3, atol=1e-5)


def test_another_loss_of_the_same_batches_starts_above_and_gives_the_same_bits() -> None:
    model, tokenizer = with_lora(make_llama(layers=3), r".*layers.2.*(q_proj|v_proj)"), make_tokenizer()
    examples = make_examples(9)
    ids = [example.id for example in examples]
    layer = model.get_base_model().model.layers[0]

    def gradients(loss_on: str) -> torch.Tensor:
        items = Encoder(tokenizer, loss_on).encode_all(examples)[0]
        return Collector(model, track(model), batch_tokens=100).collect(items, ids).gradients

    whole = gradients("all")
    forget()
    gradients("response")
    counted = runs(layer)
    assert torch.equal(gradients("all"), whole)
    assert len(counted) == 1  # the trial that asks whether the prefix is sound


def test_threads_keep_states_and_make_room_for_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there is room for, so that each that is kept drops another thread's; threads meet while they look for room."""
    size = prefix._size

    def slow(states: dict[bytes, torch.Tensor]) -> int:
        found = size(states)
        time.sleep(1e-4)
        return found

    monkeypatch.setattr(prefix, "_size", slow)
    monkeypatch.setattr(prefix, "CAPACITY", 4 * 1024)
    states: dict[bytes, torch.Tensor] = {}
    kept = prefix.Prefix(torch.nn.Identity(), [], 1, False, states)

    def ask(thread: int) -> bool:
        found = []
        for number in range(40):
            key = (number % 7 + thread).to_bytes(2, "big")
            want = torch.full((256,), float(number % 7 + thread))
            found.append(torch.equal(kept.remembered(key, lambda want=want: want), want))
        return all(found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert 0 < sum(each.nbytes for each in states.values()) <= 4 * 1024
