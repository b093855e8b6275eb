"""How a benchmark of three seeds differs from one of before that had the same first seed: a page of docs/results and a folder.

    python benchmarks/seed_orders.py before.md bench-tenth

The summary of the page has means over three seeds. With the first seed in common, the mean of the other two of before follows
from it. Methods that are controls, and tasks whose rows have no classes, are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

HEAD = "## Summary, corrected protocol"


def means(page: str) -> dict[tuple[str, str], float]:
    """Coverage in %, by task and method, of a page's summary; its controls left out."""
    lines = [line for line in page.split(HEAD)[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found: dict[tuple[str, str], float] = {}
    for title, *cells in rows[2:]:
        if not title.endswith("(control)"):
            found |= {(task, title): float(cell.split("/")[1]) for task, cell in zip(rows[0][1:], cells, strict=True)}
    return found


def compare(before: dict[tuple[str, str], float], seeds: pd.DataFrame) -> dict[str, float]:
    """In points of coverage: how far means moved, and how far the mean of the other two seeds lies from the first one.

    Args:
        before: Mean over seeds 0, 1 and 2, by task and method.
        seeds: `task`, `title`, `seed` and `coverage` (a share) of the benchmark of now.
    """
    now = seeds.assign(coverage=100 * seeds["coverage"]).pivot(
        index=["task", "title"], columns="seed", values="coverage"
    )
    now = now.loc[[each for each in now.index if each in before]]
    was = np.array([before[each] for each in now.index])
    first, others = now[0].to_numpy(), now[[1, 2]].mean(axis=1).to_numpy()
    moved = np.abs(now[[0, 1, 2]].mean(axis=1).to_numpy() - was)
    return {
        "values": float(len(now)),
        "median of what means moved by": float(np.median(moved)),
        "nine in ten moved by at most": float(np.quantile(moved, 0.9)),
        "most": float(moved.max()),
        "other seeds from the first, root mean square, before": float(
            np.sqrt(np.mean(((3 * was - first) / 2 - first) ** 2))
        ),
        "and now": float(np.sqrt(np.mean((others - first) ** 2))),
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", nargs="*", default=["mislabelled"], help="tasks to leave out")
    args = parser.parse_args()
    before = {
        key: value for key, value in means(args.page.read_text(encoding="utf-8")).items() if key[0] not in args.without
    }
    for name, value in compare(before, pd.read_parquet(args.folder / "seeds.parquet")).items():
        print(f"{value:8.2f}  {name}")


if __name__ == "__main__":
    main()
