"""More rows for a finished index: collected beside it in `append/`, and taken over in one step.

Until that step, the new manifest, the index answers as before; a run that is killed at any moment is finished by the same
command. Nothing that was there is touched: new rows begin new shards, and their examples have a file of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from finetrace import fingerprint
from finetrace.atomic import replacing
from finetrace.collection import Representation
from finetrace.collection.factors import Labels
from finetrace.encoding import Encoded, LengthReport
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index import factors, manifest, rows, shards
from finetrace.index.build import build_index, refuse_duplicates
from finetrace.index.manifest import AppendRecord, Manifest
from finetrace.index.settings import settings
from finetrace.index.store import Index
from finetrace.index.view_folders import remove_view, sweep_views, views_of
from finetrace.index.views import model_of
from finetrace.lock import writing

FOLDER = "append"
DONE = ".append.done"  # its name while it is removed


def append(
    index: Index,
    examples: Sequence[Example],
    *,
    skip_known: bool = False,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda text: None,
    engine: Engine = Engine(),
) -> tuple[Index, LengthReport]:
    """Add rows to an index, by its own model, adapter, encoding and settings.

    The values are those of an index built at once on the old rows and the new ones, bit by bit if the old rows fill their last
    shard, and otherwise up to rounding, since new rows then travel in other batches. Kronecker factors and views of the old
    rows are removed: they are made again, of all rows, when a method asks for them.

    Args:
        index: A finished index.
        examples: Rows with a response. Rows that were appended before, just these in this order, are there already.
        skip_known: Leave out rows whose ids the index holds, in place of refusing them.
        skip_bad: As in `build_index`.
        say: Hears what was done otherwise than asked, and what was removed.
        engine: Where the new rows' shards are collected.

    Returns:
        The index with the new rows, and which of these are longer than the limits.

    Raises:
        FinetraceError: An id is there already, an append of other rows was begun, the index is being written, or the model
            is not the index's own.
    """
    folder, loaded = index.folder, model_of(index)
    refuse_duplicates(examples)
    nothing = LengthReport(index.manifest.encoding.max_length, False, ())
    with writing(folder):
        settle(folder, say)
        about = manifest.read(folder)
        if about != index.manifest:
            raise FinetraceError(f"{folder}: another process has changed this index meanwhile; start again.")
        encoder = index.encoder()
        if fingerprint.of_data([each.id for each in examples], encoder.encode_all(examples)[0]) in (
            part.data_fingerprint for part in about.appended
        ):
            say(f"these {len(examples)} rows were appended before; nothing is to be done.")
            return index, nothing
        fresh = _unknown(index, examples, skip_known, say)
        if not fresh:
            say("nothing is to be done.")
            return index, nothing
        encoded = encoder.encode_all(fresh)[0]
        staged = folder / FOLDER
        _refuse_another(staged, fingerprint.of_data([each.id for each in fresh], encoded))
        try:
            _, lengths = build_index(
                loaded,
                fresh,
                staged,
                encoder,
                **settings(about),
                representations=tuple(map(Representation.parse, about.representations)),
                rows_per_shard=about.rows_per_shard,
                at=about.model.at,
                skip_bad=skip_bad,
                say=say,
                engine=engine,
            )
        except FinetraceError as error:
            if not _left_out_all(staged):
                raise
            staged.rename(folder / DONE)  # or no other rows could be appended
            settle(folder)
            raise FinetraceError(
                f"{folder}: the values of all {len(fresh)} new rows are not finite, so none is added; look at the rows, "
                "or give others."
            ) from error
        _take_over(index, manifest.read(staged), fresh, encoded)
        settle(folder, say)
    return Index(folder, loaded), lengths


def _unknown(index: Index, examples: Sequence[Example], skip: bool, say: Callable[[str], None]) -> list[Example]:
    """The rows whose ids the index does not hold."""
    there = set(index.all_rows.ids)
    known = [each.id for each in examples if each.id in there]
    if known and not skip:
        raise FinetraceError(
            f"{index.folder}: it holds {len(known)} of these {len(examples)} ids already, the first {known[0]!r}; make ids "
            "unique, or leave such rows out with --skip-known."
        )
    if known:
        say(
            f"{len(known)} of {len(examples)} rows are left out, since the index holds their ids; the first is {known[0]!r}."
        )
    return [each for each in examples if each.id not in there]


def _refuse_another(staged: Path, data_fingerprint: str) -> None:
    if (staged / manifest.NAME).exists() and manifest.read(staged).data_fingerprint != data_fingerprint:
        raise FinetraceError(
            f"{staged}: an append of other rows was begun and is not finished; give those rows again, or remove this folder "
            "to give them up."
        )


def _left_out_all(staged: Path) -> bool:
    """Whether all new rows were gone through and none has features."""
    if not (staged / manifest.NAME).exists():
        return False
    there = manifest.read(staged)
    return there.complete and not there.kept


def _take_over(index: Index, new: Manifest, fresh: Sequence[Example], encoded: Sequence[Encoded]) -> None:
    """Put the new files beside the old ones, and then name them in the manifest, which is the step that counts."""
    folder, about = index.folder, index.manifest
    same = ("model", "encoding", "feature_dtype", "projection", "projection_seed", "blocks", "representations")
    moved_base = new.model_copy(update={"model": new.model.model_copy(update={"name": about.model.name})})
    for name in same:  # a base under another name has the same fingerprint
        if getattr(moved_base, name) != getattr(about, name):
            raise FinetraceError(
                f"{folder}: its {name} is not that of the new rows, so they cannot be put together; build the index again."
            )
    offset = about.examples
    records = []
    for shard in new.shards:
        name = f"{offset + shard.start:09d}.safetensors"
        _link(folder / FOLDER / shards.FOLDER / shard.file, folder / shards.FOLDER / name)
        moved = {"file": name, "start": offset + shard.start, "stop": offset + shard.stop}
        records.append(shard.model_copy(update=moved))
    part = AppendRecord(start=offset, examples=f"examples-{offset:09d}.parquet", data_fingerprint=new.data_fingerprint)
    _link(folder / FOLDER / rows.NAME, folder / part.examples)
    gone = [each.model_copy(update={"row": offset + each.row}) for each in new.left_out]
    ids = [*index.all_rows.ids, *(each.id for each in fresh)]
    update = {
        "examples": offset + new.examples,
        "tokens": about.tokens + new.tokens,
        "data_fingerprint": fingerprint.of_data(ids, [*index.all_rows.encoded, *encoded]),
        "shards": (*about.shards, *records),
        "left_out": (*about.left_out, *gone),
        "appended": (*about.appended, part),
    }
    manifest.write(folder, about.model_copy(update=update))


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    with replacing(target) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


def settle(folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Bring an append to its end whose rows are in the manifest: what hangs on the old rows goes, and so does `append/`.

    The caller has the lock. An append that is not that far is left as it is. A journal goes into the manifest.
    """
    manifest.fold(folder)
    about, staged = manifest.read(folder), folder / FOLDER
    shutil.rmtree(folder / DONE, ignore_errors=True)
    sweep_views(folder)
    if not (staged / manifest.NAME).exists():
        return
    if manifest.read(staged).data_fingerprint not in [part.data_fingerprint for part in about.appended]:
        return
    for labels in get_args(Labels):
        if factors.outdated(folder, about, labels) and factors.remove(folder, labels):
            say(f"{factors.path(folder, labels)}: removed; fitted on all rows when a method asks for them")
    for view in views_of(folder):
        with nullcontext() if view.is_symlink() else writing(view):
            remove_view(view)
        say(f"{view}: removed; collected for all rows when a method asks for it")
    staged.rename(folder / DONE)
    shutil.rmtree(folder / DONE, ignore_errors=True)
