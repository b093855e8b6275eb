"""Settings of a build: kept in the manifest, and taken from it for what is built alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetrace import arithmetic, fingerprint
from finetrace._version import __version__
from finetrace.collection import Collector
from finetrace.collection.projection import Projection
from finetrace.encoding import Encoded, Encoder
from finetrace.examples import Example
from finetrace.index.manifest import BlockRecord, EncodingRecord, Manifest, ModelRecord
from finetrace.models import Loaded, active_adapter
from finetrace.moments import Moment


def planned(
    loaded: Loaded,
    encoder: Encoder,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    collector: Collector,
    per_shard: int,
    modules: Sequence[str] | None,
    at: Moment,
    feature_dtype: str,
    by: Projection,
) -> Manifest:
    """The manifest that an index of these settings begins with: no shard is there yet.

    Args:
        loaded: The model, with its tokenizer and the spec by which it is loaded again.
        encoder: What the examples were encoded by.
        examples, encoded: All rows of the data, as texts and as tokens.
        collector: What collects their features, and tracks layers.
        per_shard: Rows a shard.
        modules: Regular expressions of the layers tracked, where some were given.
        at: Where along the fine-tuning gradients are taken.
        feature_dtype: What they are stored in.
        by: Their projection.
    """
    tracking = collector.tracking
    has_adapter = hasattr(loaded.model, "peft_config")
    return Manifest(
        finetrace=__version__,
        model=ModelRecord(
            name=loaded.spec.model,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            adapter=_adapter_folder(loaded.model) if has_adapter else None,
            base_fingerprint=fingerprint.of_base(loaded.model),
            adapter_fingerprint=fingerprint.of_adapter(loaded.model),
            scaling_fingerprint=fingerprint.of_scaling(loaded.model),
            embeddings_fingerprint=fingerprint.of_embeddings(loaded.model),
            settings=arithmetic.settings_of(loaded.model),
            tokenizer_fingerprint=fingerprint.of_tokenizer(loaded.tokenizer, encoder.template),
            layers=int(loaded.model.config.num_hidden_layers),
            at=at,
        ),
        encoding=EncodingRecord(
            loss_on=encoder.positions.text,
            max_length=encoder.max_length,
            template=encoder.template,
            pad_to=encoder.pad_to,
        ),
        data_fingerprint=fingerprint.of_data([example.id for example in examples], encoded),
        examples=len(examples),
        tokens=sum(len(item.ids) for item in encoded),
        feature_dtype=feature_dtype,
        batch_tokens=collector.batch_tokens,
        rows_per_shard=per_shard,
        modules=tuple(modules) if modules is not None else None,
        blocks=tuple(map(BlockRecord.of, tracking.blocks)),
        representations=tuple(each.name for each in collector.representations),
        skipped=tracking.skipped,
        projection=by.text,
        projection_seed=by.seed if by.kind != "none" else 0,
    )


def settings(about: Manifest) -> dict[str, Any]:
    """Arguments of `build_index` that a view of an index and rows appended to it take over from its manifest."""
    stored = None if about.feature_dtype == str(about.computed_dtype).removeprefix("torch.") else about.feature_dtype
    return {
        "modules": about.modules,
        "batch_tokens": about.batch_tokens,
        "feature_dtype": stored,
        "projection": about.projection,
        "projection_seed": about.projection_seed,
    }


def _adapter_folder(model: Any) -> str:
    name = active_adapter(model)
    return "adapter" if name == "default" else f"adapter/{name}"
