"""Whether an index of queries is of these queries, and was built as the index that they are asked of."""

from __future__ import annotations

from collections.abc import Sequence

from finetrace import arithmetic
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.fingerprint import texts_and_weights
from finetrace.index.store import Index


def refuse_other_queries(kept: Index, index: Index, queries: Sequence[Example]) -> None:
    """Raise `FinetraceError` unless the features in `kept` are those that `index` would collect of the queries."""
    if texts_and_weights(kept.rows.examples) != texts_and_weights(queries):
        raise FinetraceError(
            f"{kept.folder}: this index does not hold these queries, with these texts and weights and in this order."
        )
    if _made(kept) != _made(index) or _apart(kept, index) or _set_apart(kept, index):
        raise FinetraceError(
            f"{kept.folder}: the queries' index was not built as {index.folder} was: by the same model and "
            "adapter, in the same dtype, on the same tokens of the loss and at the same end of the fine-tuning."
        )


def _made(index: Index) -> tuple[object, ...]:
    """What two indexes have to have in common for inner products between them to mean anything."""
    own = index.manifest
    model, encoding = own.model, own.encoding
    prints = model.base_fingerprint, model.adapter_fingerprint, model.tokenizer_fingerprint
    tokens = encoding.loss_on, encoding.max_length, encoding.pad_to
    return (*prints, model.dtype, model.at, *tokens, index.blocks, own.projection, own.projection_seed)


def _apart(one: Index, other: Index) -> bool:
    """Whether two indexes are known to be of adapters of different scaling, or of bases of different embeddings."""
    was, now = (each.manifest.model for each in (one, other))
    noted = (
        {was.scaling_fingerprint, now.scaling_fingerprint},
        {was.embeddings_fingerprint, now.embeddings_fingerprint},
    )
    return any(None not in prints and len(prints) == 2 for prints in noted)


def _set_apart(one: Index, other: Index) -> bool:
    """Whether their base models are known to be configured differently."""
    was, now = (each.manifest.model.settings or {} for each in (one, other))
    return arithmetic.apart(was, now) is not None
