"""What noting many shards one after another takes: python benchmarks/manifest_writes.py [--shards 25641].

A line of the journal each, synced to the disk, and the manifest whenever the journal is as long as it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from finetrace.index import manifest
from finetrace.index.manifest import Arrival, ShardRecord
from finetrace.index.notes import Notes
from scoring import write_index


def main() -> None:
    """Seconds of a processor and of the clock for all of them, and the manifest's bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="*", default=[5000, 25641])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        write_index(Path(work) / "i", 8)
        about = manifest.read(Path(work) / "i")
        template = about.shards[0].model_dump()
        for count in args.shards:
            folder = Path(work) / str(count)
            folder.mkdir()
            empty = about.model_copy(update={"shards": (), "examples": count})
            manifest.write(folder, empty)
            notes = Notes(folder, empty, empty)
            began, processor = time.perf_counter(), time.process_time()
            for i in range(count):
                record = ShardRecord(**template | {"file": f"{i:09d}.safetensors", "start": i, "stop": i + 1})
                notes.add(Arrival(shard=record))
            notes.fold()
            took, used = time.perf_counter() - began, time.process_time() - processor
            size = (folder / manifest.NAME).stat().st_size
            print(
                f"{count:,} shards: {used:.1f} s of a processor, {took:.1f} s with waiting for the disk, "
                f"{1000 * took / count:.2f} ms each; a manifest of {size / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
