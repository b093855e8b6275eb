"""What the fused pass costs in exactness: python benchmarks/fused_fidelity.py [--rows 24] [--queries 10].

Gradients of rows and queries of the task `grammars` on the embedded model with an adapter: in float32 and bfloat16, by autograd
and by the fused pass. Prints the relative error of gradients, and the mean over queries of the rank correlation with the
scores, each against float32 by autograd.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from collection import with_adapter
from fidelity import correlation, scores
from finetrace.collection import Collector, Features, track
from finetrace.encoding import Encoder
from finetrace.tasks import build

KINDS = {
    f"{dtype}{' fused' if fused else ''}": (dtype, fused)
    for dtype in ("float32", "bfloat16")
    for fused in (False, True)
}


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights by name."""
    return {name: each for name, each in model.named_parameters() if "lora_" in name}


def error(found: Features, exact: Features) -> float:
    """Mean over rows of the distance from the gradient in float32, relative to its length."""
    distance = (found.gradients - exact.gradients).norm(dim=1) / exact.gradients.norm(dim=1)
    return float(distance.mean())


def main() -> None:
    """Print a line a way to compute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--queries", type=int, default=10)
    args = parser.parse_args()
    task = build("grammars")
    step = len(task.train) // args.rows, len(task.queries) // args.queries  # all classes, in turn
    examples = (*task.train[:: step[0]][: args.rows], *task.queries[:: step[1]][: args.queries])
    found: dict[str, Features] = {}
    weights: dict[str, torch.Tensor] = {}
    for name, (dtype, fused) in KINDS.items():
        loaded = with_adapter(dtype)
        with torch.no_grad():
            for key, each in adapter(loaded.model).items():  # made in float32, so that all have the same
                each.copy_(weights.setdefault(key, each.detach().clone()))
        items, _ = Encoder(loaded.tokenizer).encode_all(examples)
        tracking = track(loaded.model)
        collector = Collector(loaded.model, tracking, fused=fused)
        found[name] = collector.collect(items, [example.id for example in examples])
    exact = found["float32"]
    rows = len(examples) - args.queries
    expected = scores(tracking.blocks, exact.gradients[:rows], exact.gradients[rows:])
    print(f"{args.queries} queries x {rows} rows of {task.name}; mean per-query Spearman with float32 scores")
    for name in list(KINDS)[1:]:
        here = scores(tracking.blocks, found[name].gradients[:rows], found[name].gradients[rows:])
        correlations = "  ".join(f"{key} {correlation(expected[key], here[key]):.4f}" for key in expected)
        off = float((found[name].losses - exact.losses).abs().max())
        print(
            f"{name:15s} {correlations}  relative error of gradients {error(found[name], exact):.1e}, of losses {off:.1e}"
        )


if __name__ == "__main__":
    main()
