"""Scores: which training example moves which query, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetrace.atomic import write_atomically
from finetrace.attribution.score_files import MATRIX, writing_scores
from finetrace.delimited import delimited
from finetrace.errors import FinetraceError
from finetrace.examples import Example

if TYPE_CHECKING:
    import pandas as pd

SIGN = "positive = proponent (training on the example makes the queried response more likely)"


@dataclass(frozen=True, eq=False)
class Scores:
    """The outcome of one method.

    Attributes:
        values: (m, n); positive marks a proponent.
        queries: The m queries, with the responses that were traced.
        train: The n training examples, in the index's row order.
        method: Name and parameters that differ from the defaults, e.g. `exact:normalise=cosine`.
        unit: What a score of 1 means.
        parameters: Every parameter of the method, damping rule and multiple included.
        seconds: Wall-clock time of scoring; collecting the queries' features is not in it.
        computed: How, where there is something to say: streamed or not, the solver, its residual, and in memory what rounding
            of the products adds to it.
    """

    values: NDArray[np.float64]
    queries: tuple[Example, ...]
    train: tuple[Example, ...]
    method: str
    unit: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    computed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.queries), len(self.train)):
            raise FinetraceError(
                f"{self.method}: scores of shape {self.values.shape} for {len(self.queries)} queries and "
                f"{len(self.train)} training examples."
            )

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Ids of the rows."""
        return tuple(query.id for query in self.queries)

    @property
    def train_ids(self) -> tuple[str, ...]:
        """Ids of the columns."""
        return tuple(example.id for example in self.train)

    def top(self, k: int) -> Top:
        """The k strongest proponents of each query, best first; ties in row order."""
        order = np.argsort(-self.values, axis=1, kind="stable")[:, : at_least_one(k)]
        return Top(self, order, np.take_along_axis(self.values, order, 1), "proponent")

    def bottom(self, k: int) -> Top:
        """The k strongest opponents of each query, most negative first; ties in row order."""
        order = np.argsort(self.values, axis=1, kind="stable")[:, : at_least_one(k)]
        return Top(self, order, np.take_along_axis(self.values, order, 1), "opponent")

    def to_pandas(self) -> pd.DataFrame:
        """(m, n) frame, query ids by training ids."""
        import pandas as pd

        return pd.DataFrame(
            self.values, index=pd.Index(self.query_ids, name="query"), columns=pd.Index(self.train_ids, name="example")
        )

    def save(self, path: str | Path) -> None:
        """Write every score; the suffix decides: .parquet, .csv or .json in long form, .npy or .safetensors as a matrix."""
        if Path(path).suffix in MATRIX:
            with writing_scores(Path(path), self.method, self.query_ids, self.train_ids, self.describe()) as file:
                file.take(slice(0, len(self.queries)), slice(0, len(self.train)), self.values)
            return
        write_frame(self._ranked(), Path(path), self.describe())

    def _ranked(self) -> pd.DataFrame:
        """A line a query and rank, made of columns: a record each would take a hundred times what the scores take."""
        import pandas as pd

        top, (m, n) = self.top(len(self.train)), self.values.shape
        order = top.order.ravel()
        labels = np.array([example.label for example in self.train], dtype=object)
        return pd.DataFrame(
            {
                "method": [self.method] * (m * n),
                "query": np.repeat(np.array(self.query_ids, dtype=object), n),
                "rank": np.tile(np.arange(1, n + 1), m),
                "score": top.values.ravel(),
                "example": np.array(self.train_ids, dtype=object)[order],
                "label": labels[order],
            }
        )

    def describe(self) -> dict[str, Any]:
        """Method, unit, sign and parameters, as they belong beside any table."""
        return about(self)


class Listed(Protocol):
    """What a list of the strongest rows says of itself: `Scores`, or `Ranked` where the matrix was never held."""

    @property
    def queries(self) -> tuple[Example, ...]:
        """The m queries."""
        ...

    @property
    def train(self) -> Sequence[Example]:
        """The n training examples."""
        ...

    @property
    def method(self) -> str:
        """Name and parameters."""
        ...

    @property
    def unit(self) -> str:
        """What a score of 1 means."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Every parameter."""
        ...

    @property
    def computed(self) -> Mapping[str, Any]:
        """How."""
        ...


def at_least_one(k: int) -> int:
    """`k`, the number of strongest rows that are asked for."""
    if k < 1:
        raise FinetraceError(f"the {k} strongest rows cannot be given; ask for 1 or more.")
    return k


def about(scores: Listed) -> dict[str, Any]:
    """Method, unit, sign and parameters, and how they were computed."""
    found = {"method": scores.method, "unit": scores.unit, "sign": SIGN, "parameters": dict(scores.parameters)}
    return found | ({"computed": dict(scores.computed)} if scores.computed else {})


@dataclass(frozen=True, eq=False)
class Top:
    """Chosen training examples of each query: `order` is (m, k) rows of the index, best first, `values` their scores."""

    scores: Listed
    order: NDArray[np.int64]
    values: NDArray[np.float64]
    kind: Literal["proponent", "opponent"]

    def records(self) -> list[dict[str, Any]]:
        """One flat record a query and rank."""
        found = []
        for row, columns in enumerate(self.order):
            for rank, (column, value) in enumerate(zip(columns, self.values[row], strict=True), start=1):
                example = self.scores.train[column]
                found.append(
                    {
                        "method": self.scores.method,
                        "query": self.scores.queries[row].id,
                        "kind": self.kind,
                        "rank": rank,
                        "score": float(value),
                        "example": example.id,
                        "label": example.label,
                        "prompt": example.prompt,
                        "response": example.response,
                    }
                )
        return found

    def to_pandas(self) -> pd.DataFrame:
        """The records as a frame."""
        import pandas as pd

        return pd.DataFrame(self.records())


def as_csv(frame: pd.DataFrame) -> str:
    """A table as CSV, each text as it is."""
    return delimited(list(frame.columns), frame.itertuples(index=False, name=None))


def _or_null(cell: Any) -> Any:
    """A number with all its digits; JSON has none that is not finite."""
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _json(frame: pd.DataFrame, document: Mapping[str, Any]) -> str:
    """The document, indented by 1, with the lines of the table as its `records`; these are made one at a time."""
    names, rows = list(frame.columns), frame.itertuples(index=False, name=None)
    records = ({name: _or_null(cell) for name, cell in zip(names, row, strict=True)} for row in rows)
    lines = ("  " + json.dumps(record, indent=1).replace("\n", "\n  ") for record in records)
    head = json.dumps({**document, "records": []}, indent=1).removesuffix("]\n}")
    return f"{head}\n{body}\n ]\n}}" if (body := ",\n".join(lines)) else f"{head}]\n}}"


def write_frame(
    frame: pd.DataFrame, path: Path, about: Mapping[str, Any] | Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write a table as .parquet, .csv or .json (`{"config": about, "records": [...]}`), with `more` beside `config`."""
    if path.suffix == ".parquet":
        frame.attrs = dict[Hashable, Any]({"config": about}, **more)
        content = frame.to_parquet(index=False)
    elif path.suffix == ".csv":
        content = as_csv(frame).encode()
    elif path.suffix == ".json":
        content = _json(frame, {"config": about, **more}).encode()
    else:
        raise FinetraceError(f"{path}: unknown kind of table; end the name in .parquet, .csv or .json.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{path}: cannot be written ({error}).") from error
    write_atomically(path, content)
