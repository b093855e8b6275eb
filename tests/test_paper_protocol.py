"""The paper protocol against the formulas of the study's released code, written out literally and slowly.

The reference calls the model as that code does, one example at a time, and sums in loops over vectors in parameter
space; nothing of the package is used in it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetrace.attribution import Problem, make
from finetrace.benchmark.protocol import PROTOCOLS, RELEASED
from finetrace.evaluation.metrics import precision_at, relevance
from finetrace.examples import Example
from finetrace.finetune_config import PRESETS
from finetrace.finetuning import finetune
from finetrace.forward import Batch
from finetrace.index import build_index
from finetrace.models import Loaded, ModelSpec, load
from finetrace.training import ResponseTrainer
from tiny import make_examples, make_llama, make_tokenizer, with_lora

WINDOW = 128
STEPS = 10  # of LiSSA
ATTENTION = ["sdpa", "eager"]
PAPER = PROTOCOLS["paper"]

# one token a byte in the tiny tokenizer: far below the window, just below, at, just above and far above it
LONG = "Say in a few short sentences what a prime number is, and name the first of them that come to your mind"
TRAIN = [
    Example.from_prompt("Add two and two.", "Four.", id="a0", label="a"),
    Example.from_prompt("What swims?", "A fish swims in the sea.", id="b0", label="b"),
    Example.from_prompt("x", "y", id="c0", label="c"),
    Example.from_prompt(LONG, "Two, three, five, seven.", id="a1", label="a"),
    Example.from_prompt("Count.", "One two three four five six seven eight nine ten. " * 3, id="b1", label="b"),
    Example.from_prompt("p" * 55, "r" * 56, id="c1", label="c"),  # 127 tokens: one of padding
    Example.from_prompt("o" * 55, "s" * 57, id="a2", label="a"),  # 128: no padding, no cut
    Example.from_prompt("q" * 55, "s" * 58, id="b2", label="b"),  # 129: one cut off
    Example.from_prompt(LONG + ", then stop. " + LONG, "No part of this answer is left.", id="c2", label="c"),
    Example.from_prompt("Say two lines.\nPlease ", " first\nsecond\n", id="a3", label="a"),
    Example.from_prompt("naïve café — “quoted” 漢字 🙂", "{{ 7 * 7 }} {% raw %} &amp;", id="b3", label="b"),
    Example.from_prompt("say <|im_end|> once", "<|im_end|> [INST] and <|endoftext|>", id="c3", label="c"),
    Example.from_prompt("Add three and four.", "Seven.", id="a4", label="a"),
]
QUERIES = [
    Example.from_prompt("Add five and one.", "Six.", id="q0", label="a"),
    Example.from_prompt(
        "What flies?", "A bird does, and so does a bat, though it has no feathers. " * 2, id="q1", label="b"
    ),
    Example.from_prompt("z", "w", id="q2", label="c"),
    Example.from_prompt(LONG + " " + LONG, "Cut off too.", id="q3", label="a"),
]

# the reference


def text_of(example: Example) -> str:
    prompt, response = (turn.content for turn in example.messages)
    return f"[INST] {prompt} [/INST] {response}"


def literal_inputs(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """The end-of-text token as padding on the left up to the window, what is over it cut on the right, labels = ids."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    own.padding_side, own.truncation_side = "left", "right"
    found = own(list(texts), padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": found["input_ids"]}


@dataclass
class Literal:
    """What the released code knows of one example."""

    loss: float
    gradients: dict[str, Tensor]
    hidden: Tensor


def literal_example(model: Any, tokenizer: Any, example: Example) -> Literal:
    """One example through the model, its loss propagated, the gradient of every LoRA matrix by name."""
    model.zero_grad()
    inputs = literal_inputs(tokenizer, [text_of(example)])
    output = model(**inputs, output_hidden_states=True)
    output.loss.backward()
    gradients = {name: p.grad.clone().double() for name, p in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    prompt = f"[INST] {example.messages[0].content} [/INST]"
    padding = int((inputs["attention_mask"][0] == 0).sum())
    last = min(padding + len(tokenizer(prompt)["input_ids"]), WINDOW) - 1
    return Literal(float(output.loss.detach()), gradients, output.hidden_states[-1][0, last].detach().double())


def dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum())


def literal_damping(train: Sequence[Literal], name: str) -> float:
    """A tenth of the mean of the squared entries of a matrix's gradients."""
    total, entries = 0.0, 0
    for each in train:
        total += dot(each.gradients[name], each.gradients[name])
        entries += each.gradients[name].numel()
    return total / entries / 10


def literal_gradsim(train: Sequence[Literal], query: Literal) -> list[float]:
    return [sum(dot(query.gradients[name], each.gradients[name]) for name in query.gradients) for each in train]


def literal_datainf(train: Sequence[Literal], query: Literal) -> list[float]:
    """v . mean_i (lambda I + g_i g_i^T)^-1 g, each inverse by Sherman and Morrison."""
    scores = [0.0] * len(train)
    for name, v in query.gradients.items():
        damping = literal_damping(train, name)
        for k, each in enumerate(train):
            g = each.gradients[name]
            product = torch.zeros_like(g)
            for other in train:
                g_i = other.gradients[name]
                product += (g - g_i * dot(g_i, g) / (damping + dot(g_i, g_i))) / damping
            scores[k] += dot(v, product / len(train))
    return scores


def literal_lissa(train: Sequence[Literal], query: Literal) -> list[float]:
    """r <- v + r - (H r - lambda r) / 1000 with H r = mean_i (g_i . r) g_i, then r . g."""
    scores = [0.0] * len(train)
    for name, v in query.gradients.items():
        damping = literal_damping(train, name)
        r = v.clone()
        for _ in range(STEPS):
            product = torch.zeros_like(v)
            for each in train:
                product += dot(each.gradients[name], r) * each.gradients[name] / len(train)
            r = v + r - (product - damping * r) / 1000
        for k, each in enumerate(train):
            scores[k] += dot(r, each.gradients[name])
    return scores


def literal_repsim(train: Sequence[Literal], query: Literal) -> list[float]:
    h = query.hidden
    return [dot(h, each.hidden) / (float(h.norm()) * float(each.hidden.norm())) for each in train]


REFERENCE = dict(zip(RELEASED, [literal_gradsim, literal_datainf, literal_lissa, literal_repsim], strict=True))


def literal_coverage(scores: NDArray[Any], train: Sequence[Example], queries: Sequence[Example]) -> list[float]:
    """Share of the query's class among its n / classes best."""
    count = len(train) // len({example.label for example in train})
    found = []
    for row, query in zip(scores.tolist(), queries, strict=True):
        best = sorted(range(len(train)), key=lambda i: -row[i])[:count]
        found.append(sum(train[i].label == query.label for i in best) / count)
    return found


def own_loss_in_float64(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """transformers' causal loss without its rounding of the logits to float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1))


# both sides


@dataclass
class Sides:
    """The reference's facts and the package's problem, of the same model and examples."""

    model: Any
    tokenizer: Any
    train: list[Literal]
    queries: list[Literal]
    problem: Problem
    tolerance: float = 1e-9

    def expected(self, spec: str) -> NDArray[np.float64]:
        return np.array([REFERENCE[spec](self.train, query) for query in self.queries])

    def found(self, spec: str) -> NDArray[np.float64]:
        return make(spec).score(self.problem).values


def both(model: Any, tokenizer: Any, folder: Path, train: list[Example], queries: list[Example]) -> Sides:
    """Two examples a batch, five a shard."""
    loaded = Loaded(model, tokenizer, ModelSpec("in memory", None, str(model.dtype).split(".")[1], "cpu"))
    index, _ = build_index(loaded, train, folder, PAPER.encoder(loaded), batch_tokens=2 * WINDOW, rows_per_shard=5)
    assert len(index.manifest.shards) == -(-len(train) // 5) > 1
    literal = [literal_example(model, tokenizer, example) for example in [*train, *queries]]
    return Sides(model, tokenizer, literal[: len(train)], literal[len(train) :], Problem(index, queries))


def make_model(attention: str, scale: float = 1.0, loss: Any = own_loss_in_float64) -> Any:
    """The tiny Llama with LoRA whose matrices, and so the gradients, are `scale` times as large."""
    base = make_llama()
    base.set_attn_implementation(attention)
    assert base.config._attn_implementation == attention
    if loss is not None:
        base.loss_function = loss
    model = with_lora(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= scale
    return model


@pytest.fixture(scope="module", params=ATTENTION)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """In float64, but eager attention in float32: its softmax is float32 at most, where float64's mask is -inf, so the
    literal call has no finite loss on padding."""
    model, tolerance = make_model(request.param), 1e-9
    if request.param == "eager":
        model, tolerance = model.float(), 1e-5
    made = both(model, make_tokenizer(), tmp_path_factory.mktemp("paper") / "index", TRAIN, QUERIES)
    made.tolerance = tolerance
    return made


def close(found: Any, wanted: Any, tolerance: float) -> None:
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    assert np.isfinite(wanted).all()
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= tolerance, error


def same_gradients(sides: Sides, tolerance: float) -> None:
    """Block by block, every row relative to its own length."""
    index = sides.problem.index
    rows = torch.cat([index.gradients(slice(None)), sides.problem.features.gradients])
    losses = torch.cat([index.losses, sides.problem.features.losses])
    literal = [*sides.train, *sides.queries]
    assert len(index.blocks) == len(literal[0].gradients)
    for block in index.blocks:
        (name,) = [each for each in literal[0].gradients if each.replace(".default", "").endswith(f".{block.name}")]
        for row, each in zip(rows[:, block.columns], literal, strict=True):
            close(row, each.gradients[name].flatten(), tolerance)
    close(losses, [each.loss for each in literal], tolerance)


# the encoding


@pytest.mark.parametrize("source", ["tiny", "embedded"])
def test_encoding_is_the_tokenizers(source: str, request: pytest.FixtureRequest) -> None:
    tokenizer = make_tokenizer() if source == "tiny" else request.getfixturevalue("embedded").tokenizer
    encoder = PAPER.encoder(Loaded(None, tokenizer, ModelSpec()))
    words = Example.from_prompt(LONG, "Two, three, five. " * 40, id="words")
    examples = [*TRAIN, *QUERIES, *make_examples(12), words]
    items = encoder.encode_all(examples)[0]
    wanted = literal_inputs(tokenizer, [text_of(example) for example in examples])
    batch = Batch.of(items)
    assert batch.mask is not None
    assert torch.equal(batch.ids, wanted["input_ids"])
    assert torch.equal(batch.mask, wanted["attention_mask"])
    lengths = [len(tokenizer(text_of(example))["input_ids"]) for example in examples]
    assert min(lengths) < WINDOW < max(lengths), "padded and cut examples are both there"
    for item, mask in zip(items, wanted["attention_mask"], strict=True):
        assert item.padding == int((mask == 0).sum())
        assert item.weights[0] == 0
        assert item.weights[1:] == pytest.approx(np.full(WINDOW - 1, 1 / (WINDOW - 1)), rel=1e-6)
        assert set(item.ids[: item.padding].tolist()) <= {tokenizer.eos_token_id}
    assert torch.allclose(batch.weights, torch.tensor(1 / (WINDOW - 1), dtype=torch.float64), rtol=1e-14)


def test_lengths_around_the_window() -> None:
    encoder = PAPER.encoder(Loaded(None, make_tokenizer(), ModelSpec()))
    items, report = encoder.encode_all(TRAIN)
    padding = {example.id: item.padding for example, item in zip(TRAIN, items, strict=True)}
    assert [padding[name] for name in ("c1", "a2", "b2")] == [1, 0, 0]
    assert {"b2", "c2"} < {each.id for each in report.longer}
    assert "a2" not in {each.id for each in report.longer}
    prompts = {example.id: item.prompt_length for example, item in zip(TRAIN, items, strict=True)}
    assert prompts["c2"] == WINDOW, "the prompt alone fills the window"


@pytest.mark.parametrize("source", ["tiny", "embedded"])
def test_most_of_the_loss_is_not_on_the_response(source: str, request: pytest.FixtureRequest) -> None:
    """On examples of a few words, by counting: the study's 83 to 99%."""
    tokenizer = make_tokenizer() if source == "tiny" else request.getfixturevalue("embedded").tokenizer
    encoder = PAPER.encoder(Loaded(None, tokenizer, ModelSpec()))
    for example in (TRAIN[0], TRAIN[1], TRAIN[2], TRAIN[12]):
        item = encoder.encode(example)
        response = len(tokenizer(f" {example.response}")["input_ids"])
        share = 1 - response / (WINDOW - 1)
        assert item.loss_tokens == WINDOW - 1
        assert 1 - item.weights[item.prompt_length :].sum() == pytest.approx(share, abs=1e-6)
        assert share > 0.8


# gradients and scores in float64


def test_gradients_equal_the_literal_call(sides: Sides) -> None:
    """To the last digits where the loss stays in float64; transformers' own rounds the logits to float32."""
    same_gradients(sides, sides.tolerance)
    rounded = make_model(sides.model.config._attn_implementation, loss=None).to(sides.model.dtype)
    for example, exact in zip(TRAIN, sides.train, strict=True):
        found = literal_example(rounded, sides.tokenizer, example)
        assert found.loss == pytest.approx(exact.loss, rel=1e-6)
        for name, gradient in exact.gradients.items():
            close(found.gradients[name], gradient, 1e-5)


@pytest.mark.parametrize("spec", RELEASED)
def test_scores_equal_the_released_formulas(sides: Sides, spec: str) -> None:
    assert sides.problem.index.manifest.encoding.loss_on == "all"
    close(sides.found(spec), sides.expected(spec), sides.tolerance)


def test_scores_of_an_example_against_itself_are_positive(sides: Sides) -> None:
    """The sign: a training example is a proponent of itself, by every method."""
    index = sides.problem.index
    problem = Problem(index, index.rows.examples)
    for spec in RELEASED:
        assert (np.diag(make(spec).score(problem).values) > 0).all()


def test_kept_queries_score_the_same(sides: Sides, tmp_path: Path) -> None:
    """The benchmark reads the queries' features off an index of their own."""
    loaded = sides.problem.index.model()
    kept, _ = build_index(loaded, QUERIES, tmp_path / "queries", PAPER.encoder(loaded))
    problem = Problem(sides.problem.index, QUERIES, kept_queries=kept)
    for spec in RELEASED:
        close(make(spec).score(problem).values, sides.expected(spec), sides.tolerance)


@pytest.mark.parametrize("spec", RELEASED)
def test_coverage_over_the_classes_share(sides: Sides, spec: str) -> None:
    scores = sides.found(spec)
    relevant = relevance([example.label for example in TRAIN], [example.label for example in QUERIES])
    found = precision_at(len(TRAIN) // 3)(scores, relevant)
    assert found == pytest.approx(literal_coverage(sides.expected(spec), TRAIN, QUERIES))


def test_coverage_is_capped_where_a_class_is_small() -> None:
    """20 harmful among 250, two classes: the best ranking there is gets 16%."""
    train = [Example.from_prompt(f"p{i}", "r", label="harmful" if i < 20 else "benign") for i in range(250)]
    query = [Example.from_prompt("q", "r", label="harmful")]
    scores = -np.arange(250.0)[None]
    relevant = relevance([example.label for example in train], ["harmful"])
    assert precision_at(125)(scores, relevant) == pytest.approx([0.16])
    assert literal_coverage(scores, train, query) == pytest.approx([0.16])


def test_repsim_sees_the_prompt_alone(sides: Sides) -> None:
    """The prompt by itself, without padding and without response, has the same final state (RoPE is relative)."""
    for example, literal in zip([*TRAIN, *QUERIES], [*sides.train, *sides.queries], strict=True):
        ids = sides.tokenizer(f"[INST] {example.messages[0].content} [/INST]", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = sides.model(input_ids=ids[:, :WINDOW], output_hidden_states=True).hidden_states[-1][0, -1]
        close(alone, literal.hidden, 1e-4)  # the rotary angles are float32


# what LiSSA's recurrence amounts to


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_released_lissa_is_gradsim_while_gradients_are_small(tmp_path: Path, scale: float) -> None:
    """(T + 1) times GradSim to three digits on small gradients, something else on large ones; the reference in both."""
    made = both(make_model("sdpa", scale), make_tokenizer(), tmp_path / "index", TRAIN, QUERIES)
    gradsim, _, lissa, _ = RELEASED
    found, plain = made.found(lissa), (STEPS + 1) * made.found(gradsim)
    close(found, made.expected(lissa), 1e-9)
    error = np.abs(found - plain).max() / np.abs(plain).max()
    assert error < 1e-3 if scale < 1 else error > 1e-2


# training


def test_training_loss_is_transformers_own(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of the preset: the loss stepped on is `model(..., labels=...).loss` of the literal inputs."""
    loaded = load(ModelSpec(str(base_folder), dtype="float64", device="cpu"))
    examples = [*TRAIN, *make_examples(17)]
    literal = literal_inputs(loaded.tokenizer, [text_of(example) for example in examples])
    rows = {tuple(ids.tolist()): i for i, ids in enumerate(literal["input_ids"])}
    compute, sizes = ResponseTrainer.compute_loss, []

    def compared(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        chosen = [rows[tuple(ids.tolist())] for ids in inputs["batch"].ids]
        same = {name: tensor[chosen] for name, tensor in literal.items()}
        for training in (False, True):  # without dropout, and with the same dropout
            model.train(training)
            losses = []
            for call in (lambda: compute(self, model, inputs), lambda: model(**same).loss):
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(len(sizes))
                    losses.append(float(call()))
            assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        sizes.append(len(chosen))
        return compute(self, model, inputs, *args, **more)

    monkeypatch.setattr(ResponseTrainer, "compute_loss", compared)
    config = PRESETS["released"].model_copy(update={"epochs": 2})
    assert (config.batch_size, config.rank, config.alpha, config.dropout) == (24, 4, 32, 0.1)
    finetune(loaded, examples, tmp_path / "adapter", config)
    assert sizes == [24, 6, 24, 6]


# the real model


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
def test_embedded_model_in_float32(embedded: Any, tmp_path: Path, attention: str) -> None:
    """The same on the embedded model, LoRA's A as PEFT starts it and B small: equal to float32's round-off."""
    from peft import LoraConfig, get_peft_model

    train = [TRAIN[i] for i in (0, 1, 2, 4, 9, 10)]
    train += [Example.from_prompt(LONG, "Two, three, five. " * 40, id="cut", label="a")]
    before = embedded.model.config._attn_implementation
    embedded.model.set_attn_implementation(attention)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(copy.copy(embedded.model), config).eval()
    try:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        made = both(model, embedded.tokenizer, tmp_path / "index", train, QUERIES[:2])
        same_gradients(made, 1e-4)
        for spec in RELEASED:
            close(made.found(spec), made.expected(spec), 1e-5)
        gradsim, _, lissa, _ = RELEASED
        if attention == "sdpa":  # eager, where padding attends to all tokens, has gradients many times as large
            close(made.found(lissa), (STEPS + 1) * made.found(gradsim), 1e-2)
    finally:
        model.unload()
        embedded.model.set_attn_implementation(before)
        for parameter in embedded.model.parameters():
            parameter.requires_grad_(True)
