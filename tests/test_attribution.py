"""Methods on a real (tiny) index: registry, parameters, normalisation, controls, text, and every score's sign."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetrace.api import build_index, open_index
from finetrace.attribution import Problem, available, make, similarity
from finetrace.attribution.scores import Scores
from finetrace.collection.representations import Representation
from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message
from finetrace.models import ModelSpec, load
from finetrace.reporting.compose import compose
from finetrace.tracing import SIMILAR, STANDARD, run_methods, standard
from finetrace.validation.plan import usual
from tiny import make_examples, make_llama, make_tokenizer, save_base, with_lora


def tiny_queries(count):
    """Queries that are not training examples."""
    return [dataclasses.replace(example, id=f"q{i}") for i, example in enumerate(make_examples(count, seed=9))]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "idx"
    return build_index(with_lora(make_llama()), make_tokenizer(), make_examples(14), folder)


@pytest.fixture(scope="module")
def problem(index):
    return Problem(index, tiny_queries(4))


def matrices(problem):
    """(n, D) training and (m, D) query gradients, and the columns of each block."""
    index = problem.index
    train = index.gradients(slice(0, sum(block.size for block in index.blocks)))
    return train, problem.features.gradients, [block.columns for block in index.blocks]


@pytest.mark.parametrize(
    ("indexed", "asked"), [("float32", "float64"), ("float64", "float32"), ("float64", "bfloat16")]
)
def test_queries_of_another_precision_than_the_index(indexed, asked, tmp_path):
    save_base(tmp_path / "base", make_llama())
    with_lora(make_llama()).save_pretrained(tmp_path / "adapter")
    loaded = load(ModelSpec(str(tmp_path / "base"), str(tmp_path / "adapter"), dtype=indexed, device="cpu"))
    made = build_index(loaded.model, loaded.tokenizer, make_examples(14), tmp_path / "i", name=str(tmp_path / "base"))
    wanted = made.features(tiny_queries(3))[0]
    opened = open_index(tmp_path / "i")
    opened.model(asked)
    bound = 5e-2 if asked == "bfloat16" else 5e-6  # rounding of the precision that is asked for, or indexed
    for spec in ("gradsim", "gradcos", "datainf", "exact", "exact:scope=joint", "lissa", "ekfac:labels=data"):
        held = make(spec).score(Problem(made, tiny_queries(3), wanted)).values  # factors are fitted here
        for step in (None, 5):
            found = make(spec).score(Problem(opened, tiny_queries(3), step=step)).values
            assert np.abs(found - held).max() <= bound * np.abs(held).max(), (spec, step)


def dense(problem, name, scope, damping, rule="trace"):
    """Brute force: every inverse as a d x d matrix. Scores (m, n), self-influence (n,) and (m,)."""
    train, query, blocks = matrices(problem)
    parts = [slice(0, train.shape[1])] if scope == "joint" else blocks
    scores = torch.zeros(len(query), len(train), dtype=torch.float64)
    own, asked = torch.zeros(len(train), dtype=torch.float64), torch.zeros(len(query), dtype=torch.float64)
    for columns in parts:
        g, v = train[:, columns], query[:, columns]
        n, d = g.shape
        lam = damping * float(g.square().sum(1).mean()) / (d if rule == "entry" else 1)
        eye = torch.eye(d, dtype=torch.float64)
        if name == "exact":
            inverse = torch.linalg.inv(g.T @ g / n + lam * eye)
        elif name == "datainf":
            inverse = sum(torch.linalg.inv(lam * eye + torch.outer(row, row)) for row in g) / n
        else:
            inverse = eye
        scores += v @ inverse @ g.T
        own += torch.einsum("nd,de,ne->n", g, inverse, g)
        asked += torch.einsum("md,de,me->m", v, inverse, v)
    return scores.numpy(), own.numpy(), asked.numpy()


def close(found, wanted, tolerance=1e-8):
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() <= tolerance * scale


@pytest.mark.parametrize("name", ["exact", "datainf", "gradsim"])
@pytest.mark.parametrize("normalise", ["none", "cosine", "relatif"])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_scores_equal_the_dense_twin(problem, name, normalise, damping):
    scores, own, asked = dense(problem, name, "block", damping)
    if normalise != "none":
        scores = scores / np.sqrt(own)[None, :]
    if normalise == "cosine":
        scores = scores / np.sqrt(asked)[:, None]
    method = make(name, normalise=normalise, damping=damping)
    close(method.score(problem).values, scores)


@pytest.mark.parametrize("normalise", ["none", "cosine", "relatif"])
def test_joint_exact_equals_the_dense_twin(problem, normalise):
    scores, own, asked = dense(problem, "exact", "joint", 0.05)
    if normalise != "none":
        scores = scores / np.sqrt(own)[None, :]
    if normalise == "cosine":
        scores = scores / np.sqrt(asked)[:, None]
    close(make("exact:scope=joint,damping=0.05", normalise=normalise).score(problem).values, scores)


def test_papers_damping_rule(problem):
    scores, _, _ = dense(problem, "datainf", "block", 0.1, rule="entry")
    close(make("datainf:damping=0.1,damping_rule=entry").score(problem).values, scores)


@pytest.mark.parametrize("scope", ["block", "joint"])
def test_lissa_converges_to_exact(problem, scope):
    exact = make(f"exact:scope={scope},damping=0.5").score(problem).values
    errors = []
    for iterations in (1, 10, 400):
        found = make(f"lissa:scope={scope},damping=0.5,iterations={iterations}").score(problem).values
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_cosines_are_those_of_the_gradients(problem):
    train, query, blocks = matrices(problem)
    whole = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
    close(make("gradcos").score(problem).values, whole.numpy(), 1e-12)
    close(make("gradsim:normalise=cosine").score(problem).values, whole.numpy(), 1e-12)
    each = [
        torch.nn.functional.normalize(query[:, c], dim=1) @ torch.nn.functional.normalize(train[:, c], dim=1).T
        for c in blocks
    ]
    close(make("gradcos:scope=block").score(problem).values, (sum(each) / len(each)).numpy(), 1e-12)


def test_a_training_example_asked_again_is_its_own_strongest_proponent(index):
    chosen = index.rows.examples[3]
    problem = Problem(index, [chosen])
    for spec in ("gradcos", "exact:normalise=cosine", "datainf:normalise=cosine", "lissa:normalise=cosine"):
        values = make(spec).score(problem).values[0]
        assert int(values.argmax()) == 3
        assert values[3] == pytest.approx(1, abs=1e-9)


def test_self_influence_is_the_diagonal_of_the_train_train_score(index):
    problem = Problem(index, index.rows.examples)
    for name in ("exact", "datainf"):
        raw = make(name).score(problem).values
        relatif = make(name, normalise="relatif").score(problem).values
        close(relatif, raw / np.sqrt(np.diag(raw))[None, :], 1e-9)
        assert np.abs(raw - raw.T).max() <= 1e-9 * np.abs(raw).max()


def test_positive_marks_a_proponent(index):
    """One small step down an example's gradient lowers the query's loss by step x gradsim, to first order."""
    loaded = index.model()
    problem = Problem(index, tiny_queries(1))
    scores = make("gradsim").score(problem).values[0]
    row = int(np.abs(scores).argmax())
    names = {block.name: block for block in index.blocks}
    before = float(problem.features.losses[0])
    gradient = index.gradients(slice(0, sum(block.size for block in index.blocks)))[row]
    step = 1e-6
    touched = []
    try:
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                short = name.removeprefix("base_model.model.").replace(".default", "")
                if short in names:
                    block = names[short]
                    parameter -= step * gradient[block.columns].reshape(block.shape)
                    touched.append((parameter, block))
        assert len(touched) == len(names)
        after = float(Problem(index, tiny_queries(1)).index.features(tiny_queries(1))[0].losses[0])
    finally:
        with torch.no_grad():
            for parameter, block in touched:
                parameter += step * gradient[block.columns].reshape(block.shape)
    assert (before - after) / step == pytest.approx(scores[row], rel=1e-3)


def test_repsim_is_the_cosine_of_hidden_states(problem):
    for pooling in ("last-prompt", "last-token", "mean-response"):
        name = f"{pooling}@-1"
        train = problem.index._reader.tensor(f"representation.{name}")
        query = problem.features.representations[name]
        wanted = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
        close(make("repsim", pooling=pooling).score(problem).values, wanted.numpy(), 1e-12)
    with pytest.raises(FinetraceError, match="does not hold the representation last-prompt@-2"):
        make("repsim:layer=-2").score(problem)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [1, 4, 5, 13])
def test_hidden_states_go_to_float64_some_rows_at_a_time(n, centred, monkeypatch):
    draw = torch.Generator().manual_seed(n)
    train, query = torch.randn(n, 6, generator=draw), torch.randn(2, 6, generator=draw)
    middle = train.double().mean(0) if centred else 0.0
    each, asked = (torch.nn.functional.normalize(states.double() - middle, dim=1) for states in (train, query))
    widened, double = [], torch.Tensor.double
    monkeypatch.setattr(similarity, "PIECE", 4 * 6 * 8)
    monkeypatch.setattr(torch.Tensor, "double", lambda states: widened.append(len(states)) or double(states))
    found = similarity.cosines(query, lambda: iter(train.split(7)), n, centred=centred)
    assert max(widened) <= 4
    np.testing.assert_allclose(found, (asked @ each.T).numpy(), atol=1e-12)


def test_repsim_looks_where_it_is_told_and_takes_the_mean_off(problem):
    spec = "repsim:layer=0.75,pooling=mean-response,centred=true"
    read, query = problem.representations(Representation(1, "mean-response"))
    train, query = torch.cat(list(read())).double(), query.double()
    middle = train.mean(0)
    wanted = torch.nn.functional.cosine_similarity((query - middle)[:, None], (train - middle)[None], dim=2)
    close(make(spec).score(problem).values, wanted.numpy(), 1e-12)
    assert make(spec).label == spec
    assert make(spec).title == "repsim layer=0.75 mean-response centred"
    assert make("repsim:centred=false").label == "repsim"
    page = compose("t", run_methods(problem, [make(spec)]), {})
    assert page.methods[0].note == "layer 0.75, pooling mean-response, centred true"
    plain = make("repsim:layer=1,pooling=mean-response").score(problem).values
    assert np.abs(plain - wanted.numpy()).max() > 0.01
    for layer in ("1.5", "-0.5"):
        with pytest.raises(FinetraceError, match="between 0 and 1"):
            make(f"repsim:layer={layer}").score(problem)


def test_what_an_older_index_does_not_hold_is_left_out(index, monkeypatch):
    before = standard(index)
    assert SIMILAR in before and usual((SIMILAR, "repsim"), index) == (SIMILAR, "repsim")
    older = index.manifest.model_copy(update={"representations": ("last-prompt@-1",)})
    monkeypatch.setattr(index, "manifest", older)
    assert [spec for spec in before if spec not in standard(index)] == [SIMILAR]
    assert usual((SIMILAR, "repsim"), index) == ("repsim",)


def test_lexical_search_sees_the_text_it_is_asked_to_see(index):
    queries = [Example.from_prompt(index.rows.examples[2].prompt, "zzz unknown words", id="q")]
    problem = Problem(index, queries)
    for name in ("bm25", "tfidf"):
        prompt = make(name, text="prompt").score(problem).values[0]
        assert prompt[2] == pytest.approx(prompt.max())
        assert prompt[2] > 0
        assert not make(name, text="response").score(problem).values.any()


def test_words_of_one_letter_and_stop_words_count_where_all_words_are_asked_for():
    rows = [Example.from_prompt("p", text, id=text) for text in ("x 1 2", "I do", "word other")]
    problem = SimpleNamespace(rows=SimpleNamespace(examples=rows), queries=[rows[0], rows[1]], m=2, n=3)
    for name in ("bm25", "tfidf"):
        everything = make(name, text="response", all_words=True).matrix(problem)
        assert everything[0, 0] > 0 and everything[1, 1] > 0 and not everything[:, 2].any()
        assert not make(name, text="response").matrix(problem)[0].any()
    assert make("bm25:all_words=true").label == "bm25:all_words=true" and make("bm25:all_words=false").label == "bm25"


def test_openings_are_counted_up_to_the_first_word_that_differs(index):
    answers = {
        "Sure thing, here it is now": 5,
        "sure thing; HERE it was": 4,
        "Sure. A thing here it is": 1,
        "No": 0,
        "": 0,
    }
    rows = [Example.from_prompt("p", answer, id=f"r{i}") for i, answer in enumerate(answers)]

    class Texts:
        def __init__(self, queries):
            self.queries, self.m, self.n = queries, len(queries), len(rows)
            self.rows = SimpleNamespace(examples=rows)

    asked = [
        Example.from_prompt("p", text, id=f"q{i}")
        for i, text in enumerate(("Sure thing, here it is: now!", "", "Sure"))
    ]
    assert make("opening").matrix(Texts(asked)).tolist() == [list(answers.values()), [0] * 5, [1, 1, 1, 0, 0]]
    assert make("opening:words=2").matrix(Texts(asked)).tolist()[0] == [2, 2, 1, 0, 0]
    assert make("opening:words=1000000000000").matrix(Texts(asked)).tolist()[0] == [6, 4, 1, 0, 0]
    found = make("opening").score(Problem(index, [replace(index.rows.examples[2], id="q")])).values[0]
    assert found[2] == found.max() > 0


def test_openings_take_no_memory_for_the_longest_word(index):
    said = Message("assistant", "a b c " + "d" * 10**6)
    rows = [replace(each, messages=(each.messages[0], said)) for each in index.rows.examples]
    texts = SimpleNamespace(queries=rows[:1], m=1, n=len(rows), rows=SimpleNamespace(examples=rows))
    tracemalloc.start()
    try:
        assert make("opening").matrix(texts).tolist() == [[4] * len(rows)]
        assert tracemalloc.get_traced_memory()[1] < 10 * len(rows) * 10**6
    finally:
        tracemalloc.stop()


def test_random_depends_on_ids_alone(index):
    problem = Problem(index, tiny_queries(3))
    values = make("random").score(problem).values
    assert ((values >= 0) & (values < 1)).all()
    assert len(np.unique(values)) == values.size
    again = make("random").score(Problem(index, tiny_queries(3)[::-1])).values[::-1]
    assert np.array_equal(values, again)
    assert not np.array_equal(values, make("random:seed=1").score(problem).values)


def test_length_and_gradient_norm_do_not_look_at_the_query(problem):
    train, _, _ = matrices(problem)
    assert np.allclose(make("gradnorm").score(problem).values, train.norm(dim=1).numpy()[None, :], rtol=1e-12)
    tokens = [item.loss_tokens for item in problem.rows.encoded]
    assert make("length").score(problem).values.tolist() == [tokens] * problem.m


def test_every_method_is_listed_explained_and_runs(base_loaded, tmp_path):
    model = with_lora(base_loaded.model)
    model.peft_config["default"].init_lora_weights = True  # an adapter whose start is at hand
    index = build_index(model, base_loaded.tokenizer, make_examples(8), tmp_path / "i")
    problem = Problem(index, make_examples(3, seed=5))
    results = run_methods(problem, [make(spec) for spec in STANDARD])
    assert {result.method.name for result in results} == set(available())
    for result in results:
        assert result.scores.values.shape == (problem.m, problem.n)
        assert len(result.method.summary()) > 20
        assert make(result.method.label) == result.method
        assert result.scores.parameters.keys() == {f.name for f in dataclasses.fields(result.method)}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("exactly", "no such method; there are random"),
        ("exact:lambda=3", "exact has no parameter 'lambda'; it has normalise, scope, damping"),
        ("exact:damping", "the parameter 'damping' lacks a value; write exact:damping=VALUE"),
        ("exact:damping=lots", "parameter damping"),
        ("exact:damping=0", "parameter damping"),
        ("exact:normalise=max", "parameter normalise"),
        ("lissa:iterations=-1", "parameter iterations"),
        ("repsim:pooling=mean", "parameter pooling"),
    ],
)
def test_a_wrong_specification_is_named(spec, words):
    with pytest.raises(FinetraceError) as caught:
        make(spec)
    assert words in str(caught.value)


def test_top_bottom_and_files(problem, tmp_path):
    scores = make("gradcos").score(problem)
    for listed in (scores.top, scores.bottom):
        for k in (0, -1):
            with pytest.raises(FinetraceError, match=f"the {k} strongest rows cannot be given; ask for 1 or more"):
                listed(k)
    frame = scores.top(3).to_pandas()
    assert list(frame["rank"]) == [1, 2, 3] * problem.m
    first = scores.values[0]
    assert frame["example"][0] == scores.train_ids[int(first.argmax())]
    assert scores.bottom(1).to_pandas()["score"][0] == first.min()
    assert (scores.to_pandas().loc[scores.query_ids[1]].to_numpy() == scores.values[1]).all()
    import json

    import pandas as pd

    for suffix in ("json", "csv", "parquet"):
        scores.save(tmp_path / f"s.{suffix}")
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["config"]["unit"] == "cosine"
    assert len(document["records"]) == scores.values.size
    assert np.allclose(pd.read_csv(tmp_path / "s.csv")["score"], pd.read_parquet(tmp_path / "s.parquet")["score"])
    with pytest.raises(FinetraceError, match="unknown kind of table"):
        scores.save(tmp_path / "s.xlsx")


def test_shapes_that_do_not_fit_are_refused(problem):
    with pytest.raises(FinetraceError, match="scores of shape"):
        Scores(np.zeros((1, 2)), problem.queries, problem.rows.examples, "m", "u")


def test_a_query_without_a_response_is_named(index):
    with pytest.raises(FinetraceError, match="query q1: it has no response"):
        Problem(index, [Example.from_prompt("hello", id="q1")])
    with pytest.raises(FinetraceError, match="no query"):
        Problem(index, [])


def test_lexical_search_does_not_start_jax(tmp_path: Path) -> None:
    """bm25s tries JAX, which would reserve most of a GPU's memory, for a sort that is not asked of it."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('JAX was started')")
    script = (
        "from finetrace.attribution.lexical import _bm25s; import sys; print(_bm25s().__name__, 'jax' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["bm25s", "False"]
