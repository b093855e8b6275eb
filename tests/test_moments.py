"""Gradients where the fine-tuning began: LoRA's B put back to zero while they are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

from finetrace.api import Index
from finetrace.attribution import Problem, make
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.fingerprint import of_adapter
from finetrace.index import build_index, open_index
from finetrace.index.views import view
from finetrace.models import Loaded, ModelSpec
from finetrace.moments import at_moment
from finetrace.tracing import BEST, BEST_AT_END, STANDARD, default_method, standard
from tiny import make_examples, make_llama, make_tokenizer, with_lora


def learnt() -> Loaded:
    """A trained adapter that began as LoRA does, with B at zero."""
    model = with_lora(make_llama())
    model.peft_config["default"].init_lora_weights = True
    return Loaded(model, make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))


def by_autograd(loaded: Loaded, examples: list[Any]) -> torch.Tensor:
    """(n, D) one backward pass an example, in the order of an index's blocks: A and B layer by layer."""
    encoded, _ = Encoder(loaded.tokenizer).encode_all(examples)
    weights = [p for name, p in loaded.model.named_parameters() if "lora_" in name]
    rows = []
    for item in encoded:
        ids = torch.tensor(item.ids).long()[None]
        logits = loaded.model(input_ids=ids).logits[0, :-1]
        mask = torch.tensor(item.weights > 0)[1:]
        loss = torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def test_gradients_at_the_start_are_those_of_an_adapter_whose_b_is_zero(tmp_path: Path) -> None:
    loaded, examples = learnt(), make_examples(6)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer), at="start")
    found = index.gradients(slice(None))
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
        weight.requires_grad_("lora_" in name)
    expected = by_autograd(loaded, examples)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert index.manifest.model.at == "start"


def test_the_adapter_is_put_back_bit_by_bit_even_after_an_error() -> None:
    model = learnt().model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(KeyError), at_moment(model, "start"):
        zero = [not weight.any() for name, weight in model.named_parameters() if "lora_B" in name]
        assert zero
        assert all(zero)
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with at_moment(model, "end"):
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_method_at_the_start_equals_one_on_an_index_built_there(tmp_path: Path) -> None:
    loaded, examples, queries = learnt(), make_examples(9), make_examples(3, seed=5)
    encoder = Encoder(loaded.tokenizer)
    index, _ = build_index(loaded, examples, tmp_path / "end", encoder)
    kept, _ = build_index(loaded, queries, tmp_path / "queries", encoder)
    there, _ = build_index(loaded, examples, tmp_path / "start", encoder, at="start")
    for spec in ("gradcos", "exact:normalise=cosine", "ekfac", "datainf", "gradnorm", "selfinf:curvature=gradsim"):
        mine = make(spec, at="start")
        expected = make(spec).score(Problem(there, queries))
        assert expected.parameters["at"] == "start"
        for problem in (Problem(index, queries), Problem(index, queries, kept_queries=kept)):
            found = mine.score(problem)
            assert np.array_equal(found.values, expected.values)
            assert found.parameters["at"] == "start"
            assert found.unit == expected.unit
            assert ("before training" in found.unit) == found.unit.startswith("decrease")
        assert not np.array_equal(expected.values, make(spec).score(Problem(index, queries)).values)
    assert np.array_equal(
        make("gradcos:at=end").score(Problem(there, queries)).values,
        make("gradcos").score(Problem(index, queries)).values,
    )


def test_several_losses_at_the_start_are_the_mean_of_their_cosines(tmp_path: Path) -> None:
    loaded, examples, queries = learnt(), make_examples(7), make_examples(2, seed=5)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer))
    problem = Problem(index, queries)
    both = make("gradcos:at=start").score(problem).values + make("gradcos:loss_on=probe,at=start").score(problem).values
    found = make("ekfac:normalise=cosine,loss_on=response+probe,at=start").score(problem)
    assert found.parameters["at"] == "start"
    mean = make("exact:normalise=cosine,loss_on=response+probe,damping=1e6,scope=joint,at=start").score(problem).values
    np.testing.assert_allclose(mean, both / 2, rtol=1e-5)  # under a large ridge the metric is the identity's


@pytest.mark.parametrize("name", ["gradcos", "gradcos:scope=block", "exact:normalise=cosine", "ekfac:normalise=cosine"])
def test_several_moments_are_the_mean_of_their_cosines(tmp_path: Path, name: str) -> None:
    loaded, examples, queries = learnt(), make_examples(7), make_examples(3, seed=5)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer))
    problem = Problem(index, queries)

    def scores(settings: str) -> Any:
        return make(f"{name}{',' if ':' in name else ':'}{settings}").score(problem)

    start, end = scores("loss_on=response,layers=1,at=start").values, scores("loss_on=probe:No,layers=0,at=end").values
    swapped = (
        scores("loss_on=response,layers=1,at=end").values + scores("loss_on=probe:No,layers=0,at=start").values
    ) / 2
    both = scores("loss_on=response+probe:No,layers=1+0,at=start+end")
    np.testing.assert_allclose(both.values, (start + end) / 2, rtol=1e-12, atol=1e-14)
    assert float(np.abs(both.values - swapped).max()) > 1e-3
    assert both.parameters["at"] == "start+end"
    assert both.parameters["loss_on"] == "response+probe:No"
    one = scores("loss_on=response,layers=1,at=start+end")  # one loss and one choice of layers go with both
    np.testing.assert_allclose(
        one.values, (start + scores("loss_on=response,layers=1").values) / 2, rtol=1e-12, atol=1e-14
    )
    method = make(one.method)
    assert method == make(method.label)
    assert method.title.endswith("start+end")
    streamed = method.score(Problem(index, queries, step=3))
    np.testing.assert_allclose(streamed.values, one.values, rtol=1e-7, atol=1e-10)
    assert streamed.computed["computed"] == "streamed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ekfac:loss_on=response+probe,at=start+end", "several losses, layers or moments are of different scales"),
        ("exact:at=start+end", "add normalise=cosine"),
        ("gradcos:loss_on=response+probe,at=start+end+end", "2 losses and 3 moments; give as many of each, or one"),
        ("gradcos:layers=0+1+all,at=start+end", "layers=0[+]1[+]all,at=start[+]end: 3 choices of layers and 2 moments"),
        ("gradcos:at=start+middle", "at=middle: not known; use end or start"),
        ("gradcos:at=start+", "at=: not known"),
        ("selfinf:at=start+end", "one loss, one choice of layers and one moment"),
        ("gradnorm:at=start+end", "one loss, one choice of layers and one moment"),
    ],
)
def test_moments_that_cannot_be_averaged_are_refused(spec: str, message: str) -> None:
    with pytest.raises(FinetraceError, match=message):
        make(spec)


def test_both_moments_are_refused_before_anything_is_collected_where_there_is_no_start(tmp_path: Path) -> None:
    loaded = learnt()
    loaded.model.peft_config["default"].init_lora_weights = "pissa"
    index, _ = build_index(loaded, make_examples(4), tmp_path / "i", Encoder(loaded.tokenizer))
    with pytest.raises(FinetraceError, match="at=start: this adapter began with init_lora_weights=pissa"):
        make("gradcos:loss_on=probe+response,at=end+start").score(Problem(index, make_examples(2, seed=5)))
    assert not list((tmp_path / "i").glob("views/*"))


def test_self_influence_at_the_start_is_the_diagonal_of_training_rows_as_queries(tmp_path: Path) -> None:
    loaded, examples = learnt(), make_examples(6)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer))
    problem = Problem(index, examples)
    for curvature in ("exact", "ekfac", "gradsim"):
        scores = make(f"{curvature}:at=start").score(problem).values
        np.testing.assert_allclose(scores, scores.T, rtol=1e-8, atol=1e-10)
        own = make(f"selfinf:curvature={curvature},at=start").score(problem).values[0]
        np.testing.assert_allclose(own, np.diag(scores), rtol=1e-8)


def test_a_view_at_the_start_is_kept_and_its_index_keeps_the_trained_adapter(tmp_path: Path) -> None:
    loaded = learnt()
    index, _ = build_index(loaded, make_examples(5), tmp_path / "i", Encoder(loaded.tokenizer))
    start = view(index, "response", at="start")
    assert start.folder.name == "response-at-start"
    assert view(index, "response", at="end") is index
    assert view(start, "response") is start
    again = view(open_index(tmp_path / "i", loaded), "response", at="start")
    assert torch.equal(again.gradients(slice(None)), start.gradients(slice(None)))
    assert (
        start.manifest.model.adapter_fingerprint == index.manifest.model.adapter_fingerprint == of_adapter(loaded.model)
    )


def test_an_index_of_one_moment_is_not_gone_on_with_at_another(tmp_path: Path) -> None:
    loaded, examples = learnt(), make_examples(4)
    build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer))
    with pytest.raises(FinetraceError, match=r"model\.at \(end, not start\)"):
        build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer), at="start")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"modules_to_save": ["lm_head"]}, "lm_head were trained beside"),
        ({"bias": "all"}, "bias=all"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
    ],
)
def test_a_start_that_is_not_at_hand_is_refused_before_anything_is_written(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    loaded = learnt()
    for name, value in settings.items():
        setattr(loaded.model.peft_config["default"], name, value)
    with pytest.raises(FinetraceError, match=reason):
        build_index(loaded, make_examples(3), tmp_path / "i", Encoder(loaded.tokenizer), at="start")
    assert not (tmp_path / "i").exists()


def test_without_an_adapter_there_is_no_start(tmp_path: Path) -> None:
    plain = Loaded(make_llama(), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    with pytest.raises(FinetraceError, match="no LoRA adapter"):
        build_index(
            plain, make_examples(3), tmp_path / "i", Encoder(plain.tokenizer), modules=["layers.1.mlp"], at="start"
        )


def test_plain_layers_under_an_adapter_are_looked_at_in_the_base_model(tmp_path: Path) -> None:
    loaded, examples = learnt(), make_examples(4)
    index, _ = build_index(
        loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer), modules=["layers.1.mlp.up_proj"], at="start"
    )
    plain = Loaded(make_llama(), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    base, _ = build_index(plain, examples, tmp_path / "b", Encoder(plain.tokenizer), modules=["layers.1.mlp.up_proj"])
    torch.testing.assert_close(index.gradients(slice(None)), base.gradients(slice(None)), rtol=1e-9, atol=1e-12)


def test_labels_and_titles_name_the_moment() -> None:
    method = make("ekfac:normalise=cosine,at=start")
    assert method.label == "ekfac:normalise=cosine,at=start"
    assert method.title == "ekfac cosine start"
    assert make(method.label) == method
    with pytest.raises(FinetraceError, match="at"):
        make("gradcos:at=middle")


def test_where_there_is_no_start_the_default_is_the_best_at_the_end(tmp_path: Path) -> None:
    loaded, examples = learnt(), make_examples(4)
    index, _ = build_index(loaded, examples, tmp_path / "i", Encoder(loaded.tokenizer))
    assert index.has_start()
    assert view(index, "response", at="start").has_start()
    assert default_method(index) == BEST
    assert standard(index) == STANDARD
    plain = Loaded(make_llama(), make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))
    bare, _ = build_index(plain, examples, tmp_path / "b", Encoder(plain.tokenizer), modules=["layers.1.mlp"])
    other = with_lora(make_llama())  # began at random values
    odd, _ = build_index(
        Loaded(other, make_tokenizer(), plain.spec), examples, tmp_path / "o", Encoder(plain.tokenizer)
    )
    for each in (bare, odd):
        assert not each.has_start()
        assert default_method(each) == BEST_AT_END
        assert set(standard(each)) < set(STANDARD)
        assert not any("at=start" in spec for spec in standard(each))
        assert "selfinf" in standard(each)
    assert Index(tmp_path / "b", plain).trace(make_examples(2, seed=5)).method == BEST_AT_END
    assert Index(tmp_path / "i", loaded).trace(make_examples(2, seed=5)).method == BEST


def test_what_only_looks_like_a_start_is_refused() -> None:
    merged = learnt().model
    merged.merge_adapter()
    beside = learnt().model
    beside.base_model.model.model.norm.weight.requires_grad_(True)
    other = get_peft_model(
        make_llama(), IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    other.requires_grad_(False)
    for model, said in ((merged, "merged"), (beside, "norm.weight is trained beside"), (other, "is not LoRA")):
        with pytest.raises(FinetraceError, match=said), at_moment(model, "start"):
            pass
    with pytest.raises(FinetraceError, match="at=middle: not known; use end or start"), at_moment(merged, "middle"):  # type: ignore[arg-type]
        pass


def test_queries_that_were_kept_at_another_moment_are_refused(tmp_path: Path) -> None:
    loaded, queries = learnt(), make_examples(2, seed=5)
    encoder = Encoder(loaded.tokenizer)
    index, _ = build_index(loaded, make_examples(4), tmp_path / "i", encoder, at="start")
    kept, _ = build_index(loaded, queries, tmp_path / "q", encoder)
    with pytest.raises(FinetraceError, match="was not built as"):
        Problem(index, queries, kept_queries=kept)
    other, _ = build_index(loaded, queries, tmp_path / "o", Encoder(loaded.tokenizer, "all"), at="start")
    with pytest.raises(FinetraceError, match="was not built as"):
        Problem(index, queries, kept_queries=other)
