"""Is an index whole? Every checksum is compared, what is broken is named, and only that is computed again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError, safe_open

from finetrace.collection import Collector, Representation, track
from finetrace.collection.factors import Labels
from finetrace.errors import FinetraceError
from finetrace.index import factors, manifest, rows, shards
from finetrace.index.build import collect_shards, whole
from finetrace.index.lock import writing
from finetrace.index.store import Index
from finetrace.index.views import FOLDER as VIEWS
from finetrace.index.views import model_of

Kind = Literal["unfinished", "manifest", "examples", "adapter", "shard", "factors"]


@dataclass(frozen=True)
class Damage:
    """Something that is not as the manifest says.

    Attributes:
        folder: The index, or the view of it, that it belongs to.
        path: The file.
        kind: What it is.
        what: One sentence.
    """

    folder: Path
    path: Path
    kind: Kind
    what: str


def verify(folder: Path) -> list[Damage]:
    """Compare every file of an index and its views with its checksum; an empty list where all are whole.

    The adapter's tensors are read; that they are those of the index is checked whenever its model is loaded.

    Raises:
        FinetraceError: There is no index, or its manifest cannot be read.
    """
    found = _verify_one(folder, manifest.read(folder))
    for view in sorted(path for path in (folder / VIEWS).glob("*") if path.is_dir()):
        try:
            found += _verify_one(view, manifest.read(view))
        except FinetraceError as error:
            found.append(Damage(view, view / manifest.NAME, "manifest", str(error)))
    return found


def _verify_one(folder: Path, about: manifest.Manifest) -> list[Damage]:
    found = []
    if not about.complete:
        done = sum(shard.stop - shard.start for shard in about.shards)
        what = f"{folder}: unfinished, {done} of {about.examples} rows are there."
        found.append(Damage(folder, folder / manifest.NAME, "unfinished", what))
    for shard in about.shards:
        if not whole(folder, shard):
            path = folder / shards.FOLDER / shard.file
            state = "its checksum differs from the manifest's" if path.exists() else "missing"
            what = f"{path}: {state} (rows {shard.start + 1} to {shard.stop})."
            found.append(Damage(folder, path, "shard", what))
    try:
        rows.read(folder, about.data_fingerprint)
    except FinetraceError as error:
        found.append(Damage(folder, folder / rows.NAME, "examples", str(error)))
    if about.model.adapter is not None and folder.parent.name != VIEWS:
        path = folder / about.model.adapter / "adapter_model.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            found.append(Damage(folder, path, "adapter", f"{path}: cannot be read ({error})."))
    for labels in get_args(Labels):
        if factors.path(folder, labels).exists():
            try:
                factors.read(folder, about, labels)
            except FinetraceError as error:
                found.append(Damage(folder, factors.path(folder, labels), "factors", str(error)))
    return found


def repair(folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Damage]:
    """Compute again what `verify` finds broken and the index itself can make; what is left is returned.

    Shards are collected anew by the index's own model and end with the bytes they had. Broken factors, and views whose
    examples or manifest are broken, are removed: a method that asks for them has them computed. Broken examples or an
    adapter need `finetrace index` with the data and the adapter.

    Args:
        folder: The index.
        say: Hears what is done.

    Raises:
        FinetraceError: There is no index, the model cannot be loaded, or another process is writing there.
    """
    damage = verify(folder)
    if not damage:
        return []
    with writing(folder):
        for each in damage:
            view = each.folder != folder
            if each.kind == "factors":
                say(f"{each.path}: removed; computed again when a method asks for them")
                each.path.unlink()
                each.path.with_suffix(".json").unlink(missing_ok=True)
            elif view and each.kind != "shard" and each.folder.exists():
                say(f"{each.folder}: removed; collected again when a method asks for it")
                shutil.rmtree(each.folder)
        lost = {each.kind for each in damage if each.folder == folder} & {"examples", "adapter", "unfinished"}
        broken = dict.fromkeys(each.folder for each in damage if each.kind == "shard" and each.folder.exists())
        if broken and not lost:
            root = Index(folder)
            for home in broken:
                with nullcontext() if home == folder else writing(home):
                    _collect_again(root if home == folder else Index(home, parent=root), say)
    return verify(folder)


def _collect_again(index: Index, say: Callable[[str], None]) -> None:
    """The shards of one index or view that are not whole."""
    about = index.manifest
    good = tuple(shard for shard in about.shards if whole(index.folder, shard))
    say(f"{index.folder}: collecting {len(about.shards) - len(good)} of {len(about.shards)} shards again")
    loaded = model_of(index)
    wanted = tuple(map(Representation.parse, about.representations))
    collector = Collector(loaded.model, track(loaded.model, about.modules), wanted, about.batch_tokens)
    started = about.model_copy(update={"shards": good})
    collect_shards(index.folder, started, collector, index.rows.examples, index.rows.encoded, None)
