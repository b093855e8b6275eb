"""Put a demo's numbers into README.md and docs/results: python scripts/publish_demo.py SMALL DEFAULT.

SMALL and DEFAULT are folders that `finetrace demo --small` and `finetrace demo` left. What stands between
`<!-- demo NAME -->` and `<!-- end -->` is replaced by the table NAME.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from finetrace.tracing import BEST, BEST_AT_END, UNASKED

ROOT = Path(__file__).parent.parent
SHORT = (
    "repsim",
    "repsim:pooling=mean-response",
    "gradsim",
    "gradcos",
    "datainf",
    "lissa",
    "exact",
    "ekfac",
    "ekfac:normalise=cosine",
    "gradcos:loss_on=probe",
    BEST_AT_END,
    "gradsim:at=start",
    "gradcos:at=start",
    "datainf:at=start",
    "exact:normalise=cosine,at=start",
    "ekfac:at=start",
    "ekfac:normalise=cosine,at=start",
    "ekfac:layers=last-fifth,at=start",
    BEST,
)
CONTROLS = ("random", "length", "gradnorm:at=start", UNASKED, "opening", "bm25", "tfidf:text=response", "tfidf")
MODELS = (
    "plain base",
    "aligned base",
    "fine-tuned, mixed",
    "fine-tuned, benign alone",
    "fine-tuned, cleaned",
    "fine-tuned, random removed",
)


def main() -> None:
    """Replace the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("small", type=Path)
    parser.add_argument("default", type=Path)
    args = parser.parse_args()
    runs = [json.loads((folder / "results.json").read_text()) for folder in (args.small, args.default)]
    tables = {
        "rates": _rates(runs),
        "short": _methods(runs[1], (*SHORT, *CONTROLS)),
        "default": _methods(runs[1], None),
        "small": _methods(runs[0], None),
    }
    for path in (ROOT / "README.md", ROOT / "docs" / "results" / "demo.md"):
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            marks = re.compile(rf"(<!-- demo {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text = marks.sub(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", text)  # type: ignore[misc]
        path.write_text(text, encoding="utf-8")


def _rates(runs: list[dict[str, Any]]) -> str:
    lines = ["| model | small set (20 + 20) | default set (20 + 240) |", "|---|---|---|"]
    for model in MODELS:
        cells = []
        for run in runs:
            rate = run["config"]["attack_success_rate"][model]
            low, high = run["config"]["attack_success_interval"][model]
            cells.append(f"{100 * rate:.0f}% [{100 * low:.0f}, {100 * high:.0f}]")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _methods(run: dict[str, Any], specs: tuple[str, ...] | None) -> str:
    lines = ["| method | accuracy % | coverage % | AUROC | AUPRC |", "|---|---|---|---|---|"]
    records = run["records"]
    if specs is not None:
        found = {record["spec"]: record for record in records}
        records = [found[spec] for spec in specs]
    for record in sorted(records, key=lambda each: each["control"]):
        cells = []
        for name, factor in (("accuracy", 100), ("coverage", 100), ("auroc", 1), ("auprc", 1)):
            value, low, high = (factor * record[key] for key in (name, f"{name}_low", f"{name}_high"))
            form = "{:.0f} [{:.0f}, {:.0f}]" if factor == 100 else "{:.2f} [{:.2f}, {:.2f}]"
            cells.append(form.format(value, low, high))
        control = " (control)" if record["control"] else ""
        lines.append(f"| `{record['spec']}`{control} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
