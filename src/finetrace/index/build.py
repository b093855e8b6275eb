"""Building an index: encode, collect a shard, write it whole, note it in the manifest, go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from finetrace import fingerprint
from finetrace._version import __version__
from finetrace.batching import batch_budget
from finetrace.collection import Collector, Representation, track
from finetrace.collection.collect import features_dtype
from finetrace.collection.factors import Labels
from finetrace.collection.modules import ALL_LINEAR
from finetrace.collection.projection import Projection
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS
from finetrace.encoding import Encoded, Encoder, LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import SAVED
from finetrace.index import factors, lock, manifest, rows, shards, sizing
from finetrace.index.lock import writing
from finetrace.index.manifest import BlockRecord, EncodingRecord, LeftOutRecord, Manifest, ModelRecord, ShardRecord
from finetrace.index.store import Index
from finetrace.index.stored import FeatureDtype
from finetrace.index.work import Collected, Piece, ShardWork, collect_piece, sweep
from finetrace.models import Loaded, ModelSpec, active_adapter, save_adapter
from finetrace.moments import Moment, at_moment
from finetrace.progress import Tracker


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
        rows_per_shard: Examples a shard; by default as many as fit 128 MB.
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
        say: Hears what `auto` chose and why, and what is tracked where nothing was named.
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
    if modules is None and not hasattr(loaded.model, "peft_config"):
        modules = (ALL_LINEAR,)
        say("the model has no adapter, so all of its linear layers are tracked")
    every = modules is not None and ALL_LINEAR in modules
    projection = projection or (sizing.AUTO if every else "none")
    by = Projection.parse(projection if projection != sizing.AUTO else "none", projection_seed)
    if kronecker is not None:
        factors.refuse_flat(folder, by)
    tracking = track(loaded.model, modules, by)
    layers = int(loaded.model.config.num_hidden_layers)
    wanted = tuple(each.resolve(layers) for each in representations)
    encoded, lengths = encoder.encode_all(examples, getattr(loaded.model.config, "max_position_embeddings", None))
    computed = features_dtype(loaded.model)
    stored = feature_dtype or str(computed).removeprefix("torch.")
    there = manifest.read(folder) if (folder / manifest.NAME).exists() else None
    budget = batch_tokens or (there.batch_tokens if there is not None else batch_budget(loaded.model.device))
    size = sizing.Plan(
        encoded,
        budget,
        computed.itemsize,
        getattr(torch, stored).itemsize,
        rows_per_shard,
        2 if kronecker == "model" else 1,
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
    plan = _plan(loaded, encoder, examples, encoded, collector, per_shard, modules, at, stored, by)
    need = size.disk(tracking)
    if kronecker is not None:
        need += factors.disk(tracking.blocks, -(-len(examples) // per_shard), computed.itemsize)
    if begin is not None:
        begin(plan, collector, encoded)
    _open(folder)
    with writing(folder):
        started = _start(folder, plan, loaded, examples, encoded, need)
        if started.left_out and not skip_bad:
            raise FinetraceError(
                f"{folder}: {left_out_sentence(started)} Give --skip-bad as before, or mend such rows and choose another --out."
            )
        collect_shards(
            folder, started, collector, examples, encoded, kronecker, loaded.spec, engine, skip_bad=skip_bad, say=say
        )
    return Index(folder, loaded), lengths


def _plan(
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


def _open(folder: Path) -> None:
    """Make the folder; one that holds something else than an index, finished or not, is refused."""
    known = (manifest.PART, lock.NAME)
    try:
        if (folder / manifest.NAME).exists():
            return
        if folder.exists() and (not folder.is_dir() or any(path.name not in known for path in folder.iterdir())):
            raise FinetraceError(
                f"{folder}: there is something else already; choose another --out or empty the folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(
            f"{folder}: cannot be written ({error}); free some space or choose another folder."
        ) from error


def _start(
    folder: Path,
    plan: Manifest,
    loaded: Loaded,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    need: int,
) -> Manifest:
    """A new index up to its first shard, or the one that is there with the shards that are whole.

    The manifest comes first, so that a run killed at any moment leaves something that the next one knows.
    """
    if (folder / manifest.NAME).exists():
        there = manifest.read(folder)
        _refuse_other(folder, there, plan)
        started = there.model_copy(update={"shards": tuple(s for s in there.shards if whole(folder, s))})
        if not started.shards or not _furnished(folder, started):
            _furnish(folder, started, loaded, examples, encoded)
        elif rows.read(folder, there).examples != tuple(examples):
            rows.write(folder, there, examples, encoded)  # same ids and tokens: labels or metadata were changed
        return started
    free = shutil.disk_usage(folder).free
    if need > free:
        raise FinetraceError(
            f"{folder}: the index needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; free some "
            "space or choose another folder."
        )
    manifest.write(folder, plan)
    _furnish(folder, plan, loaded, examples, encoded)
    return plan


def _furnish(
    folder: Path, started: Manifest, loaded: Loaded, examples: Sequence[Example], encoded: Sequence[Encoded]
) -> None:
    """Write what an index holds besides its shards: the examples and the adapter."""
    rows.write(folder, started, examples, encoded)
    if started.model.adapter is not None:
        try:
            save_adapter(loaded.model, folder / "adapter")
            saved = Path(loaded.spec.adapter or "") / SAVED
            if loaded.spec.adapter and saved.is_file():  # how it was fine-tuned, for retraining
                shutil.copyfile(saved, folder / started.model.adapter / SAVED)
        except (OSError, SafetensorError) as error:
            raise FinetraceError(
                f"{folder}: the adapter cannot be written ({error}); free some space or choose another folder."
            ) from error


def _furnished(folder: Path, started: Manifest) -> bool:
    """Whether the examples and the adapter of an index are there and whole."""
    adapter = started.model.adapter
    if adapter is not None and not (folder / adapter / "adapter_model.safetensors").is_file():
        return False
    try:
        rows.read(folder, started)
    except FinetraceError:
        return False
    return True


def collect_shards(
    folder: Path,
    started: Manifest,
    collector: Collector,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    labels: Labels | None,
    spec: ModelSpec | None = None,
    engine: Engine = Engine(),
    *,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Collect the shards and factor sums that are missing, in any order, and finish the factors.

    The manifest notes each shard as soon as it is whole, so that a killed run goes on after those that are there.

    Args:
        folder: The index; this process holds its lock.
        started: Its manifest with the shards that are whole.
        collector: Of the model in this process.
        examples, encoded: All rows of the data, those too that `started` has left out.
        labels: Of the Kronecker factors, where some are wanted.
        spec: By which workers load the model; without it this process does the work, whatever the engine.
        engine: Where the shards are collected.
        skip_bad: As in `build_index`.
        say: Hears of batches that did not fit in memory.
    """
    done = {shard.start: shard for shard in started.shards}
    gone = {each.row: each for each in started.left_out}
    unfitted = labels if labels is not None and not factors.there(folder, labels) else None
    pieces, there = [], []
    for start, stop in started.borders():
        known = {row: gone[row].reason for row in range(start, stop) if row in gone}
        if start in done and (unfitted is None or factors.has_part(folder, unfitted, start, stop - start - len(known))):
            there.append(stop - start)
        else:
            pieces.append(Piece(start, stop, start not in done, known))
    tracker = Tracker("collecting gradients", len(examples), "examples")
    ids = [example.id for example in examples]

    def here(piece: Piece) -> Collected:
        return collect_piece(
            folder, started, collector, ids, encoded, piece, unfitted, tracker.advance, skip_bad=skip_bad
        )

    local = engine.in_process or spec is None
    work: Callable[[Piece], Collected] = here
    if spec is not None and not local:
        work = ShardWork(folder.resolve(), started, spec, unfitted, skip_bad)
    halved = 0
    sweep(folder)
    try:
        each_piece = (Engine() if local else engine).run_each(
            work, pieces, name=lambda piece: piece.name, shared=folder
        )
        with tracker, closing(each_piece) as arriving:
            for rows_there in there:
                tracker.advance(rows_there)
            for place, found in arriving:
                if not local:
                    tracker.advance(pieces[place].stop - pieces[place].start)
                halved += found.halved
                if found.shard is not None:
                    done[found.shard.start] = found.shard
                    gone |= {record.row: record for record in found.left_out}
                    manifest.write(folder, noted(started, done, gone))
    finally:
        sweep(folder)
    if halved:
        say(f"{halved} batches did not fit in memory and were halved; smaller --batch-tokens spare the attempts.")
    finished = manifest.read(folder)
    if unfitted is not None and finished.kept:
        factors.finish(folder, finished, unfitted)
    elif labels is not None:
        factors.tidy(folder, labels)  # what a run left that was killed while it removed them


def noted(started: Manifest, done: Mapping[int, ShardRecord], gone: Mapping[int, LeftOutRecord]) -> Manifest:
    """The manifest with these shards, by first row, and rows left out, by number."""
    shard_records = tuple(done[start] for start in sorted(done))
    return started.model_copy(update={"shards": shard_records, "left_out": tuple(gone[row] for row in sorted(gone))})


def left_out_sentence(about: Manifest) -> str:
    """How many rows an index left out, and the first five of them; empty where it has them all."""
    if not about.left_out:
        return ""
    named = "; ".join(f"example {each.id} (row {each.row + 1}): {each.reason}" for each in about.left_out[:5])
    more = "; ..." if len(about.left_out) > 5 else ""
    return f"{len(about.left_out)} of {about.examples} rows are left out: {named}{more}."


def _refuse_other(folder: Path, there: Manifest, plan: Manifest) -> None:
    """Say which part of the configuration differs from the index that is already there."""
    names = {
        "model.base_fingerprint": "base model",
        "model.adapter_fingerprint": "adapter",
        "model.tokenizer_fingerprint": "tokenizer or chat template",
        "data_fingerprint": "data set or encoding",
    }
    was, now = _flat(there.model_dump(mode="json")), _flat(plan.model_dump(mode="json"))
    for key in now:
        if key not in ("shards", "left_out", "appended", "finetrace") and was.get(key) != now[key]:
            what = names.get(key, f"{key} ({was.get(key)}, not {now[key]})")
            raise FinetraceError(
                f"{folder}: an index of another {what} is there; choose another --out or remove the folder."
            )


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if key in ("model", "encoding"):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    # what is fingerprinted first, and the blocks, which follow from everything else, last
    return dict(
        sorted(flat.items(), key=lambda pair: (not pair[0].endswith("fingerprint"), pair[0] == "blocks", pair[0]))
    )


def whole(folder: Path, shard: ShardRecord) -> bool:
    """Whether a shard is there with the size and the checksum that the manifest has."""
    path = folder / shards.FOLDER / shard.file
    return path.is_file() and path.stat().st_size == shard.bytes and fingerprint.of_file(path) == shard.sha256


def _adapter_folder(model: Any) -> str:
    name = active_adapter(model)
    return "adapter" if name == "default" else f"adapter/{name}"


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


def refuse_duplicates(examples: Sequence[Example]) -> None:
    """Stop where two rows have one id."""
    seen: dict[str, int] = {}
    for i, example in enumerate(examples):
        if example.id in seen:
            raise FinetraceError(
                f"rows {seen[example.id] + 1} and {i + 1} have the same id {example.id!r}; make ids unique."
            )
        seen[example.id] = i
