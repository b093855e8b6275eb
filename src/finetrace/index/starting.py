"""Starting an index, or finding the one that a run before left: its manifest, its examples, its adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetrace import arithmetic, fingerprint
from finetrace.atomic import write_atomically
from finetrace.encoding import Encoded
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.finetune_config import SAVED
from finetrace.index import adapter_file, manifest, rows, shards
from finetrace.index.manifest import Manifest
from finetrace.index.view_folders import headless, remove_view, views_of
from finetrace.models import Loaded, save_adapter

# where the model and its adapter lie may differ, and what was left out of it follows from the rest
MAY_DIFFER = ("shards", "lost", "left_out", "appended", "skipped", "finetrace", "model.name", "model.adapter")


def refuse_taken(folder: Path, plan: Manifest) -> None:
    """Stop where the folder holds another index than `plan` begins, or something else; nothing is made or written."""
    try:
        begun = _begun(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if begun:
        _refuse_other(folder, manifest.read(folder), plan)


def make_folder(folder: Path) -> None:
    """Make the folder; one that holds something else than an index, finished or not, is refused."""
    try:
        if not _begun(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _begun(folder: Path) -> bool:
    """Whether there is an index, finished or not; something else is refused."""
    if (folder / manifest.NAME).exists():
        return True
    if folder.exists() and (not folder.is_dir() or headless(folder)):
        raise FinetraceError(f"{folder}: there is something else already; choose another --out or empty the folder.")
    return False


def _unwritable(folder: Path, error: OSError) -> FinetraceError:
    return FinetraceError(f"{folder}: cannot be written ({error}); free some space or choose another folder.")


def start(
    folder: Path,
    plan: Manifest,
    loaded: Loaded,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    need: int,
) -> Manifest:
    """A new index up to its first shard, or the one that is there with the shards that are whole.

    The manifest comes first, so that a run killed at any moment leaves something that the next one knows. `plan` is the
    manifest wanted, and `need` the bytes that a new index will take.

    Raises:
        FinetraceError: The index that is there is another one, or the disk is too small.
    """
    if (folder / manifest.NAME).exists():
        there = manifest.read(folder)
        _refuse_other(folder, there, plan)
        whole = tuple(shard for shard in there.shards if shards.whole(folder, shard))
        sound = {shard.start for shard in whole}
        lost = {shard.start: shard for shard in (*there.lost, *there.shards) if shard.start not in sound}
        # the base has the same fingerprint, wherever it lies now
        model = there.model.model_copy(update={"name": plan.model.name})
        started = there.model_copy(update={"shards": whole, "lost": tuple(lost.values()), "model": model})
        if there.model.name != plan.model.name:
            manifest.write(folder, there.model_copy(update={"model": model}))
        if not started.shards or not _furnished(folder, started):
            _furnish(folder, started, loaded, examples, encoded)
        elif (known := rows.read(folder, there).examples) != tuple(examples):  # of the same tokens: labels or metadata
            if fingerprint.texts_and_weights(known) != fingerprint.texts_and_weights(examples):
                _remove_views_of_other_tokens(folder, there)
            rows.write(folder, there, examples, encoded)
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


def _remove_views_of_other_tokens(folder: Path, about: Manifest) -> None:
    """Those whose loss is not on the index's own tokens, for which changed metadata may count; they are collected again."""
    for view in views_of(folder):
        with suppress(FinetraceError):
            if manifest.read(view).encoding.loss_on == about.encoding.loss_on:
                continue
        remove_view(view)


def _furnish(
    folder: Path, started: Manifest, loaded: Loaded, examples: Sequence[Example], encoded: Sequence[Encoded]
) -> None:
    """Write what an index holds besides its shards: the examples and the adapter."""
    rows.write(folder, started, examples, encoded)
    if started.model.adapter is not None:
        try:
            saved = Path(loaded.spec.adapter or "") / SAVED
            if loaded.spec.adapter and saved.is_file():  # how it was fine-tuned, for retraining; here already, perhaps
                (folder / started.model.adapter).mkdir(parents=True, exist_ok=True)
                write_atomically(folder / started.model.adapter / SAVED, saved.read_bytes())
            save_adapter(loaded.model, folder / "adapter")
        except (OSError, SafetensorError) as error:
            raise FinetraceError(
                f"{folder}: the adapter cannot be written ({error}); free some space or choose another folder."
            ) from error


def _furnished(folder: Path, started: Manifest) -> bool:
    """Whether the examples and the adapter of an index are there and whole."""
    if adapter_file.fault(folder, started) is not None:
        return False
    try:
        rows.read(folder, started)
    except FinetraceError:
        return False
    return True


def _refuse_other(folder: Path, there: Manifest, plan: Manifest) -> None:
    """Say which part of the configuration differs from the index that is already there."""
    names = {
        "model.base_fingerprint": "base model",
        "model.adapter_fingerprint": "adapter",
        "model.scaling_fingerprint": fingerprint.SCALING,
        "model.embeddings_fingerprint": fingerprint.EMBEDDINGS,
        "model.tokenizer_fingerprint": "tokenizer or chat template",
        "data_fingerprint": "data set or encoding",
    }
    was, now = _flat(there.model_dump(mode="json")), _flat(plan.model_dump(mode="json"))
    later = ("scaling_fingerprint", "embeddings_fingerprint")  # that an index of before they were noted does not say
    unsaid = tuple(f"model.{name}" for name in later if None in (getattr(there.model, name), getattr(plan.model, name)))
    if other := arithmetic.apart(there.model.settings or {}, plan.model.settings or {}):
        raise FinetraceError(
            f"{folder}: an index of another {arithmetic.NAME} is there, {other}; choose another --out or remove the folder."
        )
    for key in now:
        if key not in (*MAY_DIFFER, *unsaid, "model.settings") and was.get(key) != now[key]:
            if key == "representations":
                old, new = (", ".join(each.get(key) or ["none"]) for each in (was, now))
                what = f"set of hidden states ({old}, not {new})"
            else:
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
