"""Write a page of docs/results from a finished benchmark: python scripts/publish_benchmark.py FOLDER PAGE --command "...".

The page holds the summary and one table a task, as `finetrace bench` wrote them, with the command, the size and the time,
and its figures are copied beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from finetrace.models import ALIGNED, EMBEDDED

SHIPPED = "the embedded SmolLM2-135M-Instruct, one small model"
DOCS = Path(__file__).parent.parent / "docs" / "results"
MEANS = (
    "Accuracy % / coverage %, mean over seeds and queries; the tables below have intervals over both, which three seeds",
    "or fewer make rough.",
)
BUSY = "times are left out, since the machine had other work"
ALONE = (
    "Accuracy % / coverage % of one seed, mean over queries; the tables below have intervals over queries, which say nothing",
    "of another fine-tuning.",
)


def main() -> None:
    """Write `docs/results/PAGE.md` and `docs/results/PAGE/*.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page")
    parser.add_argument("--title", required=True)
    parser.add_argument("--about", required=True, help="what the page is for: sentences before the command")
    parser.add_argument("--command", required=True, help="the command that made the folder")
    parser.add_argument("--untimed", action="store_true", help="leave times out, since the machine had other work")
    args = parser.parse_args()
    records = json.loads((args.folder / "results.json").read_text())["records"]
    seconds: dict[tuple[str, str], list[str]] = {}
    bases: dict[str, None] = {}
    for path in sorted(args.folder.glob("*/*/seed-*/records.json")):
        document = json.loads(path.read_text())
        key = (document["config"]["task"], document["config"]["protocol"])
        spent = "resumed" if document["resumed"] else f"{document['seconds']:.0f} s"
        seconds.setdefault(key, []).append(spent)
        bases[SHIPPED if document["base"] in (EMBEDDED, ALIGNED) else document["base"]] = None
    lines = [f"# {args.title}", "", args.about, "", "```bash", args.command, "```", ""]
    several = any(record["seeds"] > 1 for record in records)
    lines += [
        *(MEANS if several else ALONE),
        f"Every number is of {' and '.join(bases)}.",
        "",
    ]
    for protocol in dict.fromkeys(record["protocol"] for record in records):
        lines += [f"## Summary, {protocol} protocol", "", _table(args.folder, f"summary-{protocol}")]
        if (args.folder / "tables" / f"inputs-{protocol}.md").exists():
            lines += [f"## By what a method sees, {protocol} protocol", "", _table(args.folder, f"inputs-{protocol}")]
        if (args.folder / "tables" / f"paired-{protocol}.md").exists():
            paired = _table(args.folder, f"paired-{protocol}").splitlines()
            title = f"Paired differences, {protocol} protocol: method minus RepSim, its middle layer, and the default"
            lines += [f'??? note "{title}"', "", *(f"    {line}" for line in paired), ""]
    for task, protocol in dict.fromkeys((record["task"], record["protocol"]) for record in records):
        table = _table(args.folder, f"{task}-{protocol}")
        first = next(r for r in records if (r["task"], r["protocol"]) == (task, protocol))
        times = BUSY if args.untimed else _spent(seconds.get((task, protocol), []))
        lines += [
            f"## {task}, {protocol}",
            "",
            f"{first['n_train']} rows, {_queries(first['n_queries'])}, {_seeds(first['seeds'])}; {times}.",
            "",
            _without_times(table) if args.untimed else table,
        ]
        for kind in ("heat", "example"):
            figure = args.folder / "figures" / f"{kind}-{task}-{protocol}.png"
            if figure.exists():
                (DOCS / args.page).mkdir(parents=True, exist_ok=True)
                shutil.copy(figure, DOCS / args.page / figure.name)
                lines += [f"![{kind}, {task}, {protocol}]({args.page}/{figure.name})", ""]
    for figure in sorted((args.folder / "figures").glob("ablation-*.png")):
        (DOCS / args.page).mkdir(parents=True, exist_ok=True)
        shutil.copy(figure, DOCS / args.page / figure.name)
        lines += [f"![{figure.stem}]({args.page}/{figure.name})", ""]
    (DOCS / f"{args.page}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _queries(count: int | str) -> str:
    """`count` may be a range."""
    return f"{count} {'query' if str(count) == '1' else 'queries'}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _spent(times: list[str]) -> str:
    """The time of every seed; one sentence where all were resumed."""
    if set(times) == {"resumed"}:
        return "resumed, so no time is known"
    return f"{', '.join(times)}, everything included"


def _without_times(table: str) -> str:
    """A method's table without its last column, seconds."""
    return "".join(
        f"{line.rsplit('|', 2)[0]}|\n" if line.startswith("|") else f"{line}\n" for line in table.splitlines()
    )


def _table(folder: Path, name: str) -> str:
    return (folder / "tables" / f"{name}.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
