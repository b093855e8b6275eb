"""Controls that know nothing of the query."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from finetrace.attribution.method import Method, Need, make, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.selection import check


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Uniform random scores in (0, 1), fixed by seed, query id and example id, whatever the order of rows."""

    control: ClassVar[bool] = True
    seed: int = 0

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) uniform numbers."""
        query = _hashes([example.id for example in problem.queries], f"query {self.seed}")
        train = _hashes([example.id for example in problem.rows.examples], f"train {self.seed}")
        with np.errstate(over="ignore"):  # splitmix64's finaliser, modulo 2^64
            mixed = query[:, None] ^ train[None, :]
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
        return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53

    @property
    def unit(self) -> str:
        """None."""
        return "none"


def _hashes(names: Sequence[str], salt: str) -> NDArray[np.uint64]:
    digests = [hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


@register("length")
@dataclass(frozen=True)
class Length(Method):
    """Number of tokens in the example's loss: are longer answers simply blamed more?"""

    needs: ClassVar[tuple[Need, ...]] = ("text",)
    control: ClassVar[bool] = True
    query_free: ClassVar[bool] = True

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n), the same for every query."""
        tokens = np.array([item.loss_tokens for item in problem.rows.encoded], dtype=np.float64)
        return np.tile(tokens, (problem.m, 1))

    @property
    def unit(self) -> str:
        """Tokens."""
        return "tokens"


@register("gradnorm")
@dataclass(frozen=True)
class GradNorm(Method):
    """Norm of the example's gradient: are badly fitted examples simply blamed more?"""

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    control: ClassVar[bool] = True
    query_free: ClassVar[bool] = True
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    def __post_init__(self) -> None:
        check(self.label, self.loss_on, self.layers, self.at)

    def prepared(self, problem: Problem) -> Problem:
        """The problem with the loss on `loss_on` and the gradients of `layers`, `at` a moment."""
        return problem.on(self.loss_on, self.layers, at=self.at)

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n), the same for every query."""
        return np.tile(problem.train_norms.numpy(), (problem.m, 1))

    @property
    def unit(self) -> str:
        """Nats per unit of parameter change."""
        return "nats per unit of parameter change"


def seeded(method: Method, seed: int) -> Method:
    """The method for one of several seeds: random scores are other ones in each, unless a seed other than 0 was chosen."""
    return make(f"random:seed={seed}") if method.label == "random" else method
