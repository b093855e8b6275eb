"""What a smaller index costs: python benchmarks/sizes.py DATA QUERIES --variants float32 bfloat16 two-sided:64x64 ...

Indexes the rows once for each variant, which is a dtype of storage or a projection or both (`bfloat16+sparse:4096`), scores
the queries, and prints the size on disk, the seconds of one thread that collecting took, and the mean over queries of the rank
correlation with the scores of the first variant. Cosines also have their largest and root mean square change.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from finetrace.attribution import Problem, make
from finetrace.encoding import Encoder
from finetrace.index import build_index
from finetrace.index.store import Index
from finetrace.models import ModelSpec, load
from finetrace.reading import read_examples

DTYPES = ("float32", "bfloat16", "float16")


def variant(text: str) -> dict[str, str]:
    """Arguments of `build_index`."""
    found = {}
    for part in text.split("+"):
        found["feature_dtype" if part in DTYPES else "projection"] = part
    return {"projection": "none"} | found


def stored(index: Index) -> int:
    """Bytes of the shards."""
    return sum(shard.bytes for shard in index.manifest.shards)


def correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Mean over queries of Spearman's correlation."""
    return float(np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]))


def main() -> None:
    """Print a line a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("queries")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--adapter")
    parser.add_argument("--modules", nargs="*")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="*", default=["gradcos", "exact", "ekfac"])
    parser.add_argument("--variants", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(ModelSpec(args.model, args.adapter, args.dtype, "cpu"))
    examples, queries = read_examples(args.data)[: args.rows], read_examples(args.queries)
    first: dict[str, np.ndarray[Any, Any]] = {}
    for text in args.variants:
        with tempfile.TemporaryDirectory() as work:
            before = time.process_time()
            index, _ = build_index(
                loaded,
                examples,
                Path(work) / "index",
                Encoder(loaded.tokenizer),
                modules=args.modules,
                representations=(),
                projection_seed=args.seed,
                **variant(text),  # type: ignore[arg-type]
            )
            seconds = time.process_time() - before
            problem = Problem(index, queries)
            able = [spec for spec in args.methods if index.has_factors() or not spec.startswith(("kfac", "ekfac"))]
            scores = {spec: make(spec).score(problem).values for spec in able}
            first = first or scores
            words = [f"{spec} {correlation(scores[spec], first[spec]):.5f}" for spec in able]
            if "gradcos" in scores:
                change = scores["gradcos"] - first["gradcos"]
                words.append(f"cosines moved by {np.sqrt((change**2).mean()):.1e}, at most {np.abs(change).max():.1e}")
            rounding = f"   rounding {index.manifest.rounding:.1e}" if index.manifest.rounding else ""
            print(
                f"{text:28s} {stored(index) / 1e6:9.2f} MB {seconds:6.1f} s   {'   '.join(words)}{rounding}", flush=True
            )


if __name__ == "__main__":
    main()
