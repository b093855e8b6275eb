"""Sums over tokens that Kronecker factors are made of: a file a shard, folded into one running file in shard order.

A shard leaves its sums in a part. Parts whose turn it is are added to the running sums, in float64 and one shard after another,
and then removed. The running file says how many shards it holds and takes the place of the one before in a single step, so that
every shard is counted once at every moment: a part of a shard that the file holds is a leftover. Parts that come early
wait. Gradients of drawn labels keep a file a shard to the end, since they are turned once the bases are known.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetrace.atomic import replacing, write_tensors
from finetrace.collection import Block
from finetrace.collection.factor_sizes import both_sides
from finetrace.collection.factors import FactorSums, Labels
from finetrace.errors import FinetraceError
from finetrace.index import shards
from finetrace.index.manifest import Manifest, ShardRecord

FOLDER = "factors"
FORMAT = 3  # 1 and 2 kept the sums of every shard to the end
WIDE = 8  # bytes of an entry of the running sums
OPEN = 64  # parts that are read side by side


def place(folder: Path, labels: Labels) -> Path:
    """Where the sums of an index lie until its factors are finished."""
    return folder / FOLDER / f"{labels}.parts-{FORMAT}"


def part_path(folder: Path, labels: Labels, start: int) -> Path:
    """The sums over the shard that begins at row `start`, until they are folded."""
    return place(folder, labels) / f"part-{start:09d}.safetensors"


def sampled_path(folder: Path, labels: Labels, start: int) -> Path:
    """The gradients of the drawn labels of that shard."""
    return place(folder, labels) / f"sampled-{start:09d}.safetensors"


def together(entry_bytes: int) -> int:
    """How many parts are folded at once: as many as are as large as the running file.

    Folding then writes no more than the shards did: two parts of float32, one of float64.
    """
    return max(1, WIDE // entry_bytes)


def disk(blocks: Sequence[Block], shards_: int, entry_bytes: int, workers: int = 1) -> int:
    """Bytes that the sums take at most until they are finished, without the sampled gradients.

    While parts are folded, there are the running file, the one that takes its place, the parts, and one more for each worker
    beyond the first. A worker that falls far behind the others leaves more of theirs waiting.
    """
    entries = both_sides([block.matrix for block in blocks])
    at_once = together(entry_bytes)
    waiting = min(shards_, at_once + workers - 1)
    return entries * (waiting * entry_bytes + min(2, shards_ // at_once) * WIDE)


def written(blocks: Sequence[Block], shards_: int, entry_bytes: int) -> int:
    """Bytes that each shard's sums have written, its share of folding included."""
    entries = both_sides([block.matrix for block in blocks])
    at_once = together(entry_bytes)
    return entries * (entry_bytes + (WIDE // at_once if shards_ >= at_once else 0))


def write_part(
    folder: Path, sums: FactorSums, sampled: Tensor | None, shard: ShardRecord, about: Manifest, writer: str = ""
) -> None:
    """Keep one shard's sums, and the gradients of its sampled loss; `writer` as in `shards.write`.

    Both files name the shard's checksum, so that they are not taken for those of another shard at the same rows.
    """
    tensors = {f"left.{name}": value.cpu() for name, value in sums.left.items()}
    tensors |= {f"right.{name}": value.cpu() for name, value in sums.right.items()}
    tensors["tokens"] = torch.tensor(list(sums.tokens.values()), dtype=torch.int64)
    where = place(folder, sums.labels)
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{where}: cannot be written ({error}); free some space.") from error
    said = {"shard": shard.sha256}
    if sampled is not None:
        rows = shards.named("sampled", shards.narrowed_rows(sampled, about))
        write_tensors(sampled_path(folder, sums.labels, shard.start), rows, said, writer)
    write_tensors(part_path(folder, sums.labels, shard.start), tensors, said, writer)


class Running:
    """The sums over the first shards of an index, and the parts that wait for their turn; one process has it.

    Attributes:
        count: Shards in the running file.
        end: The row at which the next shard in turn begins.
    """

    def __init__(self, folder: Path, about: Manifest, labels: Labels) -> None:
        """What is there, and no file that cannot be used any more."""
        self.folder, self.labels = folder, labels
        self.path = _running_path(folder, labels)
        self._blocks = [record.block() for record in about.blocks]
        self._at_once = together(about.computed_dtype.itemsize)
        self._waiting: dict[int, ShardRecord] = {}
        self.count, self.end, self._chain = _head(self.path) or (0, 0, "")
        if not self.count:
            self.discard()
        for other in (folder / FOLDER).glob(f"{labels}.parts-*"):
            if other != self.path.parent:
                shutil.rmtree(other, ignore_errors=True)

    def has(self, start: int, rows: int, shard: ShardRecord | None) -> bool:
        """Whether all is there that the factors want of the shard at row `start`, of which `rows` rows have features.

        Of a shard whose own file is lost (`None`) nothing is, but sums that are in the running file already.
        """
        return _has(self.folder, self.labels, self.end, start, rows, shard)

    def agrees(self, records: Sequence[ShardRecord]) -> bool:
        """Whether the running sums are of these shards, as far as can be said: a shard among them may still be missing."""
        return _agrees((self.count, self.end, self._chain), records)

    def discard(self) -> None:
        """Forget what is summed."""
        self.path.unlink(missing_ok=True)
        self.count, self.end, self._chain = 0, 0, ""

    def arrived(self, shard: ShardRecord) -> None:
        """A shard's part is there: fold it with the others whose turn it is, once they are enough."""
        self._waiting[shard.start] = shard
        for start in [start for start in self._waiting if start < self.end]:
            part_path(self.folder, self.labels, start).unlink(missing_ok=True)
            del self._waiting[start]
        while len(turn := self._in_turn()) >= self._at_once:
            self._fold(turn)

    @contextmanager
    def opened(self, rest: Sequence[ShardRecord]) -> Iterator[list[safe_open]]:
        """The running file, where there is one, and then the parts of these shards, open for `total`."""
        paths = [self.path] if self.count else []
        paths += [part_path(self.folder, self.labels, shard.start) for shard in rest]
        with ExitStack() as stack:
            yield [stack.enter_context(safe_open(str(path), framework="pt")) for path in paths]

    def _in_turn(self) -> list[ShardRecord]:
        turn: list[ShardRecord] = []
        end = self.end
        while end in self._waiting and len(turn) < OPEN:
            turn.append(self._waiting[end])
            end = turn[-1].stop
        return turn

    def _fold(self, turn: Sequence[ShardRecord]) -> None:
        """Add these parts, tensor by tensor, so that no more than one is in memory; then they go."""
        count, end, chain = self.count + len(turn), turn[-1].stop, _chained(self._chain, turn)
        said = {"shards": str(count), "end": str(end), "chain": chain}
        sides = {f"{side}.{block.name}": size for block in self._blocks for side, size in _sides(block)}
        layout: dict[str, tuple[str, tuple[int, ...]]] = {"tokens": ("I64", (len(self._blocks),))}
        layout |= {name: ("F64", (size, size)) for name, size in sides.items()}
        with replacing(self.path) as part, self.opened(turn) as files:
            sums = (total(files, name, size) for name, size in sides.items())
            _stream(part, layout, said, (each for group in ([tokens(files)], sums) for each in group))
        self.count, self.end, self._chain = count, end, chain
        for shard in turn:
            part_path(self.folder, self.labels, shard.start).unlink(missing_ok=True)
            del self._waiting[shard.start]


def summed(folder: Path, about: Manifest, labels: Labels) -> list[ShardRecord]:
    """The shards of which all is there that the factors want; nothing is changed."""
    head = _head(_running_path(folder, labels)) or (0, 0, "")
    end = head[1] if _agrees(head, about.shards) else 0
    gone = [each.row for each in about.left_out]

    def rows(shard: ShardRecord) -> int:
        return shard.stop - shard.start - sum(shard.start <= row < shard.stop for row in gone)

    return [shard for shard in about.shards if _has(folder, labels, end, shard.start, rows(shard), shard)]


def total(files: Sequence[safe_open], name: str, size: int) -> Tensor:
    """(size, size) of all files, added in float64 in their order."""
    found = torch.zeros(size, size, dtype=torch.float64)
    for file in files:
        found += file.get_tensor(name)
    return found


def tokens(files: Sequence[safe_open]) -> Tensor:
    """(blocks,) tokens in the sums of all files."""
    return torch.stack([file.get_tensor("tokens") for file in files]).sum(0)


def tidy(folder: Path, labels: Labels) -> None:
    """Remove sums and sampled gradients, which finished factors no longer need."""
    for each in (folder / FOLDER).glob(f"{labels}.parts-*"):
        shutil.rmtree(each, ignore_errors=True)


def _running_path(folder: Path, labels: Labels) -> Path:
    return place(folder, labels) / "running.safetensors"


def _head(path: Path) -> tuple[int, int, str] | None:
    """Of the running file: its shards, the row at which they end, and the checksum of theirs; `None` where it is of no use."""
    try:
        with safe_open(str(path), framework="pt") as file:
            said = file.metadata()
            return int(said["shards"]), int(said["end"]), said["chain"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _agrees(head: tuple[int, int, str], records: Sequence[ShardRecord]) -> bool:
    count, end, chain = head
    first = [shard for shard in records if shard.start < end]
    return len(first) < count or _chained("", first) == chain


def _has(folder: Path, labels: Labels, end: int, start: int, rows: int, shard: ShardRecord | None) -> bool:
    """As `Running.has`, where the running sums go to row `end`."""
    if shard is None:
        return start < end and labels == "data"
    summed = start < end or _said(part_path(folder, labels, start), "tokens", shard) is not None
    if labels == "data" or not summed:
        return summed
    shape = _said(sampled_path(folder, labels, start), "sampled", shard)
    return shape is not None and shape[0] == rows


def _sides(block: Block) -> tuple[tuple[str, int], tuple[str, int]]:
    rows, columns = block.matrix
    return ("left", rows), ("right", columns)


def _chained(chain: str, records: Iterable[ShardRecord]) -> str:
    """A checksum of shards' checksums in their order, which the next ones can be added to."""
    for shard in records:
        chain = hashlib.sha256(f"{chain} {shard.sha256}".encode()).hexdigest()
    return chain


def _said(path: Path, name: str, shard: ShardRecord) -> list[int] | None:
    """The shape of a tensor in a file that is whole and of this very shard."""
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("shard") != shard.sha256:
                return None
            return list(file.get_slice(name).get_shape())
    except (OSError, SafetensorError):
        return None


def _stream(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    said: Mapping[str, str],
    tensors: Iterable[Tensor],
) -> None:
    """A safetensors file of 8-byte entries, written tensor by tensor; `layout`: safetensors' word for the dtype, and shape."""
    header: dict[str, object] = {"__metadata__": dict(said)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + WIDE * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().numpy().data)
