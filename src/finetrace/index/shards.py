"""Shards: safetensors files with the features of consecutive rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetrace import fingerprint
from finetrace.collection import Features
from finetrace.errors import FinetraceError
from finetrace.index.manifest import Manifest, ShardRecord, replacing

FOLDER = "shards"


def write(folder: Path, features: Features, start: int, stop: int) -> ShardRecord:
    """Write the features of rows `start` to `stop` of the data in one step and describe the file.

    It holds a line for every row but those that were left out.
    """
    tensors = {"gradients": features.gradients, "losses": features.losses}
    tensors |= {f"representation.{name}": value for name, value in features.representations.items()}
    name = f"{start:09d}.safetensors"
    path = folder / FOLDER / name
    with replacing(path) as part:
        path.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(part))
    return ShardRecord(
        file=name,
        start=start,
        stop=stop,
        bytes=path.stat().st_size,
        sha256=fingerprint.of_file(path),
    )


class ShardReader:
    """Reads columns of the shards of one index; each file's checksum is compared when it is first opened.

    Rows are counted without those that were left out.
    """

    def __init__(self, folder: Path, about: Manifest, remedy: str | None = None) -> None:
        self.folder = folder / FOLDER
        self.remedy = remedy
        self.shards = about.shards
        gone = [each.row for each in about.left_out]
        self._before = [shard.start - sum(row < shard.start for row in gone) for shard in about.shards]
        self._before.append(about.kept)
        self._mapped: dict[str, Tensor] = {}
        self._checked: set[str] = set()

    def gradients(self, columns: slice, rows: slice) -> Tensor:
        """(rows, columns) of the gradients of all shards, copied into memory."""
        parts = []
        for shard, start, stop in zip(self.shards, self._before, self._before[1:], strict=False):
            first, last = max(rows.start, start), min(rows.stop, stop)
            if first < last:
                parts.append(self._map(shard)[first - start : last - start, columns])
        return torch.cat(parts) if len(parts) != 1 else parts[0].clone()

    def mapped(self) -> Iterator[Tensor]:
        """(rows, D) gradients of one shard after another, mapped and not copied."""
        for shard in self.shards:
            yield self._map(shard)

    def _map(self, shard: ShardRecord) -> Tensor:
        """(rows, D) gradients of one shard, mapped and not read: the system pages in what is touched."""
        if shard.file not in self._mapped:
            with self._open(shard) as file:
                self._mapped[shard.file] = file.get_tensor("gradients")
        return self._mapped[shard.file]

    def tensor(self, name: str) -> Tensor:
        """A tensor that has one row an example, from all shards."""
        parts = []
        for shard in self.shards:
            with self._open(shard) as file:
                parts.append(file.get_tensor(name))
        return torch.cat(parts)

    def _open(self, shard: ShardRecord) -> safe_open:
        path = self.folder / shard.file
        again = f"run finetrace index again on this folder to compute rows {shard.start + 1} to {shard.stop} anew."
        remedy = self.remedy or again
        if not path.is_file():
            raise FinetraceError(f"{path}: this shard is missing; {remedy}")
        try:
            if shard.file not in self._checked:
                if path.stat().st_size != shard.bytes or fingerprint.of_file(path) != shard.sha256:
                    raise FinetraceError(
                        f"{path}: this shard is broken (its checksum differs from the manifest's); {remedy}"
                    )
                self._checked.add(shard.file)
            return safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise FinetraceError(f"{path}: this shard cannot be read ({error}); {remedy}") from error
