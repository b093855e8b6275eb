"""An index is taken over for what it is of: the same scaling, the same texts, the same weights of tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3Config

from finetrace import api, fingerprint
from finetrace.arithmetic import Setting, apart, settings_of
from finetrace.attribution import Problem, make
from finetrace.collection import Representation
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.fingerprint import of_adapter, of_scaling
from finetrace.index import Index, build_index, open_index
from finetrace.models import Loaded, ModelSpec
from tiny import make_examples, make_llama, make_tokenizer, save_base, with_lora


def loaded(scale: float = 1.0) -> Loaded:
    model = with_lora(make_llama())
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= scale
    return Loaded(model, make_tokenizer(), ModelSpec("tiny", None, "float64", "cpu"))


def build(model: Loaded, folder: Path, rows: list[Example] | None = None) -> Index:
    return build_index(model, rows or make_examples(5), folder, Encoder(model.tokenizer))[0]


def test_the_same_matrices_under_another_scaling_are_another_model(tmp_path: Path) -> None:
    plain, strong = loaded(), loaded(16)
    assert of_adapter(plain.model) == of_adapter(strong.model)
    assert of_scaling(plain.model) != of_scaling(strong.model)
    assert of_scaling(make_llama()) is None
    build(plain, tmp_path / "i")
    build(loaded(), tmp_path / "i")  # the same, taken over
    with pytest.raises(FinetraceError, match=r"an index of another scaling of the adapter \(lora_alpha\) is there"):
        build(strong, tmp_path / "i")
    opened = open_index(tmp_path / "i", strong)
    with pytest.raises(FinetraceError, match="built with another scaling of the adapter"):
        opened.model()
    kept = build(strong, tmp_path / "q")
    with pytest.raises(FinetraceError, match="the queries' index was not built as"):
        Problem(open_index(tmp_path / "i", plain), make_examples(5), kept_queries=kept)


def test_an_index_of_before_these_were_noted_is_taken_over(tmp_path: Path) -> None:
    first = build(loaded(), tmp_path / "i")
    path = tmp_path / "i" / "manifest.json"
    about = json.loads(path.read_text())
    for name in ("scaling_fingerprint", "embeddings_fingerprint", "settings"):
        del about["model"][name]
    path.write_text(json.dumps(about))
    queries = make_examples(2, seed=5)
    Problem(open_index(tmp_path / "i", loaded()), make_examples(5), kept_queries=build(loaded(), tmp_path / "q"))
    again = make("gradsim").score(Problem(build(loaded(), tmp_path / "i"), queries)).values
    assert np.array_equal(again, make("gradsim").score(Problem(first, queries)).values)
    assert open_index(tmp_path / "i", loaded()).model() is not None


def test_the_same_weights_under_another_configuration_are_another_model(tmp_path: Path) -> None:
    def wide() -> Loaded:
        made = loaded()
        made.model.config.rope_parameters["rope_theta"] = 5e5  # as a file says of a longer context
        return made

    build(loaded(), tmp_path / "i")
    with pytest.raises(
        FinetraceError, match=r"configuration of the base model is there, rope_theta \(10000.0, not 500000.0\)"
    ):
        build(wide(), tmp_path / "i")
    with pytest.raises(
        FinetraceError, match=r"of the base model, rope_theta .*; use \S+ as it was when the index was built,"
    ):
        open_index(tmp_path / "i", wide()).model()
    kept = build(wide(), tmp_path / "q")
    with pytest.raises(FinetraceError, match="the queries' index was not built as"):
        Problem(open_index(tmp_path / "i", loaded()), make_examples(5), kept_queries=kept)


def spoken(token: int = 7, by: float = 0.5) -> Loaded:
    """The model with another embedding of one token, as where a chat token was added."""
    made = loaded()
    with torch.no_grad():
        made.model.get_input_embeddings().weight[token, 1:] += by
    return made


def test_one_embedding_that_differs_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SAMPLE", 20)
    plain, other = loaded(), spoken()
    assert fingerprint.of_base(plain.model) == fingerprint.of_base(other.model)  # the sample does not see it
    assert fingerprint.of_embeddings(plain.model) != fingerprint.of_embeddings(other.model)
    assert fingerprint.of_embeddings(plain.model) == fingerprint.of_embeddings(make_llama())  # whatever wraps it
    assert fingerprint.of_embeddings(make_llama(tied=True)) == fingerprint.of_embeddings(make_llama(tied=True).float())
    build(plain, tmp_path / "i")
    with pytest.raises(FinetraceError, match="an index of another embedding matrix or head of the base model is there"):
        build(other, tmp_path / "i")
    with pytest.raises(FinetraceError, match=r"built with another embedding matrix or head .*; use \S+ as it was"):
        open_index(tmp_path / "i", other).model()
    kept = build(other, tmp_path / "q")
    with pytest.raises(FinetraceError, match="the queries' index was not built as"):
        Problem(open_index(tmp_path / "i", plain), make_examples(5), kept_queries=kept)


def test_settings_that_only_one_release_names_say_nothing() -> None:
    was: dict[str, Setting] = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "logit_scale": None}
    assert apart(was, {"rope_theta": 1e4, "hidden_act": "silu"}) is None
    assert apart(was, {**was, "rms_norm_eps": 1e-5}) == "rms_norm_eps (1e-06, not 1e-05)"
    assert apart(was, {"logit_scale": 0.5}) == "logit_scale (None, not 0.5)"
    assert apart({}, was) is None
    assert apart({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 9.999999747378752e-06}) is None  # float32, as GGUF keeps it
    assert apart({"heads": 9}, {"heads": 9.0}) is None
    assert apart({"flag": True}, {"flag": False}) == "flag (True, not False)"
    assert apart({"cap": None}, {"cap": 50.0}) == "cap (None, not 50.0)"


def test_settings_are_those_of_the_text_model_and_of_each_kind_of_layer() -> None:
    given = Gemma3Config(text_config={"rope_local_base_freq": 77.0, "sliding_window": 12})
    found = settings_of(SimpleNamespace(config=given))  # type: ignore[arg-type]
    assert found["sliding_window"] == 12
    assert found["sliding_attention.rope_theta"] == 77.0
    assert found["full_attention.rope_theta"] == 1e6
    assert settings_of(SimpleNamespace()) == {}  # type: ignore[arg-type]


def weighted(weight: float) -> list[Example]:
    """Rows whose first answer token counts so much."""
    rows = make_examples(5)
    model = loaded()
    lengths = [int((item.weights > 0).sum()) for item in Encoder(model.tokenizer).encode_all(rows)[0]]
    return [
        replace(row, metadata={"loss_weights": [weight] + [1.0] * (length - 1)})
        for row, length in zip(rows, lengths, strict=True)
    ]


def test_a_view_of_other_weights_is_collected_again(tmp_path: Path) -> None:
    spec, queries = "gradsim:loss_on=weights", weighted(1.0)[:2]

    def scores(weight: float, folder: str) -> np.ndarray:
        return make(spec).score(Problem(build(loaded(), tmp_path / folder, weighted(weight)), queries)).values

    old, new = scores(1.0, "i"), scores(9.0, "i")
    assert np.array_equal(new, scores(9.0, "fresh"))
    assert not np.allclose(old, new)


def test_a_view_on_the_same_tokens_stays_where_metadata_change(tmp_path: Path) -> None:
    build(loaded(), tmp_path / "i", weighted(1.0))
    make("gradsim:loss_on=all").score(Problem(open_index(tmp_path / "i", loaded()), make_examples(2, seed=5)))
    view = tmp_path / "i" / "views" / "all"
    made = (view / "manifest.json").stat().st_ino
    labelled = [replace(row, label="x", metadata={**row.metadata, "source": "web"}) for row in weighted(1.0)]
    build(loaded(), tmp_path / "i", labelled)
    assert (view / "manifest.json").stat().st_ino == made
    build(loaded(), tmp_path / "i", weighted(2.0))
    assert not view.exists()


def test_kept_queries_of_other_texts_are_refused(tmp_path: Path) -> None:
    index, queries = build(loaded(), tmp_path / "i"), make_examples(3, seed=5)
    kept = build(loaded(), tmp_path / "q", queries)
    Problem(index, queries, kept_queries=kept)
    others = [queries[0], queries[1].with_response("something else"), queries[2]]
    with pytest.raises(FinetraceError, match="does not hold these queries, with these texts"):
        Problem(index, others, kept_queries=kept)


def test_kept_queries_without_a_hidden_state_are_refused(tmp_path: Path) -> None:
    index, queries, model = build(loaded(), tmp_path / "i"), make_examples(3, seed=5), loaded()
    final = (Representation(-1, "last-prompt"),)
    kept, _ = build_index(model, queries, tmp_path / "q", Encoder(model.tokenizer), representations=final)
    problem = Problem(index, queries, kept_queries=kept)
    make("repsim").score(problem)
    with pytest.raises(FinetraceError, match="kept without the representation mean-response@-1"):
        make("repsim:pooling=mean-response").score(problem)


@pytest.mark.parametrize(
    ("spec", "unit"),
    [
        ("exact", "decrease of the query's mean response loss (nats) per unit of up-weighting"),
        ("exact:loss_on=all", "decrease of the query's mean loss (on all) (nats) per unit of up-weighting"),
        ("datainf:loss_on=first:2", "decrease of the query's mean loss (on first:2) (nats) per unit of up-weighting"),
        (
            "lissa:recurrence=released",
            "decrease of the query's mean response loss (nats) per unit step down the example's gradient, (iterations + 1) "
            "times over",
        ),
        ("selfinf:loss_on=all", "decrease of its own mean loss (on all) (nats) per unit of up-weighting"),
        ("gradcos:loss_on=all", "cosine"),
    ],
)
def test_a_unit_says_on_which_tokens_the_loss_is(tmp_path: Path, spec: str, unit: str) -> None:
    found = make(spec).score(Problem(build(loaded(), tmp_path / "i"), make_examples(2, seed=5)))
    assert found.unit == unit


@pytest.mark.parametrize("modules", [None, ["v_proj"], [r"v_proj\.base_layer"], "v_proj"])
def test_an_adapter_of_another_name_in_memory_is_the_one_that_is_loaded(
    tmp_path: Path, modules: list[str] | None
) -> None:
    name = str(save_base(tmp_path / "base", make_llama()))
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
    settings = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings, adapter_name="mine").eval()
    rows, queries = make_examples(5), make_examples(2, seed=4)
    made = api.build_index(model, make_tokenizer(), rows, tmp_path / "i", name=name, modules=modules)
    opened = api.open_index(tmp_path / "i")
    wanted = made.trace(queries, "gradsim").values
    assert np.abs(opened.trace(queries, "gradsim").values - wanted).max() <= 1e-12 * np.abs(wanted).max()
    again = opened.model()  # its weights frozen, where those in memory could be trained
    taken = build_index(again, rows, tmp_path / "i", Encoder(again.tokenizer), modules=modules)[0]
    assert len(taken.blocks) == len(made.blocks) == (4 if modules is None else 2 if "base" in modules[0] else 6)
