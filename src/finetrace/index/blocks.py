"""Blocks of consecutive rows, read ahead into two buffers that are used again: memory does not grow with the index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetrace.errors import FinetraceError
from finetrace.index.manifest import ShardRecord
from finetrace.index.shards import ShardReader

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TENSOR = "gradients"


class RowBlocks:
    """(rows, columns) pieces of an index's gradients, in the order of the rows and in the dtype in which they are stored.

    What is stored in float16 has exponents beside it, and comes in the dtype in which it was computed.

    A thread reads the next block while the present one is used. Shards are read, not mapped, so that their pages do not
    count as this process's memory. Block boundaries depend on `rows` alone, not on the shards.

    Attributes:
        rows: Rows a block; the last one may have fewer.
        columns: Which columns of the stored rows.
        dtype: As stored.
    """

    def __init__(self, reader: ShardReader, rows: int, columns: slice) -> None:
        self.rows = rows
        self.columns = columns
        self._reader = reader
        self._places = [_Place(reader, shard, first, last) for shard, first, last in reader.places()]
        stored = self._places[0].dtype
        self._stored = stored
        self.dtype = reader.dtype if stored == torch.float16 else stored
        for place in self._places:
            if (place.dtype, place.width) != (stored, self._places[0].width):
                raise FinetraceError(
                    f"{place.path}: this shard's gradients have another shape or dtype than the first one's; build the "
                    "index again."
                )

    @property
    def n(self) -> int:
        """Rows of the index."""
        return self._places[-1].stop

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, block): the block is overwritten when others are asked for, so it must not be kept."""
        width = self.columns.stop - self.columns.start
        itemsize = self._stored.itemsize
        wide = torch.empty(0 if self.dtype == self._stored else min(self.rows, self.n), width, dtype=self.dtype)
        buffers = [np.empty(min(self.rows, self.n) * width * itemsize, np.uint8) for _ in range(2)]
        wanted = [slice(start, min(start + self.rows, self.n)) for start in range(0, self.n, self.rows)]
        with ThreadPoolExecutor(1, thread_name_prefix="rows") as thread, _Open() as files:
            coming = thread.submit(self._fill, files, buffers[0], wanted[0])
            for i, where in enumerate(wanted):
                coming.result()
                if i + 1 < len(wanted):
                    coming = thread.submit(self._fill, files, buffers[(i + 1) % 2], wanted[i + 1])
                count = where.stop - where.start
                raw = torch.from_numpy(buffers[i % 2][: count * width * itemsize])
                block = raw.view(self._stored).view(count, width)
                yield where, block if self.dtype == self._stored else self._scaled(wide[:count].copy_(block), where)

    def _scaled(self, block: Tensor, where: slice) -> Tensor:
        """The block multiplied by the exponents of its rows."""
        for place in self._places:
            first, last = max(where.start, place.start), min(where.stop, place.stop)
            if first < last:
                part, rows = (
                    block[first - where.start : last - where.start],
                    slice(first - place.start, last - place.start),
                )
                self._reader.scale(place.shard, part, rows, self.columns.start)
        return block

    def _fill(self, files: _Open, buffer: NDArray[np.uint8], where: slice) -> None:
        """Read rows `where` into the buffer."""
        itemsize = self._stored.itemsize
        room = (self.columns.stop - self.columns.start) * itemsize  # bytes of a row that are wanted
        view, filled = memoryview(buffer), 0  # type: ignore[arg-type]
        for place in self._places:
            first, last = max(where.start, place.start), min(where.stop, place.stop)
            if first >= last:
                continue
            row = place.width * itemsize
            begin = place.offset + (first - place.start) * row + self.columns.start * itemsize
            if room == row:
                files.read(place.path, begin, view[filled : filled + (last - first) * row])
            else:
                for k in range(last - first):
                    files.read(place.path, begin + k * row, view[filled + k * room : filled + (k + 1) * room])
            filled += (last - first) * room


class _Place:
    """Where the gradients of one shard, rows `start` to `stop`, lie in its file, from the header that safetensors writes."""

    def __init__(self, reader: ShardReader, shard: ShardRecord, start: int, stop: int) -> None:
        self.shard, self.start, self.stop = shard, start, stop
        self.path = reader.checked(shard)
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                about = json.loads(file.read(length))[TENSOR]
            self.dtype = DTYPES[about["dtype"]]
            rows, self.width = about["shape"]
            self.offset = 8 + length + int(about["data_offsets"][0])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FinetraceError(f"{self.path}: this shard's gradients cannot be found ({error!r}).") from error
        if rows != stop - start:
            raise FinetraceError(f"{self.path}: this shard has {rows} rows, not those that the manifest names.")


class _Open:
    """The one file that is being read."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, path: Path, offset: int, into: memoryview) -> None:
        """Fill `into` from the file's bytes at `offset`."""
        try:
            if path != self._path or self._file is None:
                self.__exit__()
                self._file = path.open("rb", buffering=0)
                self._path = path
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._file.seek(offset)
            done = 0
            while done < len(into):
                got = self._file.readinto(into[done:])  # type: ignore[attr-defined]
                if not got:
                    raise FinetraceError(f"{path}: this shard ends before its rows do; build the index again.")
                done += got
        except OSError as error:
            raise FinetraceError(f"{path}: this shard cannot be read ({error}).") from error
