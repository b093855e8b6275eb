"""What scoring computes of an index's own rows, kept beside it: safetensors under `cache/`, which may be removed at any time.

A name is the hash of everything that a value depends on, so a value of other data, blocks or damping is never found. Files
are written under a name of their own and renamed, so that several processes may read and write at once; what cannot be
read, or whose checksum differs, is computed again, and what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from finetrace._version import __version__
from finetrace.collection import Block
from finetrace.index.manifest import Manifest
from finetrace.index.view_folders import root_of, views_of

FOLDER = "cache"
FORMAT = "4"
LIMIT = 2 << 30  # bytes
HEADER = 512  # bytes of a file's header at most, beside
NAMED = 256  # those for each of its tensors
STALE = 3600.0  # seconds after which a file that was never finished is removed
ROWS = "rows"  # in the name of files that are left mapped
OURS = re.compile(
    r".+-[0-9a-f]{32}\.safetensors"
)  # what is kept, and what of it was never finished: no others are removed,
PART = re.compile(
    r"\.[0-9a-f]{32}\.part"
)  # since somebody may have put a link to a folder of theirs in this one's place

_compared: dict[Path, tuple[int, int, int]] = {}  # files whose checksum this process compared, as they were then


class Cache:
    """The cache of one index, or of one view of it.

    Attributes:
        folder: Where it lies.
        limit: Bytes that the index's cache and those of its views may take together; what was used longest ago goes first. What
            this object itself, or one beside it, has read or written stays: where the values of one query are more than the
            limit, taking turns would keep none of them.
    """

    def __init__(self, index: Path, manifest: Manifest, limit: int = LIMIT, beside: Cache | None = None) -> None:
        """`beside` is the cache of the index, or of another of its views, that the same queries are asked of."""
        self.folder = index / FOLDER
        self.limit = limit
        self._root = root_of(index)
        self._needed: set[Path] = beside._needed if beside is not None else set()
        self._refused = False  # the disk took no rows
        shards = [(shard.start, shard.stop, shard.sha256) for shard in manifest.shards]
        about = [FORMAT, __version__, manifest.data_fingerprint, manifest.feature_dtype, shards]
        self._about = json.dumps(about)

    def fetch(self, name: str, blocks: Sequence[Block], make: Callable[[], Tensor], **depends: Any) -> Tensor:
        """The tensor kept as `name` of some blocks and whatever else it `depends` on, made and kept if it is not there."""
        return self.fetch_all(name, blocks, lambda: {"value": make()}, **depends)["value"]

    def fetch_all(
        self, name: str, blocks: Sequence[Block], make: Callable[[], Mapping[str, Tensor]], **depends: Any
    ) -> dict[str, Tensor]:
        """The same for several tensors that are made together."""
        path = self._path(name, blocks, depends)
        found = self._read(path)
        if found is not None:
            return found
        made = dict(make())
        self._write(path, made)
        return made

    def fetch_rows(
        self, name: str, blocks: Sequence[Block], make: Callable[[], Tensor], size: int, **depends: Any
    ) -> Tensor | None:
        """A tensor of `size` bytes, about as many as the gradients have, mapped where it is kept.

        `None` where it cannot be kept: it takes longer to make than to do without.
        """
        path = self._path(name, blocks, depends)
        found = self._read(path, mapped=True)
        if found is None and not self._refused and self._ready(size + HEADER + NAMED):
            self._write(path, {ROWS: make()})
            found = self._read(path, mapped=True)
            self._refused = found is None
        return None if found is None else found[ROWS]

    def _path(self, name: str, blocks: Sequence[Block], depends: Mapping[str, Any]) -> Path:
        key = json.dumps([self._about, name, [(b.name, b.shape, b.offset) for b in blocks], depends], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, path: Path, *, mapped: bool = False) -> dict[str, Tensor] | None:
        """The tensors of a file; `None` where it is not there, or not what was written.

        Its checksum is compared when this process first reads it, and again once it is another file. They are copied, since on
        shared storage another machine may remove the file, or left `mapped`: such a file stays for a while (`_make_room`).
        """
        try:
            before = _identity(path)
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") == FORMAT and (
                _compared.get(path) == before or about.get("xxh3") == _checksum(tensors)
            ):
                self._used(path, before)
                self._needed.add(path)
                return tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
        except (
            OSError,
            SafetensorError,
            ValueError,
            TypeError,
            RuntimeError,
        ):  # the last where another process removes it
            pass
        return None

    def _used(self, path: Path, compared: tuple[int, int, int]) -> None:
        """Note the time, finer than the system writes it, where this user may; and that this file was compared."""
        with contextlib.suppress(OSError):
            if _identity(path) != compared:  # another process has read it, or written it anew
                return
            _compared[path] = compared
            os.utime(path, ns=(time.time_ns(),) * 2)
            _compared[path] = _identity(path)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Keep them, if there is room and the folder can be written."""
        size = HEADER + sum(NAMED + tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if not self._ready(size):
            return
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            arrays = {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
            part.write_bytes(save(arrays, metadata={"format": FORMAT, "xxh3": _checksum(tensors)}))
            part.replace(path)
            self._needed.add(path)
        except (OSError, SafetensorError):
            pass
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _ready(self, size: int) -> bool:
        """Whether a file of so many bytes may be written; room is made for it."""
        if size > self.limit // 2:
            return False
        try:
            self.folder.mkdir(exist_ok=True)
            return os.access(self.folder, os.W_OK) and self._make_room(size)
        except OSError:
            return False

    def _make_room(self, size: int) -> bool:
        """Remove what was used longest ago until `size` more bytes fit, and what a killed process left.

        Nothing is removed where that would not do: what is needed now stays, and for an hour what others may have mapped.
        """
        taken, files = 0, []
        for path in self._files():
            with contextlib.suppress(OSError):  # another process may have removed it
                about = path.stat()
                if PART.fullmatch(path.name) and time.time() - about.st_mtime > STALE:
                    path.unlink()
                elif OURS.fullmatch(path.name):
                    taken += about.st_size
                    mapped = ROWS in path.name and time.time() - about.st_mtime < STALE
                    if path not in self._needed and not mapped:
                        files.append((about.st_mtime, about.st_size, path))
        excess = taken + size - self.limit
        if excess > sum(bytes_ for _, bytes_, _ in files):
            return False
        for _, bytes_, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                excess -= bytes_
        return True

    def _files(self) -> Iterator[Path]:
        """What lies in the caches of the index and its views."""
        for home in (self._root, *views_of(self._root)):
            with contextlib.suppress(OSError):  # there is none, or another process removes it
                yield from (home / FOLDER).iterdir()


def _identity(path: Path) -> tuple[int, int, int]:
    """Inode, bytes and time of change: of a file that nobody wrote since, the same."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values, for what depends on it."""
    found = hashlib.sha256()
    _feed(found, {"value": tensor})
    return found.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """XXH3 of 128 bits, which notices accidents as SHA-256 does and is much faster."""
    found = xxhash.xxh3_128()
    _feed(found, tensors)
    return found.hexdigest()


def _feed(hasher: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)) if tensor.numel() else b"")  # type: ignore[arg-type]
