"""The gradient family: curvature x normalisation x scope, computed in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from finetrace.attribution.memory import held
from finetrace.attribution.method import RESPONSE_LOSS, Method, Need, Normalise
from finetrace.attribution.problem import Problem
from finetrace.attribution.selection import views
from finetrace.curvature import InverseCurvature, Products
from finetrace.errors import FinetraceError
from finetrace.units import size

INFLUENCE = f"decrease of the query's {RESPONSE_LOSS} (nats) per unit of up-weighting"
BY_STEP = f"decrease of the query's {RESPONSE_LOSS} (nats) per unit step down the example's gradient"
Scope = Literal["block", "joint"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Of the empirical Fisher's trace. A rank-n Fisher has eigenvalues of the order of trace / n, so this damps the directions
# that a training set of a hundred rows or more barely determines; the papers' 0.1 / d of the trace damps next to none.
DEFAULT_DAMPING = 0.01
PARTS = ("products", "train_self", "query_self")  # of an InverseCurvature, in the order normalisations need them

G = TypeVar("G", bound="GradientMethod")


class GradientMethod(Method):
    """S = sum_b V_b P_b G_b^T for an inverse curvature P_b, then normalised.

    `none`: S. `cosine`: S_qi / (||v_q||_P ||g_i||_P), in [-1, 1], with ||x||_P^2 = sum_b x_b^T P_b x_b.
    `relatif`: S_qi / ||g_i||_P (Barshan et al., 2003.11630): the square root of the self-influence.

    `loss_on`: the tokens whose loss is differentiated, for training examples and queries alike (`Positions`); empty for
    those the index was built with. `layers`: `all`, `last-half`, `last-fifth`, a number or `FIRST-LAST`. `at`: gradients of
    the `end` or `start` of training, or empty, where the index took them (`finetrace.moments`). Several of each, joined by
    `+` and taken in turn, give the mean of their cosines: `loss_on=response+probe,layers=all+last-half,at=start+end` looks
    at the response's loss in all layers at the start and at the probe's in the last half at the end.
    """

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    normalise: Normalise
    loss_on: str = ""
    layers: str = "all"
    at: str = ""

    def __post_init__(self) -> None:
        if len(views(self.loss_on, self.layers, self.at)) > 1 and self.normalise != "cosine":
            raise FinetraceError(
                f"{self.label}: scores of several losses, layers or moments are of different scales; add normalise=cosine."
            )

    def prepared(self, problem: Problem) -> Problem:
        """The problem with the loss on `loss_on` and the gradients of `layers`, `at` a moment; several are made ready.

        Those at the start come first, so that a model that has none is refused before anything is collected.
        """
        several = self._several()
        for each in sorted(several, key=lambda each: each.at != "start"):
            each.prepared(problem)
        return problem if several else self._viewed(problem)

    def _viewed(self, problem: Problem) -> Problem:
        """The problem as one loss, one choice of layers and one moment see it."""
        return problem.on(self.loss_on, self.layers, at=self.at)

    def _several(self: G) -> tuple[G, ...]:
        """The methods whose scores are averaged; none where one loss, one choice of layers and one moment are looked at."""
        found = views(self.loss_on, self.layers, self.at)
        return tuple(type(self)(**{**self.parameters, **each._asdict()}) for each in found) if len(found) > 1 else ()

    def warm(self, problem: Problem) -> None:
        """Collect the queries' gradients of every loss and moment that is looked at."""
        for each in self._several() or (self,):
            _ = (each.prepared(problem) if each is not self else problem).features

    def used(self, problem: Problem) -> dict[str, Any]:
        """The parameters, with the tokens of the loss by their full names."""
        if not (several := self._several()):
            return super().used(problem)
        used = [each.used(each.prepared(problem)) for each in several]
        joined = {"layers": self.layers, "loss_on": "+".join(each["loss_on"] for each in used)}
        return {**used[0], **joined, "at": self.at if "+" in self.at else used[0]["at"]}

    @abstractmethod
    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """The inverse curvature of every block, one at a time."""

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) S, normalised; of several losses, layers or moments, the mean of their cosines."""
        if several := self._several():
            return np.mean([each.matrix(each.prepared(problem)) for each in several], axis=0)
        if self.held_bytes(problem) > problem.memory:
            raise FinetraceError(
                f"{self.label}: this method holds {size(self.held_bytes(problem))} in memory, more than the "
                f"{size(problem.memory)} allowed; give it more (--memory), or take exact, which needs less."
            )
        problem.keeping.reserve(self.held_bytes(problem))
        return self._matrix(problem)

    def _matrix(self, problem: Problem) -> NDArray[np.float64]:
        wanted = {"none": PARTS[:1], "relatif": PARTS[:2], "cosine": PARTS}[self.normalise]
        sums = self._sums(problem, wanted)
        values = sums["products"]
        if self.normalise != "none":
            values = divide(values, sums["train_self"].clamp_min(0).sqrt()[None, :])
        if self.normalise == "cosine":
            values = divide(values, sums["query_self"].clamp_min(0).sqrt()[:, None]).clamp(-1, 1)
        return values.numpy().copy()

    def train_self(self, problem: Problem) -> Tensor:
        """(n,) self-influence g_i^T P g_i of every training example, summed over blocks."""
        problem.keeping.reserve(self.held_bytes(problem))
        return self._sums(problem, PARTS[1:2])["train_self"]

    def _sums(self, problem: Problem, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Sums over blocks of an inverse's `products`, `train_self`, `query_self`; other normalisations find them kept."""
        kept = problem.sums.setdefault(self.curvature_key, {})
        missing = [name for name in wanted if name not in kept]
        if missing:
            if "train_self" in missing:  # of the index alone, so it may be there already
                kept |= self.fetch_own(problem, lambda: self._totals(problem, missing))
                missing = [name for name in missing if name not in kept]
            kept |= self._totals(problem, missing) if missing else {}
        return kept

    def _totals(self, problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
        """Those sums, computed."""
        shapes = {"products": (problem.m, problem.n), "train_self": (problem.n,), "query_self": (problem.m,)}
        totals = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
        for part in self.parts(problem):
            for name in names:
                totals[name] += getattr(part, name)()
        return totals

    def fetch_own(self, problem: Problem, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` makes, `train_self` among it; not kept, since another package may change the formula of its method."""
        return make()

    @property
    def curvature_key(self) -> str:
        """Of the parameters that decide P."""
        return f"{self.name} { ({key: value for key, value in self.parameters.items() if key != 'normalise'}) }"

    @property
    def computed_as(self) -> str:
        """Normalisations share a curvature."""
        return self.curvature_key

    @property
    def joined(self) -> bool:
        """Whether the curvature is one over all blocks."""
        return False

    def held_bytes(self, problem: Problem) -> int:
        """What computing in memory takes, about."""
        return held(problem, gram=False)

    @property
    def unit(self) -> str:
        """By normalisation."""
        if self.normalise == "cosine":
            return "cosine"
        return self._unit + (" / square root of self-influence" if self.normalise == "relatif" else "")

    @property
    def _unit(self) -> str:
        """Of S itself."""
        return INFLUENCE


class SpannedMethod(GradientMethod):
    """A curvature that is known from the inner products of gradients alone."""

    @abstractmethod
    def inverse(self, products: Products, entries: int) -> InverseCurvature:
        """P of one block whose gradient has so many entries, before any projection."""

    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """The inverse curvature of every block, one at a time."""
        for block, products in problem.products():
            yield self.inverse(products, block.entries)


class ScopedMethod(SpannedMethod):
    """An influence whose curvature is taken block by block or over all blocks at once."""

    scope: Scope

    @property
    def joined(self) -> bool:
        """By scope."""
        return self.scope == "joint"

    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """One part a block, or a single one."""
        if self.scope == "block":
            yield from super().parts(problem)
        elif float((joint := problem.joint).train_sq.max()) > 0:
            yield self.inverse(joint, sum(block.entries for block in problem.blocks))


def divide(values: Tensor, norms: Tensor) -> Tensor:
    """values / norms. A zero gradient has no direction: its scores are 0."""
    return torch.where(norms > 0, values / norms, torch.zeros_like(values))
