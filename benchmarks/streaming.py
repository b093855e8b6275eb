"""Queries against a large index: python benchmarks/streaming.py dot|exact|stream [--rounds 5].

dot: one dot-product query batch against one matmul on the same arrays. exact: `exact` by block against the matrix products
that it needs. stream: 10^6 rows of 1,024 bfloat16 entries within 512 MB, against numpy reading the same bytes. Everything is
random numbers; ratios are of times within one run, and medians of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from finetrace.attribution import Problem, make
from finetrace.attribution.ranked import Strongest
from finetrace.attribution.stored_rows import StoredRows
from finetrace.attribution.streamed_gradient import StreamedMethod
from finetrace.attribution.streaming import all_blocks
from finetrace.collection import Features
from finetrace.examples import Example
from finetrace.index import Index, manifest
from finetrace.index.manifest import BlockRecord, Manifest, ShardRecord
from finetrace.planning.measure import peak_memory
from scoring import block_records, random_features, write_index


def queries(count: int) -> list[Example]:
    """Any text; their gradients are given."""
    return [Example.from_prompt("red green one", "two three", id=f"q{i}", label="ab"[i % 2]) for i in range(count)]


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(name: str, pairs: list[tuple[float, float]]) -> None:
    """Medians of both times and of their ratio."""
    a, b = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratios = sorted(x / y for x, y in pairs)
    print(
        f"{name}: {a:.3f} s against {b:.3f} s, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"{len(ratios)} rounds)",
        flush=True,
    )


def width() -> int:
    """Entries of a row."""
    last = block_records()[-1].block()
    return last.offset + last.size


def dot(folder: Path, rounds: int, n: int = 900, m: int = 100) -> None:
    """gradsim with the shards in the page cache, against V G^T on one tensor."""
    write_index(folder / "i", n)
    index = Index(folder / "i")
    train = index.gradients(slice(0, width()))
    for count in (m, 16):
        features = random_features(count, width(), 10**6)
        pairs, streamed = [], []
        for _ in range(rounds):
            product = seconds(partial(torch.matmul, features.gradients, train.T))
            whole = Problem(index, queries(count), features, memory=8 << 30)
            pairs.append((make("gradsim").score(whole).seconds, product))
            some = Problem(index, queries(count), features, memory=1 << 30, step=100)
            streamed.append((make("gradsim").score(some).seconds, product))
        report(f"gradsim in memory, {count} queries x {n} rows x {width():,} entries, against one matmul", pairs)
        report(f"gradsim streamed, {count} queries, against one matmul", streamed)


def exact(folder: Path, rounds: int, n: int = 900, m: int = 100) -> None:
    """exact by block against K_b = G_b G_b^T and C_b = V_b G_b^T on arrays in memory."""
    write_index(folder / "i", n)
    index = Index(folder / "i")
    features = random_features(m, width(), 10**6)
    train = [index.gradients(block.columns).clone() for block in index.blocks]

    def products() -> None:
        for block, rows in zip(index.blocks, train, strict=True):
            _ = rows @ rows.T
            _ = features.gradients[:, block.columns] @ rows.T

    pairs = []
    for _ in range(rounds):
        needed = seconds(products)
        scores = make("exact").score(Problem(index, queries(m), features, memory=16 << 30))
        pairs.append((scores.seconds, needed))
    report(f"exact by block, {m} queries x {n} rows x {width():,} entries, against the products it needs", pairs)
    print(f"  {scores.computed}")
    made = [Problem(index, queries(m), features, memory=16 << 30, cache=4 << 30) for _ in range(2)]
    first, second = (make("exact").score(each).seconds for each in made)
    print(f"exact with the index's cache: {first:.2f} s the first time, {second:.2f} s the second")


def synthesize(folder: Path, n: int, d: int, per_shard: int = 62_500) -> None:
    """An index of one block whose shards are bfloat16; its texts are one row's, since nobody reads them here."""
    write_index(folder, 1)
    about = manifest.read(folder)
    (folder / "shards" / about.shards[0].file).unlink()
    generator = torch.Generator().manual_seed(0)
    written = []
    for start in range(0, n, per_shard):
        count = min(per_shard, n - start)
        header = {"gradients": {"dtype": "BF16", "shape": [count, d], "data_offsets": [0, 2 * count * d]}}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        name = f"{start:09d}.safetensors"
        with (folder / "shards" / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for first in range(0, count, 12_500):
                rows = torch.randn(min(12_500, count - first), d, generator=generator).bfloat16()
                file.write(rows.view(torch.int16).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        size = (folder / "shards" / name).stat().st_size
        written.append(ShardRecord(file=name, start=start, stop=start + count, bytes=size, sha256="-"))
    block = BlockRecord(name="model.layers.0.weight", shape=(32, d // 32), offset=0)
    changed = about.model_dump() | {
        "examples": n,
        "blocks": (block.model_dump(),),
        "shards": [each.model_dump() for each in written],
        "feature_dtype": "bfloat16",
    }
    manifest.write(folder, Manifest.model_validate(changed))


def forget(folder: Path) -> None:
    """Ask the system to drop the shards from its page cache."""
    for path in (folder / "shards").iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """numpy, 16 MB at a time."""
    for path in sorted((folder / "shards").iterdir()):
        with path.open("rb") as file:
            while len(np.fromfile(file, np.uint16, 8 << 20)):
                pass


def peak(*, forgotten: bool = False) -> int:
    """Bytes of this process's largest resident size; `forgotten` starts it again from what is resident now."""
    if forgotten:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def stream(folder: Path, rounds: int, n: int = 1_000_000, d: int = 1024, m: int = 16) -> None:
    """A batch of queries, the ten strongest rows kept, against reading; both from the disk, then both from the page cache."""
    synthesize(folder / "i", n, d)
    index = Index(folder / "i")
    index._reader._checked |= {
        shard.file for shard in index.manifest.shards
    }  # made here; checking them is timed by itself
    size = n * d * 2
    generator = torch.Generator().manual_seed(1)
    features = Features(torch.randn(m, d, generator=generator), torch.zeros(m), {})
    asked = queries(m)
    before = peak(forgotten=True)

    def query() -> None:
        method = make("gradsim")
        assert isinstance(method, StreamedMethod)
        run = method.run(Problem(index, asked, features, memory=512 * 10**6))
        assert run is not None
        best = Strongest(m, 10)
        for chosen, where, part in all_blocks(run, m):
            best.take(chosen, where, part.numpy())
        assert best.order.shape == (m, 10)

    for kind in ("disk", "page cache"):
        pairs = []
        for k in range(rounds):
            times = {}
            for work in (query, lambda: read_all(index.folder))[:: 1 if k % 2 else -1]:
                if kind == "disk":
                    forget(index.folder)
                times[work is query] = seconds(work)
            pairs.append((times[True], times[False]))
        report(f"{m} queries x {n:,} rows x {d} bfloat16 entries from the {kind}, against numpy.fromfile", pairs)
        rate = statistics.median(b / a for a, b in pairs)
        print(f"  {size / 1e9 / statistics.median(a for a, _ in pairs):.2f} GB/s, {rate:.0%} of the rate of reading")
    grown = peak() - before
    print(f"  peak memory grew by {grown / 1e6:.0f} MB over the interpreter with its libraries; budget 512 MB")
    rows = StoredRows(index, index.blocks, 1000, joint=False, device=torch.device("cpu"))
    _, piece = next(iter(rows))
    wanted = features.gradients.double() @ piece.double().T
    error = float((features.gradients @ piece.T - wanted).abs().max() / wanted.abs().max())
    print(f"  largest error of a score against float64: {error:.1e} of the largest score ({len(piece)} rows looked at)")


PARTS: dict[str, Callable[[Path, int], None]] = {"dot": dot, "exact": exact, "stream": stream}


def main() -> None:
    """Run one part in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.part}: {torch.get_num_threads()} thread(s) of torch")
    with tempfile.TemporaryDirectory() as work:
        PARTS[args.part](Path(work), args.rounds)


if __name__ == "__main__":
    main()
