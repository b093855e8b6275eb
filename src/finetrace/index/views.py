"""What an index comes to hold when it is first asked for: the loss on other tokens, and Kronecker factors."""

from __future__ import annotations

from finetrace.collection import Representation
from finetrace.collection.factors import Labels
from finetrace.curvature.kronecker import KroneckerBasis
from finetrace.index import factors
from finetrace.index.build import build_index
from finetrace.index.store import Index
from finetrace.positions import Positions

FOLDER = "views"


def view(index: Index, loss_on: str, kronecker: Labels | None = None) -> Index:
    """`index` itself if its loss is taken on `loss_on`, else its view, collected now unless it is there and finished.

    A view keeps gradients and losses alone; representations do not depend on the loss.
    """
    positions = Positions.parse(loss_on)
    if positions == Positions.parse(index.manifest.encoding.loss_on):
        return index
    folder = index.folder / FOLDER / positions.slug
    if not Index.finished(folder):
        folder.parent.mkdir(exist_ok=True)
        build_index(
            index.model(),
            index.rows.examples,
            folder,
            index.encoder(positions.text),
            modules=index.manifest.modules,
            representations=(),
            batch_tokens=index.manifest.batch_tokens,
            kronecker=kronecker,
        )
    return Index(folder, parent=index)


def kronecker_factors(index: Index, labels: Labels) -> dict[str, KroneckerBasis]:
    """The factors of every block by name, fitted now in one pass over the rows unless the index holds them."""
    if not factors.there(index.folder, labels):
        build_index(
            index.model(),
            index.rows.examples,
            index.folder,
            index.encoder(),
            modules=index.manifest.modules,
            representations=tuple(map(Representation.parse, index.manifest.representations)),
            batch_tokens=index.manifest.batch_tokens,
            rows_per_shard=index.manifest.rows_per_shard,
            kronecker=labels,
        )
    return factors.read(index.folder, index.manifest, labels)
