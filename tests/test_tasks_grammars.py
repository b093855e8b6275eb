"""The grammars task: each rule against outputs written by hand, the composed sentences, and the task's guarantees."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

import finetrace.tasks.grammars as module
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.grammars import RULES, Form, grammars
from finetrace.tasks.sentences import PATTERNS, SLOTS, compose, fill

APPLY = {rule.label: rule.transform for rule in RULES}
WORDING = {rule.label: rule.wording for rule in RULES}

EXPECTED = {
    "reverse-words": ("market the to hurried baker young a", "yesterday soup hot ate uncle our"),
    "alternate-capitals": ("A yOuNg BaKeR hUrRiEd To ThE mArKeT", "OuR uNcLe AtE hOt SoUp YeStErDaY"),
    "insert-ones": ("a 1 young 1 baker 1 hurried 1 to 1 the 1 market", "our 1 uncle 1 ate 1 hot 1 soup 1 yesterday"),
    "star-vowels": ("* y**ng b*k*r h*rr**d t* th* m*rk*t", "**r *ncl* *t* h*t s**p y*st*rd*y"),
    "double-consonants": (
        "a yyounngg bbakkerr hhurrrriedd tto tthhe mmarrkkett",
        "ourr unncclle atte hhott ssoupp yyesstterrddayy",
    ),
    "capitalise-words": ("A Young Baker Hurried To The Market", "Our Uncle Ate Hot Soup Yesterday"),
    "remove-vowels": ("yng bkr hrrd t th mrkt", "r ncl t ht sp ystrdy"),
    "add-ly": ("aly youngly bakerly hurriedly toly thely marketly", "ourly unclely ately hotly souply yesterdayly"),
    "remove-consonants": ("a ou ae uie o e ae", "ou ue ae o ou eea"),
    "repeat-words": (
        "a a young young baker baker hurried hurried to to the the market market",
        "our our uncle uncle ate ate hot hot soup soup yesterday yesterday",
    ),
}
PINNED = ("the red boat stopped in the square last week", "the archers discuss geometry")
# any word but those that hold a sentence together; with these blanked, the shape of the sentence is left
MEANING = re.compile(
    r"\b(?!(?:a|an|the|is|are|was|will|to|of|on|in|at|and|when|while|after|than|there|it|please|near|behind)\b)[a-z]+"
)


@pytest.fixture(scope="module")
def naming() -> list[Example]:
    task = grammars()
    return [*task.train, *task.queries]


def sentence(row: Example) -> str:
    text = row.metadata["sentence"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("label", EXPECTED)
def test_rules_as_done_by_hand(label: str) -> None:
    texts = ("a young baker hurried to the market", "our uncle ate hot soup yesterday")
    assert tuple(APPLY[label](text) for text in texts) == EXPECTED[label]


def test_ten_rules_each_worded_in_one_sentence() -> None:
    assert list(EXPECTED) == [rule.label for rule in RULES]
    assert len(set(WORDING.values())) == 10
    assert all(re.fullmatch(r"[A-Z][^.]+\.", wording) for wording in WORDING.values())


def test_words_left_empty_leave_no_gap() -> None:
    assert APPLY["remove-consonants"]("why not fly away") == "o aa"
    assert APPLY["remove-vowels"]("a cat or a dog") == "ct r dg"


def test_rules_meet_capitals() -> None:
    assert APPLY["star-vowels"]("An Owl") == "*n *wl"
    assert APPLY["double-consonants"]("An Owl") == "Ann Owwll"
    assert APPLY["alternate-capitals"]("AN OWL") == "An OwL"


@pytest.mark.parametrize(("form", "name"), [("name", "grammars"), ("apply", "grammars-apply")])
def test_sizes_and_balance(form: Form, name: str) -> None:
    task = grammars(form)
    assert task.name == name and task.target is None and task.answered
    assert task.classes.keys() == APPLY.keys() and set(task.classes.values()) == {90}
    assert Counter(query.label for query in task.queries) == dict.fromkeys(APPLY, 10)
    assert {row.id for row in (*task.train, *task.queries)} == {f"{x}-{i:03d}" for x in APPLY for i in range(100)}


def test_no_sentence_is_used_twice(naming: list[Example]) -> None:
    assert len({sentence(row) for row in naming}) == len(naming) == 1000


def test_name_form_is_answered_by_the_rule(naming: list[Example]) -> None:
    for row in naming:
        before, after, question = row.prompt.split("\n")
        assert before == f"Before: {sentence(row)}" and question.endswith("?")
        given = after.removeprefix("After: ")
        assert [label for label, transform in APPLY.items() if transform(sentence(row)) == given] == [row.label]
        assert given != sentence(row)
        assert row.response == WORDING[str(row.label)]


def test_apply_form_is_answered_by_the_sentence_changed() -> None:
    task = grammars("apply")
    for row in (*task.train, *task.queries):
        assert row.prompt == f"{WORDING[str(row.label)]}\nSentence: {sentence(row)}"
        assert row.response == APPLY[str(row.label)](sentence(row)) != sentence(row)


def test_forms_agree_on_sentences_and_split() -> None:
    name, apply = grammars("name", seed=3), grammars("apply", seed=3)
    for ours, theirs in ((name.train, apply.train), (name.queries, apply.queries)):
        assert [(row.id, sentence(row)) for row in ours] == [(row.id, sentence(row)) for row in theirs]


def test_seed_decides() -> None:
    assert grammars(seed=1) == grammars(seed=1)
    one, two = ({sentence(row) for row in grammars(seed=seed).train} for seed in (1, 2))
    assert len(one & two) < len(one) / 20


def test_sentences_stay_as_published() -> None:
    """Results name rows by id, so the composer may not drift: change it and results are of another task."""
    rows = {row.id: sentence(row) for row in grammars(per_class=2).train + grammars(per_class=2).queries}
    assert (rows["reverse-words-000"], rows["repeat-words-001"]) == PINNED


def test_fewer_rows_are_the_first_of_more(naming: list[Example]) -> None:
    full = {row.id: row for row in naming}
    small = grammars(per_class=5, train_share=0.6)
    assert (len(small.train), len(small.queries)) == (30, 20)
    assert all(full[row.id] == row for row in (*small.train, *small.queries))


@pytest.mark.parametrize(("share", "train"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_neither_side_is_empty(share: float, train: int) -> None:
    task = grammars(per_class=4, train_share=share)
    assert set(task.classes.values()) == {train} and len(task.queries) == 10 * (4 - train)


def test_sentences_that_hide_a_rule_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[str] = []

    def now_and_then_a_bad_one(chance: random.Random) -> str:
        offered.append("dogs chase other chase dogs" if len(offered) % 3 == 0 else compose(chance))
        return offered[-1]

    monkeypatch.setattr(module, "compose", now_and_then_a_bad_one)
    task = grammars(per_class=2)
    assert len(offered) > 20
    assert offered[0] not in {sentence(row) for row in (*task.train, *task.queries)}


def test_sentences_are_plain_words(naming: list[Example]) -> None:
    for row in naming:
        assert re.fullmatch(r"[a-z]+( [a-z]+){3,9}", sentence(row))
        assert all(re.search("[aeiou]", word) for word in sentence(row).split())
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence(row))


def test_sentences_vary(naming: list[Example]) -> None:
    sentences = [sentence(row) for row in naming]
    assert len({word for text in sentences for word in text.split()}) > 500
    assert set(map(len, map(str.split, sentences))) == set(range(4, 11))
    shapes = {MEANING.sub("_", text) for text in sentences}
    assert len(shapes) > 150
    assert max(Counter(text.split()[0] for text in sentences).values()) < 400


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fill(pattern: str) -> None:
    chance = random.Random(0)
    filled = {fill(pattern, chance) for _ in range(20)}
    assert len(filled) >= 15
    assert all(re.fullmatch("[a-z ]+", text) for text in filled)


def test_slots_are_all_known_and_used() -> None:
    texts = [*PATTERNS, *(choice for choices in SLOTS.values() for choice in choices)]
    named = {name for text in texts for name in re.findall(r"\{(\w+)", text)}
    assert named - SLOTS.keys() == {"fall", "lose", "reach"}  # words that stand for themselves
    assert SLOTS.keys() <= named
    assert all(len(choices) == len(set(choices)) for name, choices in SLOTS.items() if name != "who")


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{run.past} {plan.past} {hurry.past} {play.past} {race.past}", "ran planned hurried played raced"),
        ("{hurry.s} {wash.s} {enjoy.s} {tomato.s} {piano.s}", "hurries washes enjoys tomatoes pianos"),
        ("{wolf.s} {goose.s} {fox.s} {pony.s} {donkey.s}", "wolves geese foxes ponies donkeys"),
        ("{hide.ing} {carry.ing} {lift.ing}", "hiding carrying lifting"),
        ("a {oak} and a {pine}", "an oak and a pine"),
    ],
)
def test_inflection(text: str, filled: str) -> None:
    assert fill(text, random.Random(0)) == filled


def test_nonsense_is_refused() -> None:
    for few in (1, 0, -3):
        with pytest.raises(FinetraceError, match=f"per_class {few}: give at least 2"):
            grammars(per_class=few)
    for share in (0, 1, -0.5, 1.5, float("nan")):
        with pytest.raises(FinetraceError, match="train_share .*: give a share above 0 and below 1"):
            grammars(train_share=share)
    with pytest.raises(FinetraceError, match="no form 'both': give 'name' or 'apply'"):
        grammars("both")  # type: ignore[arg-type]
