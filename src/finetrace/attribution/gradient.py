"""The gradient family: curvature x normalisation x scope."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from finetrace.attribution.memory import held, plan, widest
from finetrace.attribution.method import Method, Need, Normalise, register
from finetrace.attribution.problem import Problem
from finetrace.attribution.selection import views
from finetrace.attribution.streaming import MethodRun, Pass, Run, run_of, whole
from finetrace.collection import Block
from finetrace.curvature import (
    Damping,
    DampingRule,
    DataInf,
    Identity,
    InverseCurvature,
    LiSSA,
    Products,
    ReleasedLiSSA,
)
from finetrace.curvature.datainf import DataInfStream, DenseDataInfStream
from finetrace.curvature.identity import IdentityStream
from finetrace.curvature.solvers import packed
from finetrace.curvature.streamed import Streamed
from finetrace.errors import FinetraceError
from finetrace.moments import At
from finetrace.units import size

INFLUENCE = "decrease of the query's mean response loss (nats) per unit of up-weighting"
Scope = Literal["block", "joint"]
Positive = Annotated[float, Field(gt=0)]

# Of the empirical Fisher's trace. A rank-n Fisher has eigenvalues of the order of trace / n, so this damps the directions
# that a training set of a hundred rows or more barely determines; the papers' 0.1 / d of the trace damps next to none.
DEFAULT_DAMPING = 0.01
PARTS = ("products", "train_self", "query_self")  # of an InverseCurvature, in the order normalisations need them


class GradientMethod(Method):
    """S = sum_b V_b P_b G_b^T for an inverse curvature P_b, then normalised.

    `none`: S. `cosine`: S_qi / (||v_q||_P ||g_i||_P), in [-1, 1], with ||x||_P^2 = sum_b x_b^T P_b x_b.
    `relatif`: S_qi / ||g_i||_P (Barshan et al., 2003.11630): the square root of the self-influence.

    `loss_on`: the tokens whose loss is differentiated, for training examples and queries alike (`Positions`); empty for
    those the index was built with. `layers`: `all`, `last-half`, `last-fifth`, a number or `FIRST-LAST`. Several of either,
    joined by `+`, give the mean of their cosines: `loss_on=response+probe,layers=all+last-half` looks at the response's
    loss in all layers and at the probe's in the last half. `at`: gradients of the `end` or `start` of training, or
    empty, where the index took them (`finetrace.moments`).
    """

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    normalise: Normalise
    loss_on: str
    layers: str
    at: At

    def __post_init__(self) -> None:
        pairs = views(self.loss_on, self.layers)
        if len(pairs) > 1 and self.normalise != "cosine":
            raise FinetraceError(
                f"{self.label}: scores of several losses or layers are of different scales; add normalise=cosine."
            )

    def prepared(self, problem: Problem) -> Problem:
        """The problem with the loss on `loss_on` and the gradients of `layers`, `at` a moment; several are made ready."""
        several = self._several()
        for each in several:
            each.prepared(problem)
        return problem if several else self._viewed(problem)

    def _viewed(self, problem: Problem) -> Problem:
        """The problem as one loss and one choice of layers see it."""
        return problem.on(self.loss_on, self.layers, at=self.at)

    def _several(self) -> tuple[GradientMethod, ...]:
        """The methods whose scores are averaged; none where one loss and one choice of layers are looked at."""
        pairs = views(self.loss_on, self.layers)
        return (
            tuple(type(self)(**{**self.parameters, "loss_on": a, "layers": b}) for a, b in pairs)
            if len(pairs) > 1
            else ()
        )

    def warm(self, problem: Problem) -> None:
        """Collect the queries' gradients of every loss that is looked at."""
        for each in self._several() or (self,):
            _ = (each.prepared(problem) if each is not self else problem).features

    def used(self, problem: Problem) -> dict[str, Any]:
        """The parameters, with the tokens of the loss by their full names."""
        if not (several := self._several()):
            return super().used(problem)
        used = [each.used(each.prepared(problem)) for each in several]
        return {**used[0], "layers": self.layers, "loss_on": "+".join(each["loss_on"] for each in used)}

    @abstractmethod
    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """The inverse curvature of every block, one at a time."""

    def run(self, problem: Problem) -> Run | None:
        """How S is computed by streaming; `None` where what it takes fits the problem's memory, and `matrix` goes on there."""
        several = self._several()
        return run_of([(each, each.prepared(problem)) for each in several] if several else [(self, problem)])

    def matrix(self, problem: Problem) -> NDArray[np.float64]:
        """(m, n) S, normalised; of several losses or layers, the mean of their cosines."""
        run = self.run(problem)
        if run is not None:
            values = whole(run, problem.m, problem.n).numpy()
            problem.computed[self.computed_as] = run.describe()
            return values
        several = self._several()
        if several:
            return np.mean([each.matrix(each.prepared(problem)) for each in several], axis=0)
        if not self.streams and self.held_bytes(problem) > problem.memory:
            raise FinetraceError(
                f"{self.label}: this method holds {size(self.held_bytes(problem))} in memory, more than the "
                f"{size(problem.memory)} allowed; give more with --memory, or take exact, which needs less."
            )
        return self._matrix(problem)

    def _matrix(self, problem: Problem) -> NDArray[np.float64]:
        wanted = {"none": PARTS[:1], "relatif": PARTS[:2], "cosine": PARTS}[self.normalise]
        sums = self._sums(problem, wanted)
        values = sums["products"]
        if self.normalise != "none":
            values = _divide(values, sums["train_self"].clamp_min(0).sqrt()[None, :])
        if self.normalise == "cosine":
            values = _divide(values, sums["query_self"].clamp_min(0).sqrt()[:, None]).clamp(-1, 1)
        return values.numpy().copy()

    def train_self(self, problem: Problem) -> Tensor:
        """(n,) self-influence g_i^T P g_i of every training example, summed over blocks."""
        made = plan(self, problem)
        if made is not None:
            return MethodRun(self, problem, made).own()
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
        """`train_self` from the index's cache, or all that `make` makes, of which it is kept."""
        more: dict[str, Tensor] = {}
        if not self.streams:  # a method of another package, whose formula may change
            return make()

        def own() -> dict[str, Tensor]:
            more.update(make())
            return {"train_self": more["train_self"]}

        return (
            problem.fetch_all("own", problem.blocks, own, curvature=self.curvature_key, **self.depends(problem)) | more
        )

    def depends(self, problem: Problem) -> dict[str, Any]:
        """What P depends on besides parameters and gradients."""
        return {}

    @property
    def curvature_key(self) -> str:
        """Of the parameters that decide P."""
        return f"{self.name} { ({key: value for key, value in self.parameters.items() if key != 'normalise'}) }"

    @property
    def computed_as(self) -> str:
        """Normalisations share a curvature."""
        return self.curvature_key

    # What a method that streams says of itself; `attribution.streaming` does the rest.
    streams: ClassVar[bool] = False
    query_bytes: ClassVar[int] = 48  # an entry of a query: itself, preconditioned, and what is held on the way
    by_block: bool = False  # a cosine of each block
    plain: bool = False  # queries go through as they are

    @property
    def joined(self) -> bool:
        """Whether the curvature is one over all blocks."""
        return False

    @property
    def must_stream(self) -> bool:
        """Whether the parameters ask for what only streaming does."""
        return False

    def held_bytes(self, problem: Problem) -> int:
        """What computing in memory takes, about."""
        return held(problem, gram=False)

    def groups(self, at: Pass) -> list[Sequence[Block]]:
        """Blocks whose curvatures are held together."""
        return [at.rows.blocks]

    def operator(self, at: Pass) -> Streamed:
        """P of a group of blocks."""
        raise NotImplementedError

    @property
    def unit(self) -> str:
        """By normalisation."""
        if self.normalise == "cosine":
            return "cosine"
        return self._unit + (" / square root of self-influence" if self.normalise == "relatif" else "")

    _unit: ClassVar[str] = INFLUENCE


class _Spanned(GradientMethod):
    """A curvature that is known from the inner products of gradients alone."""

    @abstractmethod
    def inverse(self, products: Products, width: int) -> InverseCurvature:
        """P of one block of `width` entries."""

    def parts(self, problem: Problem) -> Iterator[InverseCurvature]:
        """The inverse curvature of every block, one at a time."""
        for block, products in problem.products():
            yield self.inverse(products, block.size)


class _Scoped(_Spanned):
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
        elif float(problem.joint.train_sq.max()) > 0:
            yield self.inverse(problem.joint, sum(block.size for block in problem.blocks))


def _divide(values: Tensor, norms: Tensor) -> Tensor:
    """A zero gradient has no direction: its scores are 0."""
    return torch.where(norms > 0, values / norms, torch.zeros_like(values))


@register("gradsim")
@dataclass(frozen=True)
class GradSim(_Spanned):
    """Inner product of the two loss gradients, sum_b v_b . g_b (TracIn at one checkpoint; "Hessian-free").

    Unit: decrease of the query's loss per unit of a gradient step on the example, to first order.
    """

    normalise: Normalise = "none"
    loss_on: str = ""
    layers: str = "all"
    at: At = ""
    _unit: ClassVar[str] = "decrease of the query's mean response loss (nats) per unit step down the example's gradient"

    def inverse(self, products: Products, width: int) -> InverseCurvature:
        """P = I."""
        return Identity(products)

    def _totals(self, problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
        """Products alone need no norms, so that blocks need not be told apart."""
        return {"products": problem.inner()} if list(names) == ["products"] else super()._totals(problem, names)

    streams: ClassVar[bool] = True
    query_bytes: ClassVar[int] = 32

    @property
    def plain(self) -> bool:  # type: ignore[override]
        """Unless norms are wanted."""
        return self.normalise == "none"

    def operator(self, at: Pass) -> Streamed:
        """P = I; norms are looked at where they are wanted."""
        return IdentityStream(at.rows, at.sizes if at.normalised else None)


@register("gradcos")
@dataclass(frozen=True)
class GradCos(_Spanned):
    """Cosine of the two loss gradients: v . g / (||v|| ||g||), over all blocks or averaged over each block's own.

    scope `joint`: one cosine of the whole gradients. scope `block`: (1/B) sum_b v_b . g_b / (||v_b|| ||g_b||).
    """

    scope: Scope = "joint"
    loss_on: str = ""
    layers: str = "all"
    at: At = ""
    normalise: ClassVar[Normalise] = "cosine"  # type: ignore[misc]

    def inverse(self, products: Products, width: int) -> InverseCurvature:
        """P = I."""
        return Identity(products)

    def _matrix(self, problem: Problem) -> NDArray[np.float64]:
        if self.scope == "joint":
            return super()._matrix(problem)
        total, blocks = torch.zeros(problem.m, problem.n, dtype=torch.float64), 0
        for _, products in problem.products():
            norms = products.query_sq.sqrt()[:, None] * products.train_sq.sqrt()[None, :]
            total += _divide(products.cross, norms)
            blocks += 1
        return (total / max(1, blocks)).clamp(-1, 1).numpy()

    streams: ClassVar[bool] = True
    query_bytes: ClassVar[int] = 32

    def operator(self, at: Pass) -> Streamed:
        """P = I; norms are looked at where they are wanted."""
        return IdentityStream(at.rows, at.sizes if at.normalised else None)

    @property
    def by_block(self) -> bool:  # type: ignore[override]
        """By scope."""
        return self.scope == "block"

    @property
    def normalisation(self) -> str:
        """Always a cosine."""
        return "cosine"


@register("datainf")
@dataclass(frozen=True)
class DataInfMethod(_Spanned):
    """DataInf: sum_b [C_b - (C_b D_b) K_b / n] / lambda_b, the mean of inverses for the inverse of the mean.

    D_b = diag(1 / (lambda_b + K_b,ii)), K_b = G_b G_b^T, C_b = V_b G_b^T (Kwon et al., arXiv 2310.00902).
    """

    normalise: Normalise = "none"
    damping: Positive = DEFAULT_DAMPING
    damping_rule: DampingRule = "trace"
    loss_on: str = ""
    layers: str = "all"
    at: At = ""

    def inverse(self, products: Products, width: int) -> InverseCurvature:
        """DataInf's P."""
        return DataInf(products, Damping(self.damping, self.damping_rule).of(products, width))

    streams: ClassVar[bool] = True
    query_bytes: ClassVar[int] = 64

    def held_bytes(self, problem: Problem) -> int:
        """With Gram matrices where a block has more entries than there are rows, or norms are wanted."""
        return held(problem, gram=self.normalise != "none" or widest(problem) >= problem.n)

    def groups(self, at: Pass) -> list[Sequence[Block]]:
        """All, or as many as have their d x d matrices in memory, where the rows' own influence is wanted."""
        fit = packed(at.widths, at.spare) if at.normalised else None
        return [at.rows.blocks] if fit is None else [[at.rows.blocks[k] for k in group] for group in fit]

    def operator(self, at: Pass) -> Streamed:
        """One pass for the queries, or d x d matrices that take none."""
        damping = Damping(self.damping, self.damping_rule).of_traces(at.sizes.traces, at.rows.segments)
        if at.normalised and packed(at.widths, at.spare) is not None:
            return DenseDataInfStream(at.rows, damping)
        return DataInfStream(at.rows, damping)


@register("lissa")
@dataclass(frozen=True)
class LiSSAMethod(_Scoped):
    """LiSSA: r_0 = v, r_t = v + r_(t-1) - (H + lambda I) r_(t-1) / sigma; the score is r_T . g / sigma.

    H = G^T G / n and sigma is the largest eigenvalue of H + lambda I, so more iterations come nearer to `exact`.
    recurrence `released` is that of the study's released code, r_t = v + r_(t-1) - (H - lambda I) r_(t-1) / 1000, scored
    as r_T . g, which is close to (iterations + 1) times `gradsim`.
    """

    normalise: Normalise = "none"
    iterations: Annotated[int, Field(ge=0)] = 10
    scope: Scope = "block"
    damping: Positive = DEFAULT_DAMPING
    damping_rule: DampingRule = "trace"
    recurrence: Literal["neumann", "released"] = "neumann"
    loss_on: str = ""
    layers: str = "all"
    at: At = ""

    def inverse(self, products: Products, width: int) -> InverseCurvature:
        """T terms of the Neumann series."""
        damping = Damping(self.damping, self.damping_rule).of(products, width)
        kind = LiSSA if self.recurrence == "neumann" else ReleasedLiSSA
        return kind(products, damping, self.iterations)

    def held_bytes(self, problem: Problem) -> int:
        """With Gram matrices, on which it iterates."""
        return held(problem, gram=True)
