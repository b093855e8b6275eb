"""The base of every method, and the registry that makes one appear everywhere."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from finetrace.attribution.problem import Problem
from finetrace.attribution.scores import Scores
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index.store import Index
from finetrace.positions import Positions

RESPONSE_LOSS = "mean response loss"
Need = Literal["gradients", "factors", "representations", "text"]
Normalise = Literal["none", "cosine", "relatif"]


class Method(ABC):
    """A method is a frozen dataclass: its fields are its parameters, `matrix` is its formula.

    Attributes:
        name: Set by `register`.
        needs: What it reads of the index and the queries.
        control: Whether it is a control that an attribution has to beat.
        query_free: Whether it orders the rows the same way whatever is asked.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()
    control: ClassVar[bool] = False
    query_free: ClassVar[bool] = False

    @property
    @abstractmethod
    def unit(self) -> str:
        """What a score of 1 means."""

    @abstractmethod
    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) scores, positive = proponent."""

    def score(self, index: Index | Problem, queries: Sequence[Example] = ()) -> Scores:
        """Score `queries` against the index; methods that share a `Problem` share its products."""
        problem = self.prepared(index if isinstance(index, Problem) else Problem(index, queries))
        self.warm(problem)  # collecting the queries is not the method's time
        started = time.perf_counter()
        values = self.checked_matrix(problem)
        seconds = time.perf_counter() - started
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise FinetraceError(
                f"{self.label}: the scores of query {problem.queries[row].id} are not finite; use more damping."
            )
        unit, used, computed = self.about(problem)
        return Scores(values, problem.queries, problem.rows.examples, self.label, unit, used, seconds, computed)

    def checked_matrix(self, problem: Problem) -> NDArray[np.float64]:
        """`matrix`, and in words what cannot be factored."""
        with self.factoring():
            return self.matrix(problem)

    @contextmanager
    def factoring(self) -> Iterator[None]:
        """Says in words what cannot be factored."""
        try:
            yield
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise FinetraceError(
                f"{self.label}: the damped curvature cannot be factored in the precision of the gradients; use more damping."
            ) from error

    def about(self, problem: Problem) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Unit, parameters and how it was computed, of scores on what `prepared` returned."""
        used = self.used(problem)
        unit = self.unit
        if "loss_on" in used:
            unit = unit.replace(RESPONSE_LOSS, _loss_words(str(used["loss_on"])))
        if used.get("at") == "start" and unit.startswith("decrease"):  # no minimum, so no derivative of one
            unit += ", by a step before training"
        return unit, used, problem.computed.get(self.computed_as, {})

    @property
    def computed_as(self) -> str:
        """Under which name a problem keeps how the method was computed."""
        return self.label

    def prepared(self, problem: Problem) -> Problem:
        """The problem as this method looks at it."""
        return problem

    def warm(self, problem: Problem) -> None:
        """Collect what is read of the queries."""
        if "gradients" in self.needs or "representations" in self.needs:
            _ = problem.features

    def used(self, problem: Problem) -> dict[str, Any]:
        """Every parameter as it was used on what `prepared` returned: tokens of the loss and moment by their full names."""
        named = {"loss_on": problem.index.manifest.encoding.loss_on, "at": problem.index.manifest.model.at}
        return {name: named.get(name, value) for name, value in self.parameters.items()}

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter and its value."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The name, and the parameters that differ from the defaults: what `make` reads back."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        changed = [f"{key}={written(value)}" for key, value in values.items()]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @property
    def plain_label(self) -> str:
        """The label without the normalisation, which results name in a field of its own."""
        name, _, settings = self.label.partition(":")
        kept = [each for each in _settings(settings) if not each.startswith("normalise=")]
        return f"{name}:{','.join(kept)}" if kept else name

    @property
    def title(self) -> str:
        """The label as a table shows it: `exact joint cosine`."""
        name, _, settings = self.label.partition(":")
        words = []
        for setting in _settings(settings):
            key, _, value = setting.partition("=")
            if key == "loss_on" and value.startswith("all"):  # not to be taken for all layers
                value = value.replace("all", "all-tokens", 1)
            words.append(
                key
                if value == "true"
                else value
                if key in ("scope", "normalise", "text", "pooling", "loss_on", "layers", "at")
                else f"{key}={value}"
            )
        return " ".join([name, *words])

    @property
    def normalisation(self) -> str:
        """`none`, `cosine` or `relatif`, as results name it."""
        return str(self.parameters.get("normalise", "none"))

    @classmethod
    def summary(cls) -> str:
        """First sentence of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _loss_words(loss_on: str) -> str:
    """The loss on these tokens, in a unit's words."""
    kinds = {Positions.parse(each).kind for each in Positions.split(loss_on)}
    return RESPONSE_LOSS if kinds == {"response"} else f"mean loss (on {loss_on})"


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: `make`, the command line and the Python facade know the method under `name`."""

    def add(cls: M) -> M:
        if name in _METHODS:
            raise FinetraceError(f"a method named {name!r} is registered already; choose another name.")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def available() -> dict[str, type[Method]]:
    """All registered methods by name, those of other packages (entry points `finetrace.methods`) included."""
    for entry in entry_points(group="finetrace.methods"):
        if entry.name in _METHODS:
            continue
        try:
            entry.load()
        except Exception as error:  # somebody else's code
            raise FinetraceError(
                f"the method {entry.name!r} of the package {entry.value!r} cannot be loaded ({error}); mend or remove it."
            ) from error
    return dict(_METHODS)


def make(spec: str, **overrides: Any) -> Method:
    """A method from `name` or `name:parameter=value,...`; `overrides` apply where the method has such a parameter."""
    name, _, settings = spec.partition(":")
    methods = available()
    if name not in methods:
        raise FinetraceError(f"{name}: no such method; there are {', '.join(methods)}.")
    fields = {field.name: field for field in dataclasses.fields(methods[name])}  # type: ignore[arg-type]
    values = {key: value for key, value in overrides.items() if key in fields and value is not None}
    for setting in _settings(settings):
        key, equals, value = setting.partition("=")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise FinetraceError(
                f"{spec}: {name} has no parameter {key!r}; it has {known}. Write {name}:parameter=value."
            )
        if not equals:
            raise FinetraceError(f"{spec}: the parameter {key!r} lacks a value; write {name}:{key}=VALUE.")
        if key in values:
            raise FinetraceError(f"{spec}: {key} is given twice, here and as {values[key]!r}; give it once.")
        values[key] = value
    try:
        return _adapter(methods[name]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise FinetraceError(f"{spec}: parameter {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def named(spec: str) -> set[str]:
    """The parameters that a specification sets itself."""
    return {setting.partition("=")[0] for setting in _settings(spec.partition(":")[2])}


@cache
def _adapter(kind: type[Method]) -> TypeAdapter[Method]:
    """Checks a method's parameters; building one takes longer than everything else that a specification asks for."""
    return TypeAdapter(kind)


def written(value: Any) -> str:
    """A parameter's value as a specification has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings(text: str) -> list[str]:
    """`parameter=value` pairs; a comma within a value, as in a probe's text, is not followed by `parameter=`."""
    return [each for each in re.split(r",(?=[a-z_]+=)", text) if each]
