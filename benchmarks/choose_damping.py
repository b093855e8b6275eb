"""Choose curvature and damping by retraining: python benchmarks/choose_damping.py [--out choose-damping] [--workers 2].

Grammars (name the rule), 100 rows and 20 queries, a LoRA on the last four layers for 12 epochs. Every curvature x damping x
normalisation x moment is held against retraining on some random halves of the rows, the best is fixed, and it is reported with
others on other halves, under two seeds, with the noise ceiling. What is retrained is kept; a run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.attribution import Problem, make
from finetrace.benchmark.stages import claim, tuned_adapter
from finetrace.encoding import Encoder
from finetrace.evaluation.lds import compare, draw_subsets, per_query
from finetrace.evaluation.metrics import evaluate, relevance
from finetrace.evaluation.retraining import RESPONSE, Retraining, Subset
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.index import build_index
from finetrace.models import EMBEDDED, ModelSpec, known_dtype, load
from finetrace.studies.ground_truth import first
from finetrace.tasks import recipe
from finetrace.tracing import BEST, prepare

ROWS, QUERIES, CHOSEN, REPORTED = 10, 2, 20, 20  # rows and queries a class; subsets to choose on and to report
CHOOSE_SEED, REPORT_SEED = 101, 202
TUNING = FinetuneConfig(epochs=12, learning_rate=1e-3, batch_size=8, layers=(26, 27, 28, 29))
MULTIPLES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
AT = ("end", "start")
GRID = [
    f"{curvature}:damping={damping:g},normalise={normalise},at={at}"
    for curvature, damping, normalise, at in product(
        ("exact", "exact:scope=joint", "datainf", "ekfac"), MULTIPLES, ("none", "cosine"), AT
    )
]
GRID = [spec.replace("exact:scope=joint:", "exact:scope=joint,") for spec in GRID]
GRID += [f"gradsim:normalise={normalise},at={at}" for normalise, at in product(("none", "cosine"), AT)]
OTHERS = (BEST, "exact", "datainf", "gradsim", "gradcos", "repsim", "repsim:pooling=mean-response", "bm25", "random")


def main() -> None:
    """Fine-tune, score, retrain, choose, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("choose-damping"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    train, queries = rows()
    dtype = known_dtype(args.dtype, "cpu")
    settings = {"dtype": dtype, "rows": ROWS, "queries": QUERIES, "finetuning": TUNING.model_dump(mode="json")}
    claim(args.out / "choose.json", settings, "a search")
    spec = ModelSpec(EMBEDDED, None, dtype, "cpu")
    adapter = tuned_adapter(args.out / "adapter", spec, train, TUNING)
    tuned = load(ModelSpec(EMBEDDED, str(adapter), dtype, "cpu"))
    index, _ = build_index(tuned, train, args.out / "index", Encoder(tuned.tokenizer), kronecker="model")
    problem = Problem(index, queries)
    methods = {make(each).label: make(each) for each in (*GRID, *OTHERS)}
    prepare(problem, list(methods.values()))
    scores = {label: np.asarray(method.score(problem).values) for label, method in methods.items()}
    again = Retraining(spec, TUNING, tuple(train), tuple(queries), args.out)

    def losses(members: np.ndarray[Any, Any], seeds: range) -> np.ndarray[Any, Any]:  # (k, s, m)
        kept = [tuple(np.flatnonzero(row).tolist()) for row in members]
        done = again.run([Subset(each, seed) for seed in seeds for each in kept], workers=args.workers, say=print)
        return np.stack([each.losses[RESPONSE] for each in done]).reshape(len(seeds), len(kept), -1)

    right = relevance([row.label for row in train], [query.label for query in queries])
    coverage = {label: evaluate(each, right)["coverage"].value for label, each in scores.items()}
    tried = draw_subsets(len(train), CHOSEN, 0.5, CHOOSE_SEED)
    found = losses(tried, range(1))
    chosen = {label: float(np.nanmean(per_query(each, tried, found))) for label, each in scores.items()}
    order = sorted((label for label in scores if label in {make(each).label for each in GRID}), key=chosen.get)[::-1]  # type: ignore[arg-type]
    print(f"on {CHOSEN} halves to choose on, one seed:")
    for label in order[:25]:
        print(f"  LDS {chosen[label]:.3f}  coverage {100 * coverage[label]:5.1f}  {label}")
    second = draw_subsets(len(train), REPORTED, 0.5, REPORT_SEED)
    named = [order[0], *(make(each).label for each in OTHERS)]
    held = compare({label: scores[label] for label in dict.fromkeys(named)}, second, losses(second, range(1, 3)))
    print(f"on {REPORTED} other halves, two other seeds:")
    for label, each in held.lds.items():
        print(f"  LDS {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]  {label}")
    assert held.agreement is not None
    possible = "what is not known" if held.reachable is None else f"{held.reachable:.3f}"
    print(f"  two seeds agree by {held.agreement.value:.3f}; a perfect prediction would have {possible}")
    document = {
        "chosen_on": chosen,
        "coverage": coverage,
        "reported": {label: [each.value, each.low, each.high] for label, each in held.lds.items()},
        "agreement": held.agreement.value,
        "reachable": held.reachable,
    }
    (args.out / "order.json").write_text(json.dumps(document, indent=1))


def rows() -> tuple[list[Example], list[Example]]:
    """The first rows and queries of every class."""
    task = recipe("grammars").build(0)
    return first(task.train, ROWS), first(task.queries, QUERIES)


if __name__ == "__main__":
    main()
