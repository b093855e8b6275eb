"""Training examples and queries side by side, with every product that methods share computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetrace.attribution.keeping import Keeping
from finetrace.attribution.kept_queries import refuse_other_queries
from finetrace.attribution.selection import select
from finetrace.attribution.stored_rows import StoredRows, adjacent
from finetrace.collection import Block, Features, Representation
from finetrace.collection.factors import Labels
from finetrace.curvature import KroneckerBasis, Products
from finetrace.curvature.passes import Sizes
from finetrace.curvature.passes import sizes as sizes_of
from finetrace.curvature.products import Gradients, Kept, Made, inner_products, row_squares, summed
from finetrace.encoding import LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.host_memory import available_memory
from finetrace.index.cache import Cache
from finetrace.index.rows import Rows
from finetrace.index.store import Index
from finetrace.index.views import kronecker_factors, view
from finetrace.moments import each_moment
from finetrace.positions import Positions

UNKNOWN = 8 << 30  # bytes of memory taken to be available where the system does not say


class Problem:
    """n indexed training examples against m queries.

    Methods of the text need no model; the queries' gradients and representations are collected, with the model, when
    a method first asks for them. Inner products are kept while they fit (`attribution.keeping`), so methods after the first
    one cost little.
    """

    def __init__(
        self,
        index: Index,
        queries: Sequence[Example],
        features: Features | None = None,
        *,
        kept_queries: Index | None = None,
        memory: int | None = None,
        step: int | None = None,
        cache: int = 0,
    ) -> None:
        """The queries, each with a response; features that were collected before need no model.

        `kept_queries` is an index of the same queries in the same order, from which their features are read. `memory` is
        what scoring may use, in bytes (half of what is available if not given); methods whose matrices do not fit read
        the rows in blocks instead (`attribution.streaming`). `step` makes them do so, that many rows at a time.
        `cache` is how many bytes of what depends on the index alone may be kept beside it (`index.cache`).
        """
        if not queries:
            raise FinetraceError("there is no query to trace; give at least one with a response.")
        for query in queries:
            if not query.has_response:
                raise FinetraceError(
                    f"query {query.id}: it has no response to trace; give one, or let the model answer, as "
                    "`finetrace trace` does."
                )
        if kept_queries is not None:
            refuse_other_queries(kept_queries, index, queries)
        self.index = index
        self.queries = tuple(queries)
        self.lengths = LengthReport(None, False)
        self.blocks: tuple[Block, ...] = index.blocks
        self._features = features
        self._kept_queries = kept_queries
        self._whole: Problem | None = None  # of which this one has some layers
        self._larger: tuple[Problem, slice] | None = None  # of which this one has some queries
        self._parts: dict[str, Problem] = {}
        self._bases: dict[str, dict[str, KroneckerBasis]] = {}
        if memory is None:
            found = available_memory()
            memory = (UNKNOWN if found is None else found) // 2
        self.memory = memory
        self.keeping = Keeping(self.memory)
        self.step = step
        self.cache = Cache(index.folder, index.manifest, cache) if cache else None
        self.computed: dict[str, dict[str, Any]] = {}  # how, by method or curvature, where there is something to say
        self._sizes: dict[tuple[Block, ...], Sizes] = {}
        self.sums: dict[str, dict[str, Tensor]] = {}  # what methods keep for their other normalisations

    def on(self, loss_on: str, layers: str = "all", kronecker: Labels | None = None, at: str = "") -> Problem:
        """The same problem with the loss on other tokens, at another moment (empty: the index's own), on some layers alone.

        Features of other tokens or moments are collected now unless the index holds them already, `kronecker` factors with
        them.
        """
        if loss_on or at:
            return self._viewed(loss_on, kronecker, at).on("", layers)
        if layers == "all":
            return self
        if layers not in self._parts:
            part = copy(self)  # shares the products of single blocks
            part.blocks = select(self.index.blocks, layers, self.index.manifest.model.layers)
            part._whole, part._parts, part.sums, part.computed = self, {}, {}, {}
            part.__dict__.pop("train_norms", None)
            self._parts[layers] = part
        return self._parts[layers]

    def _viewed(self, loss_on: str, kronecker: Labels | None, at: str) -> Problem:
        own = self.index.manifest
        loss = Positions.parse(loss_on or own.encoding.loss_on).text
        (asked,) = each_moment(at)
        moment = asked or own.model.at
        if (loss, moment) == (own.encoding.loss_on, own.model.at):
            return self
        name = f"{loss} at {moment}"
        if name not in self._parts:
            kept = view(self._kept_queries, loss, at=moment) if self._kept_queries is not None else None
            viewed = view(self.index, loss, kronecker, moment)
            self._parts[name] = Problem(
                viewed,
                self.queries,
                kept_queries=kept,
                memory=self.memory,
                step=self.step,
            )
            if self.cache is not None:
                self._parts[name].cache = Cache(viewed.folder, viewed.manifest, self.cache.limit, self.cache)
            self._parts[name].keeping = self.keeping
        return self._parts[name]

    def some(self, chosen: slice) -> Problem:
        """The same rows against some of the queries."""
        part = copy(self)
        part.queries = self.queries[chosen]
        part.keeping = Keeping(self.memory)
        part._parts, part.sums, part.computed, part._kept_queries = {}, {}, {}, None
        part._whole, part._features, part._larger = None, None, (self, chosen)
        for name, each in self._parts.items():  # other losses and moments, whose queries are collected once
            if each.index is not self.index:
                part._parts[name] = each.some(chosen)
        return part

    def beside(self, held: int) -> Problem:
        """The same problem, of whose memory `held` bytes are taken; nothing that was kept for methods comes along."""
        part = copy(self)
        part.memory = self.memory - held
        part.keeping = Keeping(part.memory)
        part._parts, part.sums, part.computed = {}, {}, {}
        return part

    @property
    def n(self) -> int:
        """Training examples."""
        return len(self.index)

    @property
    def m(self) -> int:
        """Queries."""
        return len(self.queries)

    @property
    def rows(self) -> Rows:
        """The training examples' texts and encodings."""
        return self.index.rows

    @property
    def features(self) -> Features:
        """The queries' gradients, representations and losses."""
        if self._whole is not None:
            return self._whole.features
        if self._larger is not None and self._features is None:
            self._features = self._larger[0].features.some(self._larger[1])
        if self._features is None and self._kept_queries is not None:
            self._features = self._kept_queries.kept_features()
        if self._features is None:
            self._features, self.lengths = self.index.features(self.queries)
        return self._features

    @property
    def device(self) -> torch.device:
        """Where rows meet queries: the model's GPU if it is on one, else the CPU."""
        return self.index.device

    def sizes(self, rows: StoredRows) -> Sizes:
        """Norms and traces of rows, found in one pass over them the first time."""
        if rows.blocks not in self._sizes:

            def make() -> dict[str, Tensor]:
                found = sizes_of(rows.by_block())
                return {"squares": found.squares, "traces": found.traces}

            self._sizes[rows.blocks] = Sizes(**self.fetch_all("sizes", rows.blocks, make))
        found = self._sizes[rows.blocks]
        return Sizes(found.squares, found.traces.sum(0, keepdim=True)) if rows.joint else found

    def fetch_all(
        self, name: str, blocks: Sequence[Block], make: Callable[[], dict[str, Tensor]], **depends: Any
    ) -> dict[str, Tensor]:
        """Tensors that depend on the index's gradients of some blocks, from its cache or made now."""
        return self.cache.fetch_all(name, blocks, make, **depends) if self.cache is not None else make()

    def kept(self, blocks: Sequence[Block]) -> Kept:
        """The cache of some blocks."""
        return _Cached(self.cache, tuple(blocks)) if self.cache is not None else Made()

    def products(self) -> Iterator[tuple[Block, Products]]:
        """Block after block; a block whose gradients are all zero (A while B is still zero) is left out."""
        for block in self.blocks:
            products = self.keeping.get(self.index, block.name) or self._of(block)
            if float(products.train_sq.max()) > 0:
                yield block, products

    def inner(self) -> Tensor:
        """(m, n) V G^T over the blocks, float64: the rows are multiplied where they are mapped, in one pass."""
        held = [self.keeping.get(self.index, block.name) for block in self.blocks]
        if all(each is not None and each.multiplied for each in held):  # for another method
            return torch.stack([products.cross for _, products in self.products()] or [self._nothing()]).sum(0)
        total = self._nothing()
        for run in adjacent(self.blocks):
            query, start = self.features.gradients[:, run], 0
            for rows in self.index.stored_gradients(run):
                total[:, start : start + len(rows)] += inner_products(query, rows)
                start += len(rows)
        return total

    def _nothing(self) -> Tensor:
        return torch.zeros(self.m, self.n, dtype=torch.float64)

    @property
    def joint(self) -> Products:
        """All blocks as one."""
        name = f"joint: {' '.join(block.name for block in self.blocks)}"
        found = self.keeping.get(self.index, name)
        if found is None:
            found = summed(lambda: (each for _, each in self.products()), self.m, self.n, self.kept(self.blocks))
            self.keeping.put(self.index, name, found, 8 * self.n * (self.n + self.m), name)
        return found

    @cached_property
    def train_norms(self) -> Tensor:
        """(n,) norms of the whole training gradients, float64; needs no query and no model."""
        return self.kept(self.blocks).fetch("norms", self._norms)

    def _norms(self) -> Tensor:
        whole = self.blocks == self.index.blocks
        parts = []
        for rows in self.index.stored_gradients():
            if whole:
                parts.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
                continue
            squares = [row_squares(rows[:, block.columns]) for block in self.blocks]
            parts.append(torch.stack(squares).sum(0).sqrt())
        return torch.cat(parts)

    def kronecker(self, labels: Labels) -> dict[str, KroneckerBasis]:
        """The Kronecker factors of every block by name, fitted now unless the index holds them."""
        if labels not in self._bases:
            self._bases[labels] = kronecker_factors(self.index, labels)
        return self._bases[labels]

    def representations(self, wanted: Representation) -> tuple[Callable[[], Iterator[Tensor]], Tensor]:
        """(rows, d) hidden states of the training examples, read shard by shard when called, and (m, d) of the queries."""
        self.index.stored_representation(wanted)  # refuses what is not held
        name = wanted.resolve(self.index.manifest.model.layers).name
        query = self.features.representations.get(name)
        if query is None:
            raise FinetraceError(
                f"the queries' features were kept without the representation {name}; build their index with "
                f"--representations {name} too."
            )
        return lambda: self.index.stored_representation(wanted), query

    def _of(self, block: Block) -> Products:
        query = self.features.gradients[:, block.columns]
        index, columns = self.index, block.columns
        gradients = Gradients(lambda: index.gradients(columns), query, lambda: index.stored_gradients(columns))
        products = Products(gradients, self.kept((block,)))
        whole = len(index.blocks) * self.n * (self.n + self.m) * query.element_size()
        self.keeping.put(index, block.name, products, whole)
        return products


@dataclass(frozen=True)
class _Cached:
    """The index's cache, for some blocks."""

    cache: Cache
    blocks: tuple[Block, ...]

    def fetch(self, name: str, make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """The tensor kept under this name, or made now."""
        return self.cache.fetch(name, self.blocks, make, **depends)
