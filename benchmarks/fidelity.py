"""What bfloat16 costs: python benchmarks/fidelity.py [--demo demo-small].

Takes the index and the traced answers of a finished demo, computes the features of training rows and queries in float32
and in bfloat16 (kept in float32), and once more with the bfloat16 run's features rounded to bfloat16 for storage; prints
the mean over queries of the rank correlation with the float32 scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr

from finetrace.collection import Collector, Features, track
from finetrace.collection.modules import Block
from finetrace.curvature import Damping, Products, fisher
from finetrace.index import Index, open_index
from finetrace.reading import read_examples


def features(folder: Path, dtype: str) -> tuple[Index, Features, Features]:
    """Training rows and queries under the demo's model in one dtype."""
    index = open_index(folder / "index")
    model = index.model(dtype).model  # type: ignore[arg-type]
    queries = read_examples(folder / "answers" / "fine-tuned-mixed.jsonl")
    encoded, _ = index.encoder().encode_all(queries)
    collector = Collector(model, track(model), (), index.manifest.batch_tokens)
    train = collector.collect(list(index.rows.encoded), index.rows.ids)
    return index, train, collector.collect(encoded, [query.id for query in queries])


def scores(blocks: Sequence[Block], train: torch.Tensor, query: torch.Tensor) -> dict[str, torch.Tensor]:
    """Raw products, cosines, and exact influence per block at the default damping."""
    exact = torch.zeros(len(query), len(train), dtype=torch.float64)
    for block in blocks:
        products = Products.of(train[:, block.columns], query[:, block.columns])
        exact += fisher(products, Damping(0.01).of(products, block.size)).products()
    product = (query @ train.T).double()
    return {
        "gradsim": product,
        "gradcos": product / query.norm(dim=1)[:, None] / train.norm(dim=1)[None, :],
        "exact": exact,
    }


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over queries of Spearman's correlation."""
    return sum(float(spearmanr(x, y).statistic) for x, y in zip(a, b, strict=True)) / len(a)


def main() -> None:
    """Print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-small"))
    folder = parser.parse_args().demo
    index, train, query = features(folder, "float32")
    _, half_train, half_query = features(folder, "bfloat16")
    wide = scores(index.blocks, train.gradients, query.gradients)
    half = scores(index.blocks, half_train.gradients, half_query.gradients)
    stored = scores(index.blocks, half_train.gradients.bfloat16().float(), half_query.gradients.bfloat16().float())
    print(f"{len(query)} queries x {len(train)} rows; mean per-query Spearman with float32 scores")
    for name in wide:
        print(
            f"{name:8s} computed in bfloat16 {correlation(wide[name], half[name]):.4f}   "
            f"and stored in bfloat16 {correlation(wide[name], stored[name]):.4f}"
        )


if __name__ == "__main__":
    main()
