"""Peak memory of writing and of reading the rows of an index: python benchmarks/opening.py [--rows 20000] [--tokens 200].

Token ids are random and texts a few words. Each is done in a process of its own, and what is said is how much its peak grew
over what it held before. Linux alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from finetrace.encoding import Encoded
from finetrace.examples import Example
from finetrace.index import rows as table
from streaming import peak


def grown(work: Callable[[], object]) -> int:
    """Bytes by which the peak grew."""
    before = peak(forgotten=True)
    kept = work()
    after = peak()
    del kept
    return after - before


def write(path: Path, rows: int, tokens: int) -> int:
    """Write rows of random tokens."""
    rng = np.random.default_rng(0)
    weights = np.full(tokens, 1 / tokens, np.float32)
    encoded = [Encoded(rng.integers(0, 49152, tokens, np.int32), weights.copy(), tokens // 2) for _ in range(rows)]
    examples = [Example.from_prompt("red green one", "two three", id=f"e{i}") for i in range(rows)]
    return grown(lambda: table._write(path, examples, encoded))


def read(path: Path) -> int:
    """Read them back."""
    return grown(lambda: table._read(path))


def main() -> None:
    """Write, then read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / table.NAME
        for name, work, given in (("writing", write, (path, args.rows, args.tokens)), ("reading", read, (path,))):
            with ProcessPoolExecutor(1, mp_context=spawn) as one:
                size = one.submit(work, *given).result()
            print(
                f"{name} {args.rows:,} rows of {args.tokens:,} tokens: {size / args.rows / args.tokens:.1f} bytes a token"
            )


if __name__ == "__main__":
    main()
