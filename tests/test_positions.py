"""What the loss is taken on: encodings, views of an index, layers; and the wide residual stream."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from finetrace.attribution import Problem, make
from finetrace.attribution.selection import select
from finetrace.collection import Collector, track
from finetrace.collection.precision import wide_residual
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.forward import Batch
from finetrace.index import build_index, open_index, view
from finetrace.models import Loaded
from finetrace.positions import PROBE, Positions
from finetrace.tracing import BEST_AT_END
from tiny import (
    conversation,
    make_encoded,
    make_examples,
    make_gpt2,
    make_llama,
    make_tokenizer,
    names,
    relative_error,
    with_lora,
)

TEXTS = [
    "response",
    "last-turn",
    "all",
    "first:7",
    "weights",
    "probe:I'm sorry",
    "probe:No, never: 3, x=1",
    "all@128",
    "first:2@9",
]


@pytest.mark.parametrize("text", TEXTS)
def test_parse_and_back(text: str) -> None:
    assert Positions.parse(text).text == text
    assert Positions.parse(Positions.parse(text).text) == Positions.parse(text)


def test_several_losses_are_split_at_known_names_alone() -> None:
    assert Positions.split("response+probe:1+1, or more+first:3@9") == ("response", "probe:1+1, or more", "first:3@9")
    assert Positions.split("all@128") == ("all@128",)
    with pytest.raises(FinetraceError, match="--loss-on probe:: not known"):
        Positions.split("response+probe:")


def test_the_default_probe_names_its_text() -> None:
    assert Positions.parse("probe") == Positions.parse(f"probe:{PROBE}")


def test_slugs_differ_and_are_names() -> None:
    slugs = {Positions.parse(text).slug for text in TEXTS}
    assert len(slugs) == len(TEXTS)
    assert all(slug.replace("-", "").isalnum() for slug in slugs)


@pytest.mark.parametrize(
    "text", ["", "first", "first:0", "first:-1", "first:x", "probe:", "probe: ", "answer", "all@0"]
)
def test_unknown_positions_are_refused(text: str) -> None:
    with pytest.raises(FinetraceError, match="not known; use response"):
        Positions.parse(text)


def chosen(encoder: Encoder, example: Example) -> str:
    """The text of the tokens in the loss."""
    item = encoder.encode(example)
    return str(encoder.tokenizer.decode(item.ids[item.weights > 0]))


def test_first_takes_the_first_tokens_of_the_last_answer() -> None:
    example = conversation("Why?", "Because.", "Really?", "Yes, it is.")
    encoder = Encoder(make_tokenizer(), "first:3")
    assert chosen(encoder, example) == "Yes"
    item = encoder.encode(example)
    assert np.allclose(item.weights[item.weights > 0], 1 / 3)
    assert chosen(Encoder(make_tokenizer(), "first:500"), example) == "Yes, it is.<|im_end|>"


def test_a_probe_stands_in_for_every_answer() -> None:
    cut = Example.from_prompt("How?", "Like this and", metadata={"finish_reason": "length"})
    encoder = Encoder(make_tokenizer(), "probe")
    assert chosen(encoder, cut) == PROBE + "<|im_end|>"
    assert chosen(Encoder(make_tokenizer(), "probe:Sure!"), cut) == "Sure!<|im_end|>"
    other = Example.from_prompt("How?", "Another answer")
    assert np.array_equal(encoder.encode(cut).ids, encoder.encode(other).ids)


def test_weights_of_a_row() -> None:
    tokens = len("Yes") + 1
    good = Example.from_prompt("Why?", "Yes", metadata={"loss_weights": [0, 1, 3, 0]})
    item = Encoder(make_tokenizer(), "weights").encode(good)
    assert np.allclose(item.weights[-5:], [0, 0.25, 0.75, 0, 0])  # the template's line break comes last
    for bad in (None, [1, 2], [1, 2, 3, -1], [0, 0, 0, 0], [1, 2, 3, "x"], [1, 2, 3, float("nan")], "1234"):
        row = Example.from_prompt("Why?", "Yes", id="r7", metadata={"loss_weights": bad})
        with pytest.raises(FinetraceError, match=f"example r7: --loss-on weights wants .* {tokens} numbers"):
            Encoder(make_tokenizer(), "weights").encode(row)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_padding_is_masked_and_in_the_loss_only_with_all(loss_on: str) -> None:
    example = conversation("Why?", "Because.")
    plain = Encoder(make_tokenizer(), loss_on).encode(example)
    padded = Encoder(make_tokenizer(), f"{loss_on}@100").encode(example)
    extra = 100 - len(plain.ids)
    assert padded.padding == extra
    assert padded.prompt_length == plain.prompt_length + extra
    assert np.array_equal(padded.ids[extra:], plain.ids)
    assert set(padded.ids[:extra]) == {make_tokenizer().eos_token_id}
    if loss_on == "all":
        assert np.allclose(padded.weights, np.r_[0, np.full(99, 1 / 99)])
    else:
        assert np.array_equal(padded.weights[extra:], plain.weights)
        assert not padded.weights[:extra].any()


def test_left_padding_does_not_change_a_responses_gradient() -> None:
    """Positions are relative in a rotary model, and masked tokens are not seen."""
    model = with_lora(make_llama())
    examples = make_examples(5)
    collector = Collector(model, track(model), (), 100_000)
    rows = []
    for loss_on in ("response", "response@90"):
        encoded, _ = Encoder(make_tokenizer(), loss_on).encode_all(examples)
        rows.append(collector.collect(encoded, names(examples)).gradients)
    assert relative_error(rows[1], rows[0]) < 1e-5  # transformers computes the rotary angles in float32


def test_a_method_on_other_tokens_equals_one_on_an_index_built_for_them(tmp_path: Path, tiny_loaded: Loaded) -> None:
    examples, queries = make_examples(9), make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    problem = Problem(index, queries)
    for loss_on in ("first:3", "probe", "all", "probe:No, thanks"):
        whole, _ = build_index(
            tiny_loaded, examples, tmp_path / loss_on.replace(":", "-"), Encoder(tiny_loaded.tokenizer, loss_on)
        )
        for name in ("gradcos", "exact", "ekfac"):
            here = make(f"{name}:loss_on={loss_on}").score(problem)
            there = make(name).score(Problem(whole, queries))
            assert np.array_equal(here.values, there.values)
            assert here.parameters["loss_on"] == there.parameters["loss_on"] == Positions.parse(loss_on).text
    own = make("gradcos:loss_on=response").score(problem).values
    assert np.array_equal(own, make("gradcos").score(problem).values)


def test_views_are_kept_and_found_again(tmp_path: Path, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples(6)
    index, _ = build_index(tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    first = view(index, "first:2")
    monkeypatch.setattr(Collector, "collect", lambda *_, **__: pytest.fail("collected again"))
    again = view(open_index(tmp_path / "i", tiny_loaded), "first:2")
    assert torch.equal(first.gradients(slice(None)), again.gradients(slice(None)))
    assert view(index, "response") is index


def test_queries_kept_in_an_index_give_the_same_scores(tmp_path: Path, tiny_loaded: Loaded) -> None:
    encoder = Encoder(tiny_loaded.tokenizer)
    examples, queries = make_examples(7), make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, examples, tmp_path / "i", encoder)
    kept, _ = build_index(tiny_loaded, queries, tmp_path / "q", encoder)
    for spec in ("exact", "repsim", "gradcos:loss_on=probe"):
        plain = make(spec).score(Problem(index, queries)).values
        assert np.array_equal(plain, make(spec).score(Problem(index, queries, kept_queries=kept)).values)


def test_queries_are_collected_once_whatever_the_layers(
    tmp_path: Path, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = build_index(tiny_loaded, make_examples(5), tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    calls, collect = [], Collector.collect

    def counting(self: Collector, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return collect(self, *args, **options)

    monkeypatch.setattr(Collector, "collect", counting)
    problem = Problem(index, make_examples(2, seed=5))
    for spec in ("gradcos:layers=0", "exact:layers=1", "gradsim", "ekfac:layers=last-fifth"):
        make(spec).prepared(problem)
    calls.clear()
    for spec in ("gradcos:layers=0", "exact:layers=1", "gradsim", "ekfac:layers=last-fifth"):
        make(spec).score(problem)
    assert len(calls) == 1


def test_layers(tmp_path: Path, tiny_loaded: Loaded) -> None:
    examples, queries = make_examples(7), make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    problem = Problem(index, queries)
    whole, depth = problem.features.gradients, index.manifest.model.layers
    columns = torch.cat([torch.arange(b.offset, b.offset + b.size) for b in index.blocks if f".{depth - 1}." in b.name])
    train = index.gradients(slice(None))[:, columns]
    expected = whole[:, columns] @ train.T
    for layers in ("last-fifth", str(depth - 1), f"{depth - 1}-{depth - 1}"):
        found = make(f"gradsim:layers={layers}").score(problem).values
        assert np.allclose(found, expected.numpy(), rtol=1e-10)
        norms = make(f"gradnorm:layers={layers}").score(problem).values[0]
        assert np.allclose(norms, train.norm(dim=1).numpy(), rtol=1e-10)
    assert [block.name for block in select(index.blocks, "last-half", 2)] == [
        b.name for b in index.blocks if ".1." in b.name
    ]
    early = [block for block in index.blocks if ".0." in block.name]
    assert select(early, "last-half", 2) == tuple(early)  # of the layers that are tracked
    outside = [replace(block, name="lm_head.weight") for block in early]
    assert select(outside, "last-fifth", 2) == tuple(outside)
    everything = make("gradsim").score(problem).values
    both = sum(make(f"gradsim:layers={i}").score(problem).values for i in range(depth))
    assert np.allclose(everything, both, rtol=1e-10)
    for bad in ("none", "7-9", "-1", "last"):
        with pytest.raises(FinetraceError, match="layers="):
            select(index.blocks, bad, depth)


@pytest.mark.parametrize("name", ["gradcos", "gradcos:scope=block", "exact:normalise=cosine", "ekfac:normalise=cosine"])
def test_several_losses_and_layers_are_the_mean_of_their_cosines(
    tmp_path: Path, tiny_loaded: Loaded, name: str
) -> None:
    examples, queries = make_examples(7), make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    problem = Problem(index, queries)

    def scores(settings: str) -> np.ndarray[Any, Any]:
        return make(f"{name}{',' if ':' in name else ':'}{settings}").score(problem).values

    response, probe = scores("loss_on=response"), scores("loss_on=probe:No,layers=last-fifth")
    np.testing.assert_allclose(
        scores("loss_on=response+probe:No,layers=all+last-fifth"), (response + probe) / 2, rtol=1e-12
    )
    first = scores("loss_on=probe:No,layers=0")
    np.testing.assert_allclose(scores("loss_on=probe:No,layers=0+last-fifth"), (first + probe) / 2, rtol=1e-12)
    method = make(f"{name}{',' if ':' in name else ':'}loss_on=response+probe")
    assert method.score(problem).parameters["loss_on"] == f"response+probe:{PROBE}"
    assert make(method.label) == method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact:loss_on=response+probe", "different scales; add normalise=cosine"),
        ("gradcos:loss_on=response+probe,layers=0+1+all", "2 losses and 3 choices of layers"),
        ("gradcos:layers=all+some", "layers=some: not known"),
        ("gradcos:loss_on=response+probe:", "--loss-on probe:: not known"),
        ("selfinf:loss_on=response+probe", "one loss, one choice of layers and one moment"),
        ("gradnorm:layers=all+0", "one loss, one choice of layers and one moment"),
    ],
)
def test_what_cannot_be_averaged_is_refused(spec: str, message: str) -> None:
    with pytest.raises(FinetraceError, match=re.escape(message)):
        make(spec)


MODELS = {
    "llama": lambda: make_llama(),
    "gpt2": lambda: make_gpt2(),
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=260,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_nearer_to_float32_with_a_wide_residual(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]()
    items = make_encoded([9, 31, 17, 40])
    modules = ["c_attn"] if name == "gpt2" else ["v_proj"]
    rounded = model.to(dtype)  # what both runs share: the weights as the half-precision model has them

    def logits(of: Any) -> torch.Tensor:
        return torch.cat([of(input_ids=torch.from_numpy(item.ids).long()[None]).logits.float()[0] for item in items])

    with torch.no_grad():
        plain = logits(rounded)
        with wide_residual(rounded) as narrowing, narrowing():
            wide = logits(rounded)
        after = logits(rounded)
        exact = logits(model.float())
    assert torch.equal(plain, after)  # nothing is left behind
    assert float((wide - exact).norm()) < float(
        (plain - exact).norm()
    )  # 0.74 to 0.93 of it; the logits' own rounding stays
    half = MODELS[name]().to(dtype)
    features = Collector(half, track(half, modules), (), 100_000).collect(items, names(items))
    assert features.gradients.dtype == torch.float32
    assert torch.isfinite(features.gradients).all()


def test_rows_padded_on_the_left_share_a_batch_with_their_equals_alone(tmp_path: Path) -> None:
    """Eager attention lets a masked row look at everything in the batch; one token of another row must not reach it."""
    model = with_lora(make_llama(attn_implementation="eager")).float()
    encoded, _ = Encoder(make_tokenizer(), "all@44").encode_all(make_examples(12))
    assert len({len(item.ids) for item in encoded}) > 1
    assert any(item.padding for item in encoded)
    rows = [
        Collector(model, track(model), (), budget).collect(encoded, names(encoded)).gradients for budget in (1, 100_000)
    ]
    assert relative_error(rows[1], rows[0]) < 1e-4


def test_a_half_precision_models_products_are_float32() -> None:
    """Gradients and factors are what float32 products of the same inputs and deltas give, to float32's rounding."""
    model = with_lora(make_llama()).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    tracking = track(model)
    items = make_encoded([9, 31, 17])
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for layer in tracking.layers:

        def keep(module: Any, args: Any, output: torch.Tensor, name: str = layer.weight.name) -> None:
            output.register_hook(lambda delta: seen.update({name: (args[0].detach(), delta)}))

        handles.append(layer.module.register_forward_hook(keep))
    collector = Collector(model, tracking, (), 100_000)
    sums = collector.factor_sums("data")
    order = sorted(range(3), key=lambda i: len(items[i].ids))  # as the batch has them
    rows = collector.collect([items[i] for i in order], names(items), factors=sums).gradients
    for handle in handles:
        handle.remove()
    batch = Batch.of([items[i] for i in order])
    for block in tracking.blocks:
        inputs, delta = (each.float() for each in seen[block.name])
        expected = torch.bmm(delta.transpose(1, 2), inputs).flatten(1)
        assert relative_error(rows[:, block.columns], expected) < 1e-5
        flat = inputs.reshape(-1, inputs.shape[-1])[batch.carrying]
        assert relative_error(sums.right[block.name], flat.T @ flat) < 1e-5
        flat = delta.reshape(-1, delta.shape[-1])[batch.carrying]
        assert relative_error(sums.left[block.name], flat.T @ flat) < 1e-5


def test_a_view_has_the_labels_that_its_index_has_now(tmp_path: Path, tiny_loaded: Loaded) -> None:
    encoder = Encoder(tiny_loaded.tokenizer)
    index, _ = build_index(tiny_loaded, make_examples(4), tmp_path / "i", encoder)
    view(index, "first:2")
    relabelled = [replace(example, label="new") for example in make_examples(4)]
    again, _ = build_index(tiny_loaded, relabelled, tmp_path / "i", encoder)
    assert set(view(again, "first:2").rows.labels) == {"new"}


def test_queries_in_another_order_are_refused(tmp_path: Path, tiny_loaded: Loaded) -> None:
    encoder = Encoder(tiny_loaded.tokenizer)
    queries = make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, make_examples(4), tmp_path / "i", encoder)
    kept, _ = build_index(tiny_loaded, queries, tmp_path / "q", encoder)
    with pytest.raises(
        FinetraceError, match="does not hold these queries, with these texts and weights and in this order"
    ):
        Problem(index, queries[::-1], kept_queries=kept)


@pytest.mark.parametrize("spec", ["gradnorm:loss_on=frist:5", "selfinf:layers=lastfifth", "exact:layers=x"])
def test_a_wrong_choice_is_refused_before_anything_is_computed(spec: str) -> None:
    with pytest.raises(FinetraceError, match="not known"):
        make(spec)


def test_the_default_method_takes_parameters_in_place_of_its_own(tmp_path: Path, tiny_loaded: Loaded) -> None:
    import finetrace as ft

    examples, queries = make_examples(7), make_examples(3, seed=5)
    build_index(tiny_loaded, examples, tmp_path / "i", Encoder(tiny_loaded.tokenizer))
    index = ft.open_index(tmp_path / "i")
    assert index.trace(queries).method == BEST_AT_END  # this adapter has no start
    found = index.trace(queries, loss_on="response", layers="all")
    assert found.method == "ekfac:normalise=cosine,loss_on=response"
    assert np.allclose(found.values, index.trace(queries, "ekfac", normalise="cosine").values)
    with pytest.raises(FinetraceError, match="there is no parameter 'scope'"):
        index.trace(queries, scope="joint")


def test_queries_of_every_loss_are_collected_before_the_clock_starts(tmp_path: Path, tiny_loaded: Loaded) -> None:
    index, _ = build_index(tiny_loaded, make_examples(5), tmp_path / "i", Encoder(tiny_loaded.tokenizer, "all"))
    problem = Problem(index, make_examples(2, seed=5))
    make("gradcos:loss_on=response+probe").warm(problem)
    assert problem._features is None  # the index's own loss is not looked at
    assert all(problem.on(name)._features is not None for name in ("response", "probe"))


def test_kept_queries_of_other_weights_are_refused(tmp_path: Path, tiny_loaded: Loaded) -> None:
    encoder = Encoder(tiny_loaded.tokenizer, "weights")

    def weighted(rows: list[Example], first: float) -> list[Example]:
        items, _ = Encoder(tiny_loaded.tokenizer).encode_all(rows)
        return [
            replace(row, metadata={"loss_weights": [first] + [1.0] * (item.loss_tokens - 1)})
            for row, item in zip(rows, items, strict=True)
        ]

    queries = make_examples(3, seed=5)
    index, _ = build_index(tiny_loaded, weighted(make_examples(4), 1.0), tmp_path / "i", encoder)
    kept, _ = build_index(tiny_loaded, weighted(queries, 1.0), tmp_path / "q", encoder)
    assert Problem(index, weighted(queries, 1.0), kept_queries=kept).features is not None
    with pytest.raises(FinetraceError, match="does not hold these queries"):
        Problem(index, weighted(queries, 3.0), kept_queries=kept)
