"""Every method on a large index: python benchmarks/scoring.py [--train 900] [--queries 100].

Gradients are random numbers with the embedded model's block shapes (230,400 entries an example), written as an index
and read back; what is timed is everything after collection. There is no model, so methods that would collect more (another
loss, the start of the fine-tuning) are left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from finetrace._version import __version__
from finetrace.attribution import Method, Problem, make
from finetrace.collection import Features
from finetrace.collection.factors import FactorSums
from finetrace.collection.modules import Tracking
from finetrace.encoding import Encoded
from finetrace.examples import Example
from finetrace.fingerprint import of_data
from finetrace.index import Index, factors, manifest, rows, shards, sums
from finetrace.index.manifest import BlockRecord, EncodingRecord, Manifest, ModelRecord
from finetrace.tracing import run_methods, standard

HIDDEN, VALUES, LAYERS, RANK = 576, 192, 30, 4


def block_records() -> tuple[BlockRecord, ...]:
    """LoRA A and B on q and v of every layer."""
    records, offset = [], 0
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", VALUES)):
            for matrix, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (out, RANK))):
                full = f"model.layers.{layer}.self_attn.{name}.{matrix}.weight"
                records.append(BlockRecord(name=full, shape=shape, offset=offset))
                offset += shape[0] * shape[1]
    return tuple(records)


def random_features(n: int, width: int, seed: int) -> Features:
    """Features of random numbers; a shared direction makes the Gram matrices as lopsided as real ones."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=torch.Generator().manual_seed(99))
    gradients = torch.randn(n, width, generator=generator) + common
    names = ("last-prompt@-1", "last-token@-1", "mean-response@-1")
    return Features(gradients, torch.rand(n), {name: torch.randn(n, HIDDEN, generator=generator) for name in names})


def write_index(folder: Path, n: int, per_shard: int = 145) -> None:
    """An index as build_index leaves it."""
    words = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 20)) for _ in range(2 * n)]
    examples = [Example.from_prompt(texts[2 * i], texts[2 * i + 1], id=str(i), label="ab"[i % 2]) for i in range(n)]
    one = np.full(50, 1 / 50, dtype=np.float32)
    encoded = [Encoded(np.arange(50, dtype=np.int32), one, 10) for _ in range(n)]
    blocks = block_records()
    width = blocks[-1].offset + blocks[-1].shape[0] * blocks[-1].shape[1]
    folder.mkdir(parents=True)
    about = Manifest(
        finetrace=__version__,
        model=ModelRecord(
            name="none",
            dtype="float32",
            adapter=None,
            base_fingerprint="-",
            adapter_fingerprint=None,
            tokenizer_fingerprint="-",
            layers=LAYERS,
        ),
        encoding=EncodingRecord(loss_on="response", max_length=None, template=None),
        data_fingerprint=of_data([e.id for e in examples], encoded),
        examples=n,
        tokens=50 * n,
        feature_dtype="float32",
        batch_tokens=2048,
        rows_per_shard=per_shard,
        modules=None,
        blocks=blocks,
        representations=("last-prompt@-1", "last-token@-1", "mean-response@-1"),
        skipped={},
    )
    rows.write(folder, about, examples, encoded)
    written = []
    for start in range(0, n, per_shard):
        count = min(per_shard, n - start)
        written.append(shards.write(folder, random_features(count, width, start), start, start + count, about))
    manifest.write(folder, about.model_copy(update={"shards": tuple(written)}))


def write_factors(index: Index) -> None:
    """Kronecker factors of random numbers, finished as collection leaves them."""
    tracking = Tracking((), index.blocks, {})
    for shard in index.manifest.shards:
        totals = FactorSums(tracking, "model", torch.float32, torch.device("cpu"))
        generator = torch.Generator().manual_seed(shard.start)
        for block in index.blocks:
            for side, size in zip((totals.left, totals.right), block.matrix, strict=True):
                tokens = torch.randn(4 * size, size, generator=generator)
                side[block.name] += tokens.T @ tokens
            totals.tokens[block.name] = 50 * (shard.stop - shard.start)
        width = sum(block.size for block in index.blocks)
        sampled = random_features(shard.stop - shard.start, width, shard.start).gradients
        sums.write_part(index.folder, totals, sampled, shard, index.manifest)
    factors.finish(index.folder, index.manifest, "model")


def methods(index: Index) -> list[Method]:
    """The standard methods that an index without a model can be asked for."""
    return [make(spec) for spec in standard(index) if "loss_on=" not in spec]


def main() -> None:
    """Print a line a method and the total."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=900)
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        write_index(Path(work) / "index", args.train)
        index = Index(Path(work) / "index")
        write_factors(index)
        queries = [
            Example.from_prompt("red green one", "two three", id=f"q{i}", label="ab"[i % 2])
            for i in range(args.queries)
        ]
        width = sum(block.size for block in index.blocks)
        problem = Problem(index, queries, random_features(args.queries, width, 1_000_000))
        started = time.perf_counter()
        results = run_methods(problem, methods(index))
        total = time.perf_counter() - started
        for result in results:
            print(f"{result.scores.seconds:7.2f} s  {result.method.label}")
        train = index.gradients(slice(0, width))
        started = time.perf_counter()
        problem.features.gradients @ train.T
        product = time.perf_counter() - started
        started = time.perf_counter()
        train @ train.T
        gram = time.perf_counter() - started
        alone = sum(result.scores.seconds for result in results)
        defaults = sum(result.scores.seconds for result in results if ":" not in result.method.label)
        print(f"{defaults:7.2f} s  scoring alone, each method once at its defaults")
        print(f"{alone:7.2f} s  scoring alone, every variant above")
        print(
            f"{total:7.2f} s  all {len(results)} methods with metrics and intervals: {args.queries} queries x "
            f"{args.train} examples x {width:,} entries, {torch.get_num_threads()} threads"
        )
        print(f"{product:7.2f} s  one matmul V G^T;  {gram:.2f} s  one matmul G G^T")


if __name__ == "__main__":
    main()
