"""What an index comes to hold when it is first asked for: other tokens, the other end of training, Kronecker factors."""

from __future__ import annotations

from contextlib import suppress

from finetrace.collection import Collector, Representation
from finetrace.collection.factors import Labels
from finetrace.collection.projection import Projection
from finetrace.curvature.kronecker import KroneckerBasis
from finetrace.errors import FinetraceError
from finetrace.index import factors
from finetrace.index.build import build_index
from finetrace.index.collecting import collect_shards
from finetrace.index.factor_room import refuse_without_disk, refuse_without_memory
from finetrace.index.manifest import JOURNAL, NAME, fold, read
from finetrace.index.settings import settings
from finetrace.index.store import Index
from finetrace.index.view_folders import FOLDER, headless
from finetrace.lock import writing
from finetrace.models import Loaded
from finetrace.moments import Moment
from finetrace.positions import Positions


def view(index: Index, loss_on: str, kronecker: Labels | None = None, at: Moment | None = None) -> Index:
    """`index` itself if it has its loss on `loss_on` and its gradients `at` this moment, else its view that has.

    The view is collected now unless it is there and finished; it keeps gradients and losses alone.
    """
    positions, own = Positions.parse(loss_on), index.manifest.model.at
    at = at or own
    if positions == Positions.parse(index.manifest.encoding.loss_on) and at == own:
        return index
    folder = index.folder / FOLDER / (positions.slug if at == own else f"{positions.slug}-at-{at}")
    if headless(folder):
        raise FinetraceError(
            f"{folder / NAME}: missing, so this view is broken; remove {folder} and it is collected again."
        )
    if not Index.finished(folder):
        _refuse_changed(index)
        try:
            folder.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise FinetraceError(
                f"{folder}: cannot be written ({error}); what the index was not built with is kept there."
            ) from error
        build_index(
            model_of(index),
            index.rows.examples,
            folder,
            index.encoder(positions.text),
            **settings(index.manifest),
            representations=(),
            kronecker=kronecker,
            at=at,
        )
    elif (folder / JOURNAL).exists():
        with suppress(FinetraceError), writing(folder):  # somebody else may be at it
            fold(folder)
    made = Index(folder, parent=index, remedy=f"remove {folder} and it is collected again.")
    here, there = made.manifest.model, index.manifest.model
    if (here.dtype, here.base_fingerprint, here.adapter_fingerprint, here.at) != (
        there.dtype,
        there.base_fingerprint,
        there.adapter_fingerprint,
        at,
    ):
        raise FinetraceError(
            f"{folder}: this view was collected with another model, adapter or dtype than its index; remove the folder and "
            "it is collected again."
        )
    if len(made) != len(index):
        _refuse_changed(index)
        raise FinetraceError(
            f"{folder}: this view is of other rows than its index; remove the folder and it is collected again."
        )
    return made


def _refuse_changed(index: Index) -> None:
    """Raise `FinetraceError` where another process has changed an index since it was opened."""
    if read(index.folder) != index.manifest:
        raise FinetraceError(f"{index.folder}: another process has changed this index meanwhile; start again.")


def kronecker_factors(index: Index, labels: Labels) -> dict[str, KroneckerBasis]:
    """The factors of every block by name, fitted now in one pass over the rows unless the index holds them.

    Raises:
        FinetraceError: Gradients are not kept as products of two sides, the factors are too large for memory or disk, or what
            is kept is broken.
    """
    factors.refuse_flat(index.folder, Projection.parse(index.manifest.projection))
    if not factors.there(index.folder, labels):
        loaded, manifest = model_of(index), index.manifest
        refuse_without_memory(index.folder, loaded.model, index.blocks, labels, manifest.computed_dtype)
        refuse_without_disk(index.folder, manifest, labels)
        # no shard of a whole index is written here, so hidden states would be lost; but they may be why a row is left out
        spared = manifest.complete and not manifest.left_out
        wanted = () if spared else tuple(map(Representation.parse, manifest.representations))
        collector = Collector(loaded.model, manifest.track(loaded.model), wanted, manifest.batch_tokens)
        with writing(index.folder):
            _refuse_changed(index)
            rows = index.all_rows
            collect_shards(index.folder, manifest, collector, rows.examples, rows.encoded, labels)
    return factors.read(index.folder, index.manifest, labels)


def model_of(index: Index) -> Loaded:
    """The index's model, in the dtype that its gradients were collected in."""
    loaded = index.model()
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    if dtype != index.manifest.model.dtype:
        raise FinetraceError(
            f"{index.folder}: what this method needs is not in the index yet, and has to be collected in the index's own "
            f"{index.manifest.model.dtype}, not in {dtype}; leave out --dtype, or run once without it."
        )
    return loaded
