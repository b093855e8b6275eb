"""Lexical search with words of one character and stop words taken in: python benchmarks/lexical_words.py [--size 0.1].

Tasks whose answers ship with them, so that no model is needed; training rows and queries as `finetrace bench TASK` has them in
its first seed. A metric in % with the libraries' words and with all of them, by text.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np

from finetrace.attribution import make
from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.tasks import build

TASKS = ("grammars", "grammars-apply", "mathqa", "harmfulcheck", "backdoor-1", "backdoor-3", "backdoor-5", "emotion")


def main() -> None:
    """A table of tasks and methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.1)
    parser.add_argument("--metric", choices=sorted(METRICS), default="coverage")
    parser.add_argument("--task", nargs="*", default=TASKS)
    args = parser.parse_args()
    print("| task | method | prompt | response | both |\n|---|---|---|---|---|")
    for task in args.task:
        made = build(task, seed=0, size=args.size)
        relevant = relevance([row.label for row in made.train], [query.label for query in made.queries])
        problem: Any = SimpleNamespace(
            rows=SimpleNamespace(examples=made.train),
            queries=made.queries,
            m=len(made.queries),
            n=len(made.train),
        )
        for method in ("bm25", "tfidf"):
            cells = []
            for text in ("prompt", "response", "both"):
                found = []
                for every in ("false", "true"):
                    scores = make(f"{method}:text={text},all_words={every}").matrix(problem)
                    found.append(100 * float(np.nanmean(METRICS[args.metric](scores, relevant))))
                cells.append(f"{found[0]:.0f}, {found[1]:.0f}")
            print(f"| {task} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
