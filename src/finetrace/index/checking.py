"""Is an index whole? Every shard's checksum is compared, what is broken is named, and only that is computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from finetrace.collection import Collector, Representation
from finetrace.collection.factors import Labels
from finetrace.errors import FinetraceError
from finetrace.index import adapter_file, factors, manifest, rows, shards
from finetrace.index.appending import settle
from finetrace.index.manifest import ShardRecord
from finetrace.index.store import Index
from finetrace.index.view_folders import headless, remove_view, views_of
from finetrace.index.views import model_of
from finetrace.lock import writing
from finetrace.moments import at_moment

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
    """Look at every file of an index and of its views; an empty list where nothing is broken or missing.

    Shards and factors are compared with their checksums, examples and adapter with their fingerprints. A view that is not
    finished is no damage, since it goes on when a method asks for it.

    Raises:
        FinetraceError: There is no index, or its manifest cannot be read.
    """
    about = manifest.read(folder)
    found = _verify_one(folder, about)
    if not about.complete:
        done = sum(shard.stop - shard.start for shard in about.shards)
        what = f"{folder}: unfinished, {done} of {about.examples} rows are there."
        found.append(Damage(folder, folder / manifest.NAME, "unfinished", what))
    if (wrong := adapter_file.fault(folder, about)) is not None:
        found.append(Damage(folder, wrong[0], "adapter", wrong[1]))
    for view in views_of(folder):
        if not (view / manifest.NAME).exists():
            if headless(view):
                what = f"{view / manifest.NAME}: missing, so the whole view is of no use."
                found.append(Damage(view, view / manifest.NAME, "manifest", what))
            continue  # else begun and not far enough to be told from nothing
        try:
            there = manifest.read(view)
            found += _verify_one(view, there)
            if there.examples != about.kept:
                what = f"{view}: of {there.examples} rows, and the index has {about.kept}."
                found.append(Damage(view, view / manifest.NAME, "manifest", what))
        except FinetraceError as error:
            found.append(Damage(view, view / manifest.NAME, "manifest", str(error)))
    return found


def _verify_one(folder: Path, about: manifest.Manifest) -> list[Damage]:
    """What an index and a view have in common: shards, examples and factors."""
    found = []
    for shard in about.shards:
        if not shards.whole(folder, shard):
            path = folder / shards.FOLDER / shard.file
            state = "its checksum differs from the manifest's" if path.exists() else "missing"
            what = f"{path}: {state} (rows {shard.start + 1} to {shard.stop})."
            found.append(Damage(folder, path, "shard", what))
    try:
        rows.read(folder, about)
    except FinetraceError as error:
        broken = next((name for name, _, _ in rows.parts(about) if f"{folder / name}: " in str(error)), rows.NAME)
        found.append(Damage(folder, folder / broken, "examples", str(error)))
    for labels in get_args(Labels):
        path = factors.path(folder, labels)  # named by its labels
        if path.exists() or path.with_suffix(".json").exists():
            try:
                factors.read(folder, about, labels)
            except FinetraceError as error:
                found.append(Damage(folder, path, "factors", str(error)))
    return found


def repair(
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> list[Damage]:
    """Compute again what `verify` finds broken and the index itself can make; what is left is returned.

    Shards are collected anew by the index's own model. On the machine and with the versions that made them they have the
    bytes that they had; where they have not, this is said, the manifest takes over their checksums, and factors of the old
    gradients go. Broken factors, and views whose examples or manifest are broken, are removed: a method that asks for them
    has them computed. Broken examples or a broken adapter of the index need `finetrace index` with the data and the adapter.
    The manifest stands as it is until all shards are there, so that a repair that was killed can be started again.

    Args:
        folder: The index.
        say: Hears what is done.
        device, device_map: Where the model goes, as in `ModelSpec`.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        FinetraceError: There is no index, the model cannot be loaded, or another process is writing to the index or a
            broken view of it.
    """
    manifest.read(folder)
    with writing(folder):
        settle(folder, say)
        damage = verify(folder)
        for home in dict.fromkeys(each.folder for each in damage):
            with nullcontext() if home == folder or home.is_symlink() else writing(home):
                _mend(folder, home, [each for each in damage if each.folder == home], say)
        if any(each.kind in ("examples", "adapter", "unfinished") for each in damage if each.folder == folder):
            return verify(folder)  # without them nothing can be collected
        root = Index(folder)
        broken = list(dict.fromkeys(each.folder for each in damage if each.kind == "shard" and each.folder.exists()))
        if broken:
            root.model(None, device, trust_remote_code, device_map)
        for home in broken:
            if home != folder and not Index.finished(home):
                say(f"{home}: removed, since it was not finished; collected when a method asks for it")
                remove_view(home)
                continue
            names = {each.path.name for each in damage if (each.folder, each.kind) == (home, "shard")}
            with nullcontext() if home == folder else writing(home):
                _collect_again(root if home == folder else Index(home, parent=root), names, say)
        return verify(folder)


def _mend(root: Path, home: Path, damage: Sequence[Damage], say: Callable[[str], None]) -> None:
    """Remove what is made again when a method asks for it: of a view everything, of an index its factors."""
    if home != root and any(each.kind in ("examples", "manifest") for each in damage):
        say(f"{home}: removed; collected again when a method asks for it")
        remove_view(home)
        return
    for each in damage:
        if each.kind == "factors" and factors.remove(each.folder, each.path.stem):  # type: ignore[arg-type]
            say(f"{each.path}: removed; computed again when a method asks for them")


def _collect_again(index: Index, names: Collection[str], say: Callable[[str], None]) -> None:
    """The shards of these names of one index or view; the manifest is changed at the end, and only if it has to be."""
    about = index.manifest
    broken = [shard for shard in about.shards if shard.file in names]
    say(f"{index.folder}: collecting {len(broken)} of {len(about.shards)} shards again")
    loaded = model_of(index)
    wanted = tuple(map(Representation.parse, about.representations))
    collector = Collector(loaded.model, about.track(loaded.model), wanted, about.batch_tokens)
    ids, encoded = index.all_rows.ids, index.all_rows.encoded
    gone = {each.row: each.reason for each in about.left_out}
    fresh: dict[str, ShardRecord] = {}
    with at_moment(loaded.model, about.model.at):
        for shard in broken:
            start, stop = shard.start, shard.stop
            known = {row - start: gone[row] for row in range(start, stop) if row in gone}
            features = collector.collect(encoded[start:stop], ids[start:stop], first=start, left_out=known)
            fresh[shard.file] = shards.write(index.folder, features, start, stop, about)
    if all(fresh[shard.file] == shard for shard in broken):
        return
    say(
        f"{index.folder}: not bit by bit what was there (another machine, or other versions); the manifest has the new "
        "checksums, and factors of the old gradients are removed"
    )
    for labels in get_args(Labels):
        factors.remove(index.folder, labels)
    records = tuple(fresh.get(shard.file, shard) for shard in about.shards)
    manifest.write(index.folder, about.model_copy(update={"shards": records}))
