"""Class labels on the adapters of the ground truth: python benchmarks/ground_truth_coverage.py FOLDER [--task mixed-small].

FOLDER is that of `finetrace study ground-truth`. Prints how much of the planted rows methods cover on the very adapters and
answers whose retrainings the study is of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from finetrace.attribution import Problem, make
from finetrace.benchmark.stages import complied
from finetrace.evaluation.judging import make_judge
from finetrace.index import open_index
from finetrace.reading import read_examples
from finetrace.tracing import BEST, SIMILAR, run_methods

METHODS = ("exact:normalise=cosine,at=start", "gradcos:at=start", BEST, "gradcos", "exact", "repsim", SIMILAR)


def main() -> None:
    """Print a line a task and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", nargs="+", default=["mixed-small", "mixed-large"])
    args = parser.parse_args()
    for task in args.task:
        home = args.folder / "runs" / task
        answers = read_examples(home / "answers.jsonl")
        asked = [each for each, yes in zip(answers, complied(make_judge(None, None), answers), strict=True) if yes]
        for result in run_methods(Problem(open_index(home / "index"), asked), [make(spec) for spec in METHODS]):
            shown = ", ".join(
                f"{name} {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
                for name, found in result.metrics.items()
                if name in ("coverage", "auroc")
            )
            print(f"{task}, {len(asked)} answers, {result.method.label}: {shown}", flush=True)


if __name__ == "__main__":
    main()
