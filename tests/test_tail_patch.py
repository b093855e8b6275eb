"""One optimizer step on the rows that a method names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetrace.attribution import Problem, make
from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.evaluation.tail_patch import tail_patch
from finetrace.generation import generate
from finetrace.index import build_index, open_index
from finetrace.models import Loaded, ModelSpec
from tiny import make_examples, make_llama, make_tokenizer, with_lora


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_patch_is_a_step_of_torchs_adam(tmp_path: Path, loss_on: str) -> None:
    """On the index's own loss; what falls is the loss of the answers alone."""
    loaded = Loaded(with_lora(make_llama()), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    examples, queries = make_examples(7), make_examples(3, seed=5)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer, loss_on))
    scores = make("gradsim").score(Problem(index, queries)).values
    found = tail_patch(index, queries, {"m": scores, "again": 2 * scores, "minus": -scores}, 3, 1e-3)
    assert np.array_equal(found["m"], found["again"])
    encoder = Encoder(loaded.tokenizer, loss_on)
    asked = Encoder(loaded.tokenizer).encode_all(queries)[0]
    for q in range(3):
        model = with_lora(make_llama())
        weights = [p for name, p in model.named_parameters() if "lora_" in name]
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        rows = encoder.encode_all([examples[i] for i in np.argsort(-scores[q])[:3]])[0]
        total = torch.zeros((), dtype=torch.float64)
        for item in rows:
            ids, mask = torch.tensor(item.ids).long()[None], torch.tensor(item.weights > 0)[1:]
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask]) / 3
        before = mean_losses(model, [asked[q]])
        total.backward()
        optimizer.step()
        expected = float(before - mean_losses(model, [asked[q]]))
        assert found["m"][q] == pytest.approx(expected, rel=1e-6)
    if loss_on == "response":  # which is what the scores are of
        assert found["m"].mean() > 0 > found["minus"].mean()  # proponents help, opponents harm


def test_a_model_left_in_train_mode_draws_nothing(tmp_path: Path) -> None:
    """As PEFT leaves one after training."""
    loaded = Loaded(with_lora(make_llama()), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    drops = [module for module in loaded.model.modules() if "lora_dropout" in dir(module)]
    for module in drops:
        module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    queries = make_examples(3, seed=5)
    index, _ = build_index(loaded, make_examples(7), tmp_path / "i", Encoder(loaded.tokenizer))
    scores = {"m": make("gradsim").score(Problem(index, queries)).values}
    wanted, answers = tail_patch(index, queries, scores, 3, 1e-3), generate(loaded, queries, max_new_tokens=6)
    losses = mean_losses(loaded.model, index.encoder("response").encode_all(queries)[0])
    assert drops
    loaded.model.train()
    assert np.array_equal(tail_patch(index, queries, scores, 3, 1e-3)["m"], wanted["m"])
    assert generate(loaded, queries, max_new_tokens=6) == answers
    assert torch.equal(mean_losses(loaded.model, index.encoder("response").encode_all(queries)[0]), losses)
    assert loaded.model.training  # and left as it was


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = Loaded(with_lora(make_llama()), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    index, _ = build_index(loaded, make_examples(4), tmp_path / "i", Encoder(loaded.tokenizer))
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    tail_patch(index, make_examples(2, seed=5), {"m": np.ones((2, 4))}, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.named_parameters())


def test_what_cannot_be_patched_is_said(tmp_path: Path) -> None:
    model = with_lora(make_llama())
    model.peft_config["default"].init_lora_weights = True
    loaded = Loaded(model, make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    index, _ = build_index(loaded, make_examples(4), tmp_path / "i", Encoder(loaded.tokenizer))
    with pytest.raises(FinetraceError, match="5 of 4 rows"):
        tail_patch(index, make_examples(1, seed=5), {"m": np.ones((1, 4))}, 5)
    start, _ = build_index(loaded, make_examples(4), tmp_path / "s", Encoder(loaded.tokenizer), at="start")
    queries, scores = make_examples(2, seed=5), {"m": np.ones((2, 4))}
    assert np.array_equal(tail_patch(start, queries, scores, 2)["m"], tail_patch(index, queries, scores, 2)["m"])


def test_a_model_in_half_precision_is_patched_in_float32(tmp_path: Path) -> None:
    """By the same steps, the fall of the losses is that of the same weights in float32, to the last bit."""
    narrow, wide = (with_lora(make_llama().bfloat16()) for _ in range(2))
    wide.load_state_dict(narrow.state_dict())
    wide.float()
    loaded, there = (
        Loaded(model, make_tokenizer(), ModelSpec("tiny", None, name, "cpu"))
        for model, name in ((narrow, "bfloat16"), (wide, "float32"))
    )
    index, _ = build_index(loaded, make_examples(6), tmp_path / "i", Encoder(loaded.tokenizer))
    scores = {"m": np.random.default_rng(0).random((4, 6)), "o": np.random.default_rng(1).random((4, 6))}
    before = {key: (value.dtype, value.clone()) for key, value in narrow.state_dict().items()}
    found = tail_patch(index, make_examples(4, seed=5), scores, 2, 1e-4)
    wanted = tail_patch(open_index(tmp_path / "i", there), make_examples(4, seed=5), scores, 2, 1e-4)
    after = narrow.state_dict()
    assert all(after[key].dtype == dtype and torch.equal(after[key], value) for key, (dtype, value) in before.items())
    for each in scores:
        assert np.array_equal(found[each], wanted[each])
        assert 0 < np.abs(wanted[each]).max() < 2e-3


def test_no_step_is_no_change_in_half_precision(tmp_path: Path) -> None:
    loaded = Loaded(with_lora(make_llama().bfloat16()), make_tokenizer(), ModelSpec("tiny", None, "bfloat16", "cpu"))
    index, _ = build_index(loaded, make_examples(6), tmp_path / "i", Encoder(loaded.tokenizer))
    found = tail_patch(index, make_examples(4, seed=5), {"m": np.ones((4, 6))}, 2, 1e-30)
    assert not found["m"].any()
