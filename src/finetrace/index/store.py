"""An index on disk: its manifest, its examples, and its features read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from finetrace import arithmetic, fingerprint
from finetrace.collection import Block, Collector, Features, Representation
from finetrace.collection.factor_sizes import too_wide
from finetrace.collection.projection import Projection
from finetrace.encoding import Encoder, LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import manifest, rows
from finetrace.index.blocks import RowBlocks
from finetrace.index.rows import Rows
from finetrace.index.shards import ShardReader
from finetrace.models import DType, Loaded, ModelSpec, load
from finetrace.moments import at_moment, why_no_start


class Index:
    """A finished index; answers what attribution asks and turns queries into features.

    Attributes:
        folder: Where it is.
        manifest: What it holds and what it was made from.
    """

    def __init__(
        self, folder: Path, loaded: Loaded | None = None, parent: Index | None = None, remedy: str | None = None
    ) -> None:
        """Open `folder`; a model that is given is checked against the index before its first use.

        A view of another index, its `parent`, uses the parent's model; `remedy` is what to do when a shard is broken.
        """
        self.folder = folder
        self._parent = parent
        self.manifest = manifest.read(folder)
        if not self.manifest.complete:
            done = sum(shard.stop - shard.start for shard in self.manifest.shards)
            raise FinetraceError(
                f"{folder}: this index is unfinished ({done} of {self.manifest.examples} rows); run finetrace index again "
                "with the same arguments to finish it."
            )
        if not self.manifest.kept:
            raise FinetraceError(
                f"{folder}: every row was left out, since its values are not finite; look at the model, or use --dtype float32."
            )
        self.blocks: tuple[Block, ...] = tuple(record.block() for record in self.manifest.blocks)
        self._reader = ShardReader(folder, self.manifest, remedy)
        self._loaded = loaded
        self._checked = False

    @staticmethod
    def finished(folder: Path) -> bool:
        """Whether a finished index is in `folder`."""
        return (folder / manifest.NAME).exists() and manifest.read(folder).complete

    def __len__(self) -> int:
        return self.manifest.kept

    @cached_property
    def data_rows(self) -> tuple[int, ...]:
        """The row of the data, counted from 0, that each row of the index is: all in turn but those left out."""
        gone = {each.row for each in self.manifest.left_out}
        return tuple(row for row in range(self.manifest.examples) if row not in gone)

    @cached_property
    def rows(self) -> Rows:
        """The training examples that have features, and their encodings."""
        return self.all_rows.only(self.data_rows) if self.manifest.left_out else self.all_rows

    @cached_property
    def all_rows(self) -> Rows:
        """`rows` and those that were left out; of a view, with the labels and metadata that its parent's rows have now."""
        own = rows.read(self.folder, self.manifest)
        return Rows(self._parent.rows.examples, own.encoded) if self._parent is not None else own

    @cached_property
    def losses(self) -> Tensor:
        """(n,) mean loss of each training example under the model, in nats."""
        return self._reader.tensor("losses")

    def gradients(self, columns: slice, chosen: slice | None = None) -> Tensor:
        """(rows, columns) of the (n, D) matrix of training gradients, in the dtype in which they were computed."""
        start, stop, _ = (chosen or slice(None)).indices(len(self))
        return self._reader.gradients(columns, slice(start, stop))

    def stored_gradients(self, columns: slice = slice(None)) -> Iterator[Tensor]:
        """(rows, columns) of training gradients, a shard at a time, mapped where they are stored as they were computed."""
        return self._reader.mapped(columns)

    def row_blocks(self, rows: int, columns: slice | None = None) -> RowBlocks:
        """(rows, columns) blocks of the gradients in their stored dtype, read ahead; for what is larger than memory."""
        start, stop, _ = (columns or slice(None)).indices(sum(block.size for block in self.blocks))
        return RowBlocks(self._reader, rows, slice(start, stop))

    def has_representation(self, wanted: Representation) -> bool:
        """Whether hidden states of that layer and pooling are kept."""
        return wanted.resolve(self.manifest.model.layers).name in self.manifest.representations

    def representation(self, wanted: Representation) -> Tensor:
        """(n, d) hidden states of one layer and pooling."""
        return torch.cat(list(self.stored_representation(wanted)))

    def stored_representation(self, wanted: Representation) -> Iterator[Tensor]:
        """(rows, d) hidden states of one layer and pooling, a shard at a time, mapped while they are looked at."""
        name = wanted.resolve(self.manifest.model.layers).name
        if not self.has_representation(wanted):
            raise FinetraceError(
                f"{self.folder}: the index does not hold the representation {name}; it holds "
                f"{', '.join(self.manifest.representations)}. Build it with --representations {name}."
            )
        return self._reader.tensors(f"representation.{name}")

    def model(
        self,
        dtype: DType | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
        device_map: str | None = None,
    ) -> Loaded:
        """The model the index was made with, loaded on first use and checked against the index's fingerprints."""
        record = self.manifest.model
        if self._loaded is None and self._parent is not None:
            self._loaded = self._parent.model(dtype, device, trust_remote_code, device_map)
        if self._loaded is None:
            adapter = str(manifest.inside(self.folder, record.adapter)) if record.adapter else None
            spec = ModelSpec(
                record.name,
                adapter,
                dtype or record.dtype,  # type: ignore[arg-type]
                device,
                trust_remote_code,
                device_map,
            )
            self._loaded = load(spec, self.folder)
        there = str(self._loaded.model.dtype).removeprefix("torch.")
        if dtype not in (None, "auto", there):
            raise FinetraceError(
                f"{self.folder}: its model is loaded already, in {there}; open the index again for {dtype}."
            )
        if not self._checked:
            refuse_other_model(self.folder, self.manifest, self._loaded)
            self._checked = True
        return self._loaded

    @property
    def device(self) -> torch.device:
        """Where the model is if it is loaded on a GPU, else the CPU."""
        loaded = self._loaded or (self._parent._loaded if self._parent is not None else None)
        found = loaded.model.device if loaded is not None else torch.device("cpu")
        return found if found.type == "cuda" else torch.device("cpu")

    def has_start(self) -> bool:
        """Whether gradients can be taken where the fine-tuning began (`finetrace.moments`); asks the kept adapter alone."""
        if self._parent is not None:
            return self._parent.has_start()
        if self.manifest.model.adapter is None:
            return False
        from peft import PeftConfig

        adapter = manifest.inside(self.folder, self.manifest.model.adapter)
        try:
            return why_no_start(PeftConfig.from_pretrained(str(adapter))) is None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FinetraceError(
                f"{adapter}: no adapter can be read there ({error}); run finetrace index again with the data and the adapter "
                "on this folder."
            ) from error

    def has_factors(self) -> bool:
        """Whether Kronecker factors can be had: gradients that were projected after they were formed have none, and a block as
        wide as a large vocabulary has none that could be decomposed. Says nothing of the memory of this machine.
        """
        return not Projection.parse(self.manifest.projection).flat and too_wide(self.blocks) is None

    def encoder(self, loss_on: str | None = None) -> Encoder:
        """The encoding that the training examples had, or the same with the loss on other tokens."""
        kept = self.manifest.encoding
        return Encoder(self.model().tokenizer, loss_on or kept.loss_on, kept.max_length, kept.template, kept.pad_to)

    def kept_features(self) -> Features:
        """The features of the index's own rows, read from disk."""
        names = self.manifest.representations
        return Features(
            self.gradients(slice(None)),
            self.losses,
            {name: self._reader.tensor(f"representation.{name}") for name in names},
        )

    def features(self, queries: Sequence[Example]) -> tuple[Features, LengthReport]:
        """Gradients, representations and losses of queries that have a response, by the index's own model.

        Gradients are in the dtype that those of the index are widened to, whatever the model is loaded in.
        """
        loaded = self.model()
        context = getattr(loaded.model.config, "max_position_embeddings", None)
        encoded, lengths = self.encoder().encode_all(queries, context)
        tracking = self.manifest.track(loaded.model)
        if tracking.blocks != self.blocks:
            raise FinetraceError(
                f"{self.folder}: the model's tracked layers are not those of the index; build it again."
            )
        wanted = tuple(Representation.parse(name) for name in self.manifest.representations)
        collector = Collector(loaded.model, tracking, wanted, self.manifest.batch_tokens)
        with at_moment(loaded.model, self.manifest.model.at):
            found = collector.collect(encoded, [query.id for query in queries])
        found.gradients = found.gradients.to(self.manifest.computed_dtype)
        return found, lengths


def refuse_other_model(folder: Path, about: manifest.Manifest, loaded: Loaded) -> None:
    """Raise `FinetraceError` where a model's fingerprints are not those of an index."""
    record = about.model
    as_it_was = f"use {record.name} as it was when the index was built"
    facts: tuple[tuple[str, str | None, str | None, str], ...] = (
        (
            "base model",
            record.base_fingerprint,
            fingerprint.of_base(loaded.model),
            as_it_was,
        ),
        (
            "adapter",
            record.adapter_fingerprint,
            fingerprint.of_adapter(loaded.model),
            "open it with the adapter it was built with",
        ),
        (
            "tokenizer or chat template",
            record.tokenizer_fingerprint,
            fingerprint.of_tokenizer(loaded.tokenizer, about.encoding.template),
            "use the tokenizer the index was built with",
        ),
    )
    if record.scaling_fingerprint is not None:
        scaling = fingerprint.of_scaling(loaded.model)
        facts += (
            (fingerprint.SCALING, record.scaling_fingerprint, scaling, "open it with the adapter it was built with"),
        )
    if record.embeddings_fingerprint is not None and (embeddings := fingerprint.of_embeddings(loaded.model)):
        facts += ((fingerprint.EMBEDDINGS, record.embeddings_fingerprint, embeddings, as_it_was),)
    if other := arithmetic.apart(record.settings or {}, arithmetic.settings_of(loaded.model)):
        raise FinetraceError(
            f"{folder}: the index was built with another {arithmetic.NAME}, {other}; {as_it_was}, "
            "or build the index again."
        )
    for what, was, now, remedy in facts:
        if was != now:
            raise FinetraceError(
                f"{folder}: the index was built with another {what} (fingerprint {was}, this one has {now}); "
                f"{remedy}, or build the index again."
            )


def open_index(folder: str | Path, loaded: Loaded | None = None) -> Index:
    """Open a finished index; the model is loaded when a query needs it."""
    return Index(Path(folder), loaded)
