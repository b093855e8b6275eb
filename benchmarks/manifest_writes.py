"""How long one write of a manifest with many shards takes: python benchmarks/manifest_writes.py [--shards 25641]."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from finetrace.index import manifest
from finetrace.index.manifest import ShardRecord
from scoring import write_index


def main() -> None:
    """Median processor time of a few writes, and the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="*", default=[5000, 25641])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        write_index(Path(work) / "i", 8)
        about = manifest.read(Path(work) / "i")
        (template,) = about.shards[:1]
        for count in args.shards:
            records = tuple(
                ShardRecord(**template.model_dump() | {"file": f"{i:09d}.safetensors", "start": i, "stop": i + 1})
                for i in range(count)
            )
            many = about.model_copy(update={"shards": records, "examples": count})
            times = []
            for _ in range(5):
                started = time.process_time()
                manifest.write(Path(work), many)
                times.append(time.process_time() - started)
            size = (Path(work) / manifest.NAME).stat().st_size
            print(f"{count:,} shards: {1000 * statistics.median(times):.0f} ms a write, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
