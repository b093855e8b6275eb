"""What EK-FAC of every tool finds on one fine-tuning: python benchmarks/peers/coverage.py CELL [--tools kronfluence dattri].

CELL is a finished seed of `finetrace bench ... --keep`: `bench/grammars/corrected/seed-0`. Every tool gets its rows, queries
and adapter, the tuned configuration, float32, damping 0.1 of a block's mean eigenvalue; scores are plain products. The
curvature's labels are drawn from the model (`ekfac`) or the data's (`ekfac-data`).
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from inputs import place
from run import PEERS, once
from table import OURS, Run

from finetrace.encoding import Encoder
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.metrics import evaluate, relevance
from finetrace.models import ModelSpec, load
from finetrace.reading import read_examples


def main() -> None:
    """Print a line a tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path)
    parser.add_argument("--tools", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--work", nargs="+", choices=["ekfac", "ekfac-data"], default=["ekfac", "ekfac-data"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    root = Path(__file__).resolve().parents[2] / "build"
    parser.add_argument("--environments", type=Path, default=root / "peers")
    parser.add_argument("--out", type=Path, default=root / "peers-coverage")
    parser.add_argument("--limit", type=int, default=3600, help="seconds after which one run is ended")
    parser.add_argument("--keep", action="store_true", help="take runs from --out that are there already")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    train, queries = (read_examples(args.cell / f"{name}.jsonl") for name in ("train", "queries"))
    shutil.copytree(args.cell / "adapter", out / "adapter", dirs_exist_ok=True)
    tokenizer = load(ModelSpec(dtype="float32", device="cpu")).tokenizer
    given = place(out, Encoder(tokenizer), train, queries, out / "adapter")
    relevant = relevance([each.label for each in train], [each.label for each in queries])
    for work in args.work:
        for tool in (OURS, *args.tools):
            run = once(Run(tool, tool != OURS, work, "float32", out / f"{work}-{tool}"), given, args)
            if run.failed:
                print(f"{work}, {tool}: {run.failed}", flush=True)
                continue
            found = evaluate(run.scores, relevant)
            print(
                f"{work}, {tool}: accuracy {_percent(found['accuracy'])}, coverage {_percent(found['coverage'])}, "
                f"AUPRC {found['auprc'].value:.3f}",
                flush=True,
            )


def _percent(estimate: Estimate) -> str:
    """With its interval over queries."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]%"


if __name__ == "__main__":
    main()
