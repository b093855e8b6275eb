"""Training examples and queries side by side, with every product that methods share computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from finetrace.collection import Block, Features, Representation
from finetrace.curvature import Products
from finetrace.curvature.products import Gradients
from finetrace.encoding import LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index.rows import Rows
from finetrace.index.store import Index

CACHE_BYTES = 2 << 30


class Problem:
    """n indexed training examples against m queries.

    Methods of the text need no model; the queries' gradients and representations are collected, with the model, when
    a method first asks for them. Inner products are kept while they fit `CACHE_BYTES`, so methods after the first one
    cost little.
    """

    def __init__(self, index: Index, queries: Sequence[Example], features: Features | None = None) -> None:
        """The queries, each with a response; features that were collected before need no model."""
        if not queries:
            raise FinetraceError("there is no query to trace; give at least one with a response.")
        for query in queries:
            if not query.has_response:
                raise FinetraceError(
                    f"query {query.id}: it has no response to trace; give one, or let the model answer with --ask."
                )
        self.index = index
        self.queries = tuple(queries)
        self.lengths = LengthReport(None, False)
        self._kept: dict[str, Products] = {}
        self._features = features
        self.sums: dict[str, dict[str, Tensor]] = {}  # what methods keep for their other normalisations

    @property
    def n(self) -> int:
        """Training examples."""
        return len(self.index)

    @property
    def m(self) -> int:
        """Queries."""
        return len(self.queries)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Tracked matrices."""
        return self.index.blocks

    @property
    def rows(self) -> Rows:
        """The training examples' texts and encodings."""
        return self.index.rows

    @property
    def features(self) -> Features:
        """The queries' gradients, representations and losses."""
        if self._features is None:
            self._features, self.lengths = self.index.features(self.queries)
        return self._features

    def products(self) -> Iterator[tuple[Block, Products]]:
        """Block after block; a block whose gradients are all zero (A while B is still zero) is left out."""
        for block in self.blocks:
            products = self._kept.get(block.name) or self._of(block)
            if float(products.train_sq.max()) > 0:
                yield block, products

    @cached_property
    def joint(self) -> Products:
        """All blocks as one."""
        gram = torch.zeros(self.n, self.n, dtype=torch.float64)
        cross = torch.zeros(self.m, self.n, dtype=torch.float64)
        train_sq, query_sq = torch.zeros(self.n, dtype=torch.float64), torch.zeros(self.m, dtype=torch.float64)
        for _, products in self.products():
            gram += products.gram
            cross += products.cross
            train_sq += products.train_sq
            query_sq += products.query_sq
        return Products.known(gram, cross, train_sq, query_sq)

    @cached_property
    def train_norms(self) -> Tensor:
        """(n,) norms of the whole training gradients, float64; needs no query and no model."""
        total = torch.zeros(self.n, dtype=torch.float64)
        for block in self.blocks:
            total += self.index.gradients(block.columns).double().square().sum(1)
        return total.sqrt()

    def representations(self, wanted: Representation) -> tuple[Tensor, Tensor]:
        """(n, d) of the training examples and (m, d) of the queries."""
        train = self.index.representation(wanted)
        return train, self.features.representations[wanted.resolve(self.index.manifest.model.layers).name]

    def _of(self, block: Block) -> Products:
        query = self.features.gradients[:, block.columns]
        products = Products(Gradients(lambda: self.index.gradients(block.columns), query))
        if len(self.blocks) * self.n * (self.n + self.m) * query.element_size() <= CACHE_BYTES:
            self._kept[block.name] = products
        return products
