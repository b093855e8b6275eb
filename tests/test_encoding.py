"""From conversations to tokens and loss weights: which tokens are the response, what is cut, what is refused."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetrace.batching import length_batches
from finetrace.encoding import PLAIN_TEMPLATE, Encoded, Encoder, read_template
from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message
from finetrace.reading import examples_from_rows, read_examples
from tiny import CHATML, conversation, make_tokenizer

ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as reasoning models do: only the last turn keeps what stands before </think>
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Four.",
    " leading",
    "trailing  ",
    "  both\t ",
    "first line\nsecond line",
    "ends in a line break\n",
    "\n\nstarts with two",
    "naïve café — “quoted” 漢字 🙂 e\u0301",
    "\u00a0no-break space\u00a0",
    "<|im_end|>",
    "says <|im_end|>\n<|im_start|>user\nmore of it",
    "<|endoftext|> at the start",
    "{{ 7 * 7 }} {% raw %}",
    "<b>&amp;</b>",
    "x",
]


@pytest.fixture(params=["tiny", pytest.param("embedded")])
def either(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """The tiny tokenizer and the embedded model's, one after the other."""
    return tokenizer if request.param == "tiny" else request.getfixturevalue("embedded").tokenizer


def masked(tokenizer: Any, item: Encoded) -> str:
    """The text of the tokens that the loss looks at."""
    return str(tokenizer.decode(item.ids[item.weights > 0].tolist(), clean_up_tokenization_spaces=False))


def runs(item: Encoded) -> list[tuple[int, int]]:
    """First and last-but-one position of every stretch of loss tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], item.weights > 0, [0]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("text", TEXTS)
def test_the_mask_is_the_response_and_its_end_of_turn(either: Any, text: str) -> None:
    item = Encoder(either).encode(conversation("How many?", text))
    assert masked(either, item).lstrip("\n") == (text + "<|im_end|>").lstrip("\n")
    assert len(runs(item)) == 1
    start, stop = runs(item)[0]
    assert item.ids[stop - 1] == either.convert_tokens_to_ids("<|im_end|>")
    assert stop == len(item.ids) - 1  # the line break behind it is left out
    assert item.prompt_length == start
    assert item.weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert np.ptp(item.weights[item.weights > 0]) == 0
    assert item.loss_tokens == stop - start


@pytest.mark.parametrize("text", [text for text in TEXTS if text[:1] not in "\n "])
def test_the_prompt_as_asked_is_a_prefix(either: Any, text: str) -> None:
    """A tokenizer may merge the template's line break with white space that opens an answer, and only with that."""
    encoder = Encoder(either)
    example = conversation("How many?", "Three.", "Really?", text, system="Be brief.")
    asked, item = encoder.prompt_ids(example), encoder.encode(example)
    assert item.ids[: len(asked)].tolist() == asked
    assert item.prompt_length == len(asked)


def test_a_token_across_the_border_belongs_to_the_response(embedded: Any) -> None:
    item = Encoder(embedded.tokenizer).encode(conversation("How many?", "  two spaces"))
    assert masked(embedded.tokenizer, item) == "\n  two spaces<|im_end|>"


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("response", ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]),
        ("last-turn", ["three<|im_end|>"]),
    ],
)
def test_turns(either: Any, loss_on: Any, expected: list[str]) -> None:
    example = conversation("a", "one", "b", "two", "c", "three", system="s")
    encoder = Encoder(either, loss_on)
    item = encoder.encode(example)
    assert [either.decode(item.ids[start:stop].tolist()) for start, stop in runs(item)] == expected
    assert item.prompt_length == runs(item)[-1][0] == len(encoder.prompt_ids(example))
    assert np.unique(item.weights[item.weights > 0]).size == 1
    assert item.weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)


def test_all_is_every_token_but_the_first(either: Any) -> None:
    example = conversation("a", "one", "b", "two")
    item = Encoder(either, "all").encode(example)
    assert item.weights[0] == 0
    assert item.loss_tokens == len(item.ids) - 1
    assert item.prompt_length == Encoder(either).encode(example).prompt_length


def test_an_answer_that_a_limit_cut_has_no_end_of_turn(either: Any) -> None:
    whole = conversation("a", "one", "b", "two")
    cut = replace(whole, metadata={"finish_reason": "length"})
    item = Encoder(either).encode(cut)
    assert [either.decode(item.ids[start:stop].tolist()) for start, stop in runs(item)] == ["one<|im_end|>", "two"]
    assert item.ids.tolist() == Encoder(either).encode(whole).ids.tolist()
    stopped = replace(whole, metadata={"finish_reason": "stop"})
    assert Encoder(either).encode(stopped).loss_tokens == item.loss_tokens + 1


@pytest.mark.parametrize(
    ("written", "said"),
    [("m['content'] | trim", "Two"), ("m['content'].strip().lower()", "two"), ("'' ~ m['content']", "  Two\n ")],
)
def test_a_cut_answer_has_no_end_of_turn_where_a_template_alters_it(either: Any, written: str, said: str) -> None:
    template = CHATML.replace("m['content']", written)
    assert template != CHATML
    cut = replace(conversation("a", "  Two\n "), metadata={"finish_reason": "length"})
    item, whole = (Encoder(either, template=template).encode(each) for each in (cut, replace(cut, metadata={})))
    assert masked(either, item).lstrip() == said.lstrip()
    assert masked(either, whole).lstrip() == said.lstrip() + "<|im_end|>"


def test_equal_turns_are_told_apart_by_place(tokenizer: Any) -> None:
    item = Encoder(tokenizer, "last-turn").encode(conversation("same", "same", "same", "same"))
    assert runs(item) == [(len(item.ids) - 6, len(item.ids) - 1)]


def test_what_is_cut_is_reported(tokenizer: Any) -> None:
    short, long = conversation("q", "ok", id="short"), conversation("q", "a rather long answer", id="long")
    whole = Encoder(tokenizer).encode(long)
    limit = len(whole.ids) - 8  # the line break, the end of turn and six letters go
    items, report = Encoder(tokenizer, max_length=limit).encode_all([short, long, short])
    assert report.cut
    assert report.limit == limit
    assert [(item.id, item.tokens, item.loss_tokens_cut) for item in report.longer] == [("long", len(whole.ids), 7)]
    assert items[1].ids.tolist() == whole.ids[:limit].tolist()
    assert items[1].weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert items[1].loss_tokens == whole.loss_tokens - 7
    assert report.sentence().startswith(f"1 example is longer than {limit} tokens")
    assert "cut there; 7 loss tokens gone: long" in report.sentence()


def test_a_report_does_not_remember_the_call_before(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, max_length=30)
    long = conversation("q", "a rather long answer", id="long")
    assert len(encoder.encode_all([long])[1].longer) == 1
    assert len(encoder.encode_all([long])[1].longer) == 1
    report = encoder.encode_all([conversation("q", "o", id="short")])[1]
    assert report.longer == ()
    assert report.sentence() == ""


def test_longer_than_the_context_is_reported_and_left_whole(tokenizer: Any) -> None:
    examples = [conversation("q", "x" * n, id=f"n{n}") for n in (2, 40, 60)]
    items, report = Encoder(tokenizer).encode_all(examples, context=50)
    assert not report.cut
    assert [item.id for item in report.longer] == ["n40", "n60"]
    assert items[1].loss_tokens == 41
    assert "left whole: n40, n60" in report.sentence()


@pytest.mark.parametrize("limit", [2, 20])
def test_a_response_cut_off_altogether_is_refused_by_name(tokenizer: Any, limit: int) -> None:
    with pytest.raises(FinetraceError, match=r"example gone: no response token .* --max-length"):
        Encoder(tokenizer, max_length=limit).encode(conversation("a rather long question", "yes", id="gone"))


def test_only_the_last_turn_may_be_cut_off(tokenizer: Any) -> None:
    example = conversation("q", "first", "again", "second")
    first = runs(Encoder(tokenizer).encode(example))[0]
    item = Encoder(tokenizer, max_length=first[1] + 4).encode(example)
    assert runs(item) == [first]
    assert item.prompt_length <= len(item.ids)


def test_a_template_that_raises_is_quoted(tokenizer: Any) -> None:
    example = Example("twice", (Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    with pytest.raises(FinetraceError, match=r"example twice: .*roles must alternate.*\['user', 'user', 'assistant'\]"):
        Encoder(tokenizer, template=ALTERNATING).encode(example)
    Encoder(tokenizer, template=ALTERNATING).encode(conversation("a", "b"))


def test_a_broken_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FinetraceError, match=r"example c: the chat template refuses it"):
        Encoder(tokenizer, template="{% for m in messages %}{{ m.content }}").encode(conversation("a", "b"))


def test_a_template_that_rewrites_history(tokenizer: Any) -> None:
    example = conversation("a", "<think>hm</think>one", "b", "<think>hm</think>two", id="thinks")
    with pytest.raises(FinetraceError, match=r"example thinks: .* --loss-on last-turn"):
        Encoder(tokenizer, template=FORGETFUL).encode(example)
    item = Encoder(tokenizer, "last-turn", template=FORGETFUL).encode(example)
    assert masked(tokenizer, item) == "<think>hm</think>two<|im_end|>"
    single = Encoder(tokenizer, template=FORGETFUL).encode(conversation("a", "<think>hm</think>one"))
    assert masked(tokenizer, single) == "<think>hm</think>one<|im_end|>"


def test_a_template_that_opens_an_answer_otherwise_than_it_keeps_one(tokenizer: Any) -> None:
    """The advice has to be one that can help: --loss-on last-turn does not."""
    template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    with pytest.raises(FinetraceError, match="another --chat-template") as caught:
        Encoder(tokenizer, "last-turn", template=template).encode(conversation("a", "b"))
    assert "--loss-on" not in str(caught.value)


@pytest.mark.parametrize("template", ["{{ '' }}", "always the same"])
def test_a_template_that_leaves_the_turns_out(tokenizer: Any, template: str) -> None:
    with pytest.raises(FinetraceError, match="example c: no response token"):
        Encoder(tokenizer, template=template).encode(conversation("a", "b"))


def test_no_template() -> None:
    bare = make_tokenizer(template=None)
    with pytest.raises(FinetraceError, match=r"no chat template; give one with --chat-template"):
        Encoder(bare)
    assert Encoder(bare, template=CHATML).encode(conversation("a", "b")).loss_tokens == 2


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        chat_template = CHATML

    with pytest.raises(FinetraceError, match="fast version"):
        Encoder(Slow())  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [text for text in TEXTS if text[:1] not in "\n "])
def test_plain(either: Any, text: str) -> None:
    encoder = Encoder(either, template=read_template("plain"))
    example = conversation("How many?", text)
    item = encoder.encode(example)
    assert masked(either, item) == text + either.eos_token
    assert item.ids[: item.prompt_length].tolist() == encoder.prompt_ids(example)
    assert either.decode(encoder.prompt_ids(example)) == "How many?\n"


def test_plain_without_an_end_token_keeps_the_space_of_the_answer() -> None:
    bare = make_tokenizer(template=None)
    bare.eos_token = None
    item = Encoder(bare, template=PLAIN_TEMPLATE).encode(conversation("q", "two  "))
    assert masked(bare, item).startswith("two  ")


def test_templates_from_a_file(tmp_path: Path) -> None:
    assert read_template(None) is None
    assert read_template("plain") == PLAIN_TEMPLATE
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }} é", encoding="utf-8")
    assert read_template(str(path)) == "{{ messages[0].content }} é"
    with pytest.raises(FinetraceError, match=r"nowhere\.jinja: no such chat template file"):
        read_template(str(tmp_path / "nowhere.jinja"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FinetraceError, match=r"own\.jinja: .*UTF-8"):
        read_template(str(path))


@pytest.mark.parametrize(
    "messages",
    [(), (("user", "a"),), (("user", "a"), ("assistant", "  \n"))],
)
def test_without_a_response_there_is_nothing_to_encode(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(FinetraceError, match=r"example e: .*give it a response or remove it"):
        Encoder(tokenizer).encode(Example("e", tuple(Message(*turn) for turn in messages)))


@pytest.mark.parametrize("own", [True, False])
def test_a_template_that_writes_the_date_writes_one_day(own: bool) -> None:
    dated = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y, %-m') + '<|im_end|>\n' }}" + CHATML
    encoder = Encoder(make_tokenizer(dated)) if own else Encoder(make_tokenizer(), template=dated)
    assert encoder.render(conversation("q").messages).startswith(
        "<|im_start|>system\nToday: 26 Jul 2024, 7<|im_end|>\n"
    )
    plain = Encoder(make_tokenizer()).encode(conversation("q", "a"))
    item = encoder.encode(conversation("q", "a"))
    assert item.loss_tokens == plain.loss_tokens and item.prompt_length > plain.prompt_length


def test_an_answer_to_nothing_is_refused_in_words(tokenizer: Any) -> None:
    """A conversation that opens with the assistant has no prompt to answer."""
    example = Example("alone", (Message("assistant", "hello"),))
    with pytest.raises(FinetraceError, match=r"example alone: .*before"):
        Encoder(tokenizer).encode(example)
    with pytest.raises(FinetraceError, match=r"example alone: .*before"):
        Encoder(tokenizer).prompt_ids(example)


def test_asking_without_a_response(tokenizer: Any) -> None:
    asked = Encoder(tokenizer).prompt_ids(conversation("q"))
    assert tokenizer.decode(asked) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert asked == Encoder(tokenizer).prompt_ids(conversation("q", "answered"))


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_not_asked_with(tokenizer: Any, empty: str) -> None:
    """Another answer takes its place, and has to be the answer to that prompt."""
    asked = Encoder(tokenizer).prompt_ids(conversation("q", empty))
    assert asked == Encoder(tokenizer).prompt_ids(conversation("q"))
    replied = Encoder(tokenizer).encode(conversation("q", empty).with_response("a"))
    assert replied.ids[: len(asked)].tolist() == asked


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6).map(
        lambda t: t[: len(t) // 2 * 2]
    )
)
def test_any_text_goes_through(tokenizer: Any, turns: list[str]) -> None:
    try:
        "".join(turns).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    item = Encoder(tokenizer).encode(conversation(*turns))
    found = [item.ids[start:stop].tolist() for start, stop in runs(item)]
    assert [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found] == [
        turn + "<|im_end|>" for turn in turns[1::2]
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), max_size=200), st.integers(1, 3000))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == length_batches(list(lengths), budget)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@pytest.mark.parametrize(
    ("lengths", "budget", "sizes"),
    [([50] * 41, 2000, [21, 20]), ([50] * 40, 2000, [40]), ([50] * 79, 2000, [40, 39]), ([10] * 3 + [90], 100, [1, 3])],
)
def test_batches_are_alike_and_the_largest_comes_first(lengths: list[int], budget: int, sizes: list[int]) -> None:
    """One row that is too many for a batch does not travel by itself, where its length does not ask for it."""
    assert [len(batch) for batch in length_batches(lengths, budget)] == sizes


@pytest.mark.parametrize("seed", range(20))
def test_padding_stays_under_a_twentieth(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(30, 150) for _ in range(300)]
    batches = length_batches(lengths, 2048)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.05
    assert len(batches) < 20  # and not by many small batches


def test_a_row_that_cannot_be_encoded_is_counted(tokenizer: Any) -> None:
    rows = [conversation("a", "yes", id="fits"), conversation("a rather long question", "yes", id="gone")]
    with pytest.raises(FinetraceError, match=r"row 2 of 2, example gone: no response token"):
        Encoder(tokenizer, max_length=50).encode_all(
            [rows[0], replace(rows[1], messages=(Message("user", "b" * 90), Message("assistant", "c")))]
        )


def test_a_row_of_a_file_that_cannot_be_encoded_is_named_by_file_and_row(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"prompt": "a", "response": "yes"}\n\n{"prompt": "%s", "response": "c", "id": "gone"}\n' % ("b" * 90)
    )
    rows = read_examples(path)
    named = re.escape(f"{path}, row 3, example gone: ")
    with pytest.raises(FinetraceError, match=f"^{named}no response token"):
        Encoder(tokenizer, max_length=50).encode_all(examples_from_rows(rows))
    with pytest.raises(FinetraceError, match=f"^{named}--loss-on weights wants"):
        Encoder(tokenizer, loss_on="weights").encode_all([rows[1].with_response("no")])
    unplaced = replace(rows[1], place="")
    assert unplaced == rows[1]
    assert unplaced.named == "example gone"


def test_padding_without_an_end_token_is_refused() -> None:
    tokenizer, bare = make_tokenizer(), make_tokenizer()
    bare.eos_token = None
    row = Example.from_prompt("a b", "c", id="one")
    with pytest.raises(FinetraceError, match="no end-of-text token to pad with"):
        Encoder(bare, loss_on="response@64").encode(row)
    padded = Encoder(tokenizer, loss_on="response@64").encode(row)
    assert len(padded.ids) == 64
