"""Lexical search: what sharing words alone finds."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from finetrace.attribution.method import Method, Need, register
from finetrace.attribution.problem import Problem
from finetrace.examples import Example

Text = Literal["prompt", "response", "both"]
EVERY = r"(?u)\b\w+\b"
LEXICAL = ("bm25", "tfidf", "opening")  # the methods of this file


def _bm25s() -> ModuleType:
    """bm25s, kept from importing JAX to sort scores that are not sorted here: JAX reserves most of a GPU when it starts."""
    if "bm25s" in sys.modules or "jax" in sys.modules:
        return importlib.import_module("bm25s")
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bm25s")
    finally:
        del sys.modules["jax"]


def _texts(examples: Sequence[Example], which: Text) -> list[str]:
    if which == "prompt":
        return [example.prompt for example in examples]
    if which == "response":
        return [example.response for example in examples]
    return [f"{example.prompt}\n{example.response}" for example in examples]


@register("bm25")
@dataclass(frozen=True)
class BM25(Method):
    """BM25 of the query's words in the example's text (Lucene's variant, k1 = 1.5, b = 0.75); prompt, response or both.

    Words of one character and English stop words are left out, as bm25s does; `all_words` takes them in.

    sum over the query's words w of idf(w) tf(w) / (tf(w) + k1 (1 - b + b length / mean length)).
    """

    needs: ClassVar[tuple[Need, ...]] = ("text",)
    control: ClassVar[bool] = True
    text: Text = "both"
    all_words: bool = False

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) BM25 scores; 0 where no word is shared."""
        bm25s = _bm25s()
        how = {"stopwords": None, "token_pattern": EVERY} if self.all_words else {"stopwords": "en"}
        corpus = bm25s.tokenize(_texts(problem.rows.examples, self.text), show_progress=False, **how)
        if not any(corpus.ids):
            return np.zeros((problem.m, problem.n))
        search = bm25s.BM25(method="lucene")
        search.index(corpus, show_progress=False)
        queries = bm25s.tokenize(_texts(problem.queries, self.text), show_progress=False, return_ids=False, **how)
        rows = [search.get_scores(words) if words else np.zeros(problem.n) for words in queries]
        return np.asarray(rows, dtype=np.float64)

    @property
    def unit(self) -> str:
        """As BM25 defines it."""
        return "BM25"


@register("tfidf")
@dataclass(frozen=True)
class TfIdf(Method):
    """Cosine of TF-IDF vectors of the two texts (scikit-learn's defaults, fitted on the training texts).

    Words of one character are left out, as scikit-learn does; `all_words` takes them in.
    """

    needs: ClassVar[tuple[Need, ...]] = ("text",)
    control: ClassVar[bool] = True
    text: Text = "both"
    all_words: bool = False

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) cosines; 0 where no word is shared."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(**({"token_pattern": EVERY} if self.all_words else {}))
        try:
            train = vectorizer.fit_transform(_texts(problem.rows.examples, self.text))  # (n, words)
        except ValueError:  # no text has a word in it
            return np.zeros((problem.m, problem.n))
        query = vectorizer.transform(_texts(problem.queries, self.text))  # (m, words)
        return np.asarray((query @ train.T).todense(), dtype=np.float64)

    @property
    def unit(self) -> str:
        """A cosine."""
        return "cosine"

    @property
    def normalisation(self) -> str:
        """Always a cosine."""
        return "cosine"


@register("opening")
@dataclass(frozen=True)
class Opening(Method):
    """How many words the two responses begin with alike, at most `words`: does the answer's first phrase give its class away?

    Words are runs of letters and digits, without case.
    """

    needs: ClassVar[tuple[Need, ...]] = ("text",)
    control: ClassVar[bool] = True
    words: Annotated[int, Field(ge=1)] = 5

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) words, from 0 to `words`."""
        known: dict[str, int] = {}
        query, train = (self._openings(examples, known) for examples in (problem.queries, problem.rows.examples))
        score = np.zeros((problem.m, problem.n))
        alike = np.ones((problem.m, problem.n), dtype=bool)
        for first, second in zip(query.T[:, :, None], train.T[:, None, :], strict=False):  # as far as both go
            alike &= (first == second) & (first > 0)
            score += alike
        return score

    def _openings(self, examples: Sequence[Example], known: dict[str, int]) -> NDArray[np.int64]:
        """(examples, words) the first words of each response by number, 0 where it has fewer; `known` gets new ones."""
        found = [re.findall(r"\w+", example.response.lower())[: self.words] for example in examples]
        numbers = np.zeros((len(found), max(map(len, found))), dtype=np.int64)
        for row, words in zip(numbers, found, strict=True):
            row[: len(words)] = [known.setdefault(word, len(known) + 1) for word in words]
        return numbers

    @property
    def unit(self) -> str:
        """Words."""
        return "words"
