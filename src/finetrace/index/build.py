"""Building an index: encode, choose the projection, then collect shard after shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from finetrace.batching import batch_budget
from finetrace.collection import Collector, Representation, track
from finetrace.collection.collect import features_dtype
from finetrace.collection.factors import Labels
from finetrace.collection.layers import ALL_LINEAR
from finetrace.collection.projection import Projection
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS
from finetrace.encoding import Encoded, Encoder, LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index import factors, manifest, sizing
from finetrace.index.collecting import collect_shards
from finetrace.index.factor_room import refuse_without_disk, refuse_without_memory
from finetrace.index.manifest import Manifest, left_out_sentence
from finetrace.index.settings import planned
from finetrace.index.starting import make_folder, refuse_taken, start
from finetrace.index.store import Index
from finetrace.index.stored import FeatureDtype
from finetrace.learned_positions import refuse_beyond
from finetrace.lock import writing
from finetrace.models import Loaded
from finetrace.moments import Moment, at_moment


def build_index(
    loaded: Loaded,
    examples: Sequence[Example],
    folder: Path,
    encoder: Encoder,
    *,
    modules: Sequence[str] | None = None,
    representations: Sequence[Representation] = DEFAULT_REPRESENTATIONS,
    batch_tokens: int | None = None,
    rows_per_shard: int | None = None,
    kronecker: Labels | None = None,
    at: Moment = "end",
    feature_dtype: FeatureDtype | None = None,
    projection: str | None = None,
    projection_seed: int = 0,
    disk: int | None = None,
    memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    begin: Callable[[Manifest, Collector, Sequence[Encoded]], None] | None = None,
    skip_bad: bool = False,
    engine: Engine = Engine(),
) -> tuple[Index, LengthReport]:
    """Collect the features of `examples` into `folder`.

    An unfinished index of the same model, adapter and data goes on at its next shard and ends with the same bytes as
    an undisturbed run; a finished one is opened, and takes over labels and metadata that have changed since; anything
    else in the folder is refused, never overwritten.

    Args:
        loaded: Model, tokenizer, and the spec by which the index will load them again.
        examples: Rows with a response.
        folder: The index.
        encoder: The encoding that training had; queries get the same.
        modules: Regular expressions for plain linear layers to track, or `all-linear`; by default the LoRA matrices, and of a
            model without an adapter all linear layers.
        representations: Hidden states to keep.
        batch_tokens: Padded tokens a batch holds at most; by default those of an index that is there, else what suits the
            device (`batching.batch_budget`).
        rows_per_shard: Examples a shard; by default those of an index that is there, else as many as fit 128 MB.
        kronecker: Fit the factors of K-FAC and EK-FAC on the way, with labels drawn from the `model` (one more backward
            pass) or those of the `data` (none); without it they are fitted when a method first asks for them.
        at: Where gradients and hidden states are taken: at the `end` of the fine-tuning, or at its `start` (`moments`).
        feature_dtype: What gradients are stored in; by default as they are computed: float32, or float64 for a float64
            model. Scores widen them again (`finetrace.index.stored`).
        projection: `none`, `two-sided:KOUTxKIN`, `rademacher:K`, `sparse:K` (`Projection`), or `auto`: none where that fits,
            else the largest two-sided one. By default `auto` where all linear layers are tracked, else `none`.
        projection_seed: Of the random matrices.
        disk: Bytes that `auto` may take on the disk; by default half of what is free.
        memory: Bytes of memory that `auto` may take; by default half of what is available.
        say: Hears what is longer than the limits, what `auto` chose and why, and what is tracked where nothing was named.
        begin: Hears what is to be done before anything is written; what it raises stops the work.
        skip_bad: Leave out rows whose loss, gradient or hidden state is not finite, and note them in the manifest; without it
            the first of them stops the run.
        engine: Where shards are collected. Workers load the model by its spec, and refuse it where it is not this one.

    Returns:
        The index, ready to be queried, and what was longer than the limits.
    """
    if not examples:
        raise FinetraceError("there is nothing to index: the data set is empty.")
    with at_moment(loaded.model, at):
        pass  # what cannot be taken back to its start is refused before anything is written
    refuse_duplicates(examples)
    if isinstance(modules, str):  # else read letter by letter
        modules = (modules,)
    if modules is None and not hasattr(loaded.model, "peft_config"):
        modules = (ALL_LINEAR,)
        say("the model has no adapter, so all of its linear layers are tracked")
    every = modules is not None and ALL_LINEAR in modules
    projection = projection or (sizing.AUTO if every else "none")
    if projection != sizing.AUTO and (disk, memory) != (None, None):
        raise FinetraceError(
            f"--disk and --memory are limits of --projection auto, and the projection is {projection}; "
            "use auto, or leave them out."
        )
    by = Projection.parse(projection if projection != sizing.AUTO else "none", projection_seed)
    if kronecker is not None:
        factors.refuse_flat(folder, by)
    tracking = track(loaded.model, modules, by)
    layers = int(loaded.model.config.num_hidden_layers)
    wanted = tuple(dict.fromkeys(each.resolve(layers) for each in representations))
    encoded, lengths = encoder.encode_all(examples, getattr(loaded.model.config, "max_position_embeddings", None))
    if lengths.longer:
        say(lengths.sentence())
    refuse_beyond(loaded.model, encoded, [example.named for example in examples])  # before the folder is begun
    computed = features_dtype(loaded.model)
    stored = feature_dtype or str(computed).removeprefix("torch.")
    there = manifest.read(folder) if (folder / manifest.NAME).exists() else None
    budget = batch_tokens or (there.batch_tokens if there is not None else batch_budget(loaded.model.device))
    size = sizing.Plan(
        encoded,
        budget,
        computed.itemsize,
        getattr(torch, stored).itemsize,
        rows_per_shard or (there.rows_per_shard if there is not None else None),
        kronecker,
        computed.itemsize * (len(wanted) * int(loaded.model.config.hidden_size) + 1),
        engine.workers,
    )
    if projection == sizing.AUTO:
        if there is not None:  # what was chosen once stays, however much is free by now
            by = Projection.parse(there.projection, projection_seed)
        else:
            by, sentence = sizing.fit(
                loaded.model, modules, projection_seed, size, sizing.Budget.of(folder, disk, memory)
            )
            say(sentence)
        tracking = track(loaded.model, modules, by)
    collector = Collector(loaded.model, tracking, wanted, budget)
    per_shard = size.rows_per_shard(tracking)
    plan = planned(loaded, encoder, examples, encoded, collector, per_shard, modules, at, stored, by)
    if kronecker is not None:
        refuse_without_memory(folder, loaded.model, tracking.blocks, kronecker, computed, here=engine.in_process)
    refuse_taken(folder, plan)
    if begin is not None:
        begin(plan, collector, encoded)
    if kronecker is not None:
        refuse_without_disk(folder, plan, kronecker, engine.workers)
    make_folder(folder)
    with writing(folder):
        started = start(folder, plan, loaded, examples, encoded, size.disk(tracking))
        if started.left_out and not skip_bad:
            raise FinetraceError(
                f"{folder}: {left_out_sentence(started)} Give --skip-bad as before, or mend such rows and choose another --out."
            )
        collect_shards(
            folder,
            started,
            collector,
            examples,
            encoded,
            kronecker,
            loaded.elsewhere,
            engine,
            skip_bad=skip_bad,
            say=say,
        )
    return Index(folder, loaded), lengths


def refuse_duplicates(examples: Sequence[Example]) -> None:
    """Stop where two rows have one id."""
    seen: dict[str, int] = {}
    for i, example in enumerate(examples):
        if example.id in seen:
            raise FinetraceError(
                f"rows {seen[example.id] + 1} and {i + 1} have the same id {example.id!r}; make ids unique."
            )
        seen[example.id] = i
