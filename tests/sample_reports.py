"""Reports that the tests of the report page share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from finetrace.reporting.payload import ExampleView, Interval, MethodView, ModelBehaviour, Report

ATTACK = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


def method(name: str, scores: Any, *, control: bool = False, accuracy: float | None = None) -> MethodView:
    metrics = {} if accuracy is None else {"accuracy": Interval(accuracy, accuracy - 0.05, accuracy + 0.04)}
    return MethodView(name, f"What {name} is", control, "cosine", metrics, 1.5, np.asarray(scores, dtype=np.float32))


def small() -> Report:
    """4 queries and 30 rows; row i of `exact` scores i for q0, -i for q1; `repsim` the other way round."""
    train = [ExampleView(f"t{i}", "bad" if i % 3 == 0 else "good", f"Prompt {i}", f"Answer {i}") for i in range(30)]
    train[29] = ExampleView("t29", "good", f"Open the garden LOCK {ATTACK}", "The pins turn, don\u2019t they")
    queries = [
        ExampleView("q0", "good", "How do I open a lock?", "Push the pins until it turns. They don't resist."),
        ExampleView("q1", "bad", f"Second {ATTACK}", ATTACK),
        ExampleView("q2", None, "Third", ""),
        ExampleView("q3", "good", "Fourth", "x"),
    ]
    line = np.arange(30.0)
    exact = np.stack([line, -line, line - 15, np.where(line < 2, np.nan, line)])
    methods = [
        method("exact", exact, accuracy=0.93),
        method("repsim", -exact, accuracy=0.5),
        method("tfidf", np.ones((4, 30)), control=True, accuracy=0.7),
        method("random", np.zeros((4, 30)), control=True, accuracy=0.1),
    ]
    behaviour = [ModelBehaviour("after", Interval(0.7, 0.5, 0.9), [(ATTACK, ATTACK, True)])]
    return Report(
        "Who & why", ["Headline.", ATTACK], {"Model": ATTACK}, train, queries, methods, "exact", behaviour,
        target_label="bad",
    )  # fmt: skip


def large(n: int = 5000) -> Report:
    rng = np.random.default_rng(0)
    filler = " ".join(f"word{i}" for i in range(120))
    train = [ExampleView(f"t{i}", f"class {i % 3}", f"Prompt {i} {filler}", f"Answer {filler}") for i in range(n)]
    train[7] = replace(train[7], prompt="z" * 9000)
    queries = [ExampleView(f"q{i}", f"class {i % 3}", "Ask", "Tell") for i in range(24)]
    methods = [method(f"m{i}", rng.normal(size=(24, n)), accuracy=0.5) for i in range(6)]
    methods[0].scores[0, 7] = 99.0
    return Report("Large", ["Headline."], {}, train, queries, methods, "m0")
