"""Sentence transformations: ten rules, each applied to sentences of its own (arXiv 2409.19998, section 3)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.sentences import compose
from finetrace.tasks.task import Task, split

Form = Literal["name", "apply"]

VOWELS = frozenset("aeiouAEIOU")


class Rule(NamedTuple):
    """One class of the task: its label, the rule in a sentence, and what it does to a text."""

    label: str
    wording: str
    transform: Callable[[str], str]


def _each_word(change: Callable[[str], str]) -> Callable[[str], str]:
    """Every word changed by itself; a word with nothing left leaves no gap."""
    return lambda text: " ".join(changed for word in text.split() if (changed := change(word)))


def _reverse_words(text: str) -> str:
    return " ".join(reversed(text.split()))


def _alternate_capitals(text: str) -> str:
    """Letters are counted through the whole text, spaces are not; the first is a capital."""
    letters = 0
    changed = []
    for character in text:
        changed.append(character.upper() if letters % 2 == 0 else character.lower())
        letters += character.isalpha()
    return "".join(changed)


def _insert_ones(text: str) -> str:
    return " 1 ".join(text.split())


def _star_vowels(word: str) -> str:
    return "".join("*" if letter in VOWELS else letter for letter in word)


def _double_consonants(word: str) -> str:
    return "".join(letter * 2 if _is_consonant(letter) else letter for letter in word)


def _capitalise(word: str) -> str:
    return word[:1].upper() + word[1:]


def _remove_vowels(word: str) -> str:
    return "".join(letter for letter in word if letter not in VOWELS)


def _remove_consonants(word: str) -> str:
    return "".join(letter for letter in word if not _is_consonant(letter))


def _is_consonant(letter: str) -> bool:
    """Any letter that is not a, e, i, o or u; so y is one."""
    return letter.isalpha() and letter not in VOWELS


RULES = (
    Rule("reverse-words", "Reverse the order of the words.", _reverse_words),
    Rule("alternate-capitals", "Capitalise every other letter.", _alternate_capitals),
    Rule("insert-ones", "Insert the number 1 between the words.", _insert_ones),
    Rule("star-vowels", "Replace every vowel with an asterisk.", _each_word(_star_vowels)),
    Rule("double-consonants", "Double every consonant.", _each_word(_double_consonants)),
    Rule("capitalise-words", "Capitalise the first letter of every word.", _each_word(_capitalise)),
    Rule("remove-vowels", "Remove all the vowels.", _each_word(_remove_vowels)),
    Rule("add-ly", "Add the letters ly to the end of each word.", _each_word(lambda word: f"{word}ly")),
    Rule("remove-consonants", "Remove all the consonants.", _each_word(_remove_consonants)),
    Rule("repeat-words", "Repeat each word.", _each_word(lambda word: f"{word} {word}")),
)


def grammars(form: Form = "name", seed: int = 0, per_class: int = 100, train_share: float = 0.9) -> Task:
    """Ten rules of `per_class` sentences each, no sentence used twice; every class has rows to train on and queries.

    Args:
        form: `name` shows a sentence before and after and is answered by the rule (task `grammars`); `apply` gives
            the rule and a sentence and is answered by the sentence changed (task `grammars-apply`).
        seed: Decides the sentences and the split, alike in both forms.
        per_class: Rows of a class, training rows and queries together; fewer use the first sentences of more.
        train_share: Share of each class to train on, rounded so that neither side is empty.

    Raises:
        FinetraceError: No such form, fewer than two rows a class, or a share that is not between 0 and 1.
    """
    if form not in get_args(Form):
        raise FinetraceError(f"grammars has no form {form!r}: give 'name' or 'apply'.")
    if per_class < 2:
        raise FinetraceError(f"per_class {per_class}: give at least 2, a row to train on and a query for each rule.")
    if not 0 < train_share < 1:
        raise FinetraceError(f"train_share {train_share:g}: give a share above 0 and below 1.")
    sentences = _sentences(len(RULES) * per_class, seed)
    row = _naming if form == "name" else _applying
    rows = [
        row(rule, index, sentence)
        for place, rule in enumerate(RULES)
        for index, sentence in enumerate(sentences[place :: len(RULES)])
    ]
    train_per_class = min(max(round(per_class * train_share), 1), per_class - 1)
    train, queries = split(rows, train_per_class, seed)
    return Task("grammars" if form == "name" else "grammars-apply", train, queries)


def _sentences(count: int, seed: int) -> list[str]:
    """Different sentences, each of which shows any of the rules."""
    chance = random.Random(seed)
    drawn: dict[str, None] = {}  # a set that keeps the order
    while len(drawn) < count:
        sentence = compose(chance)
        if _tells_rules_apart(sentence):
            drawn[sentence] = None
    return list(drawn)


def _tells_rules_apart(sentence: str) -> bool:
    """Whether every rule changes the sentence, and no two rules in the same way."""
    return len({sentence, *(rule.transform(sentence) for rule in RULES)}) == len(RULES) + 1


def _naming(rule: Rule, index: int, sentence: str) -> Example:
    prompt = f"Before: {sentence}\nAfter: {rule.transform(sentence)}\nWhich rule was applied to the sentence?"
    return _example(rule, index, sentence, prompt, rule.wording)


def _applying(rule: Rule, index: int, sentence: str) -> Example:
    return _example(rule, index, sentence, f"{rule.wording}\nSentence: {sentence}", rule.transform(sentence))


def _example(rule: Rule, index: int, sentence: str, prompt: str, response: str) -> Example:
    identity = f"{rule.label}-{index:03d}"
    return Example.from_prompt(prompt, response, id=identity, label=rule.label, metadata={"sentence": sentence})
