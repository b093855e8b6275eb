"""Put a finished study into its page of docs/results: python scripts/publish_study.py FOLDER --command "...".

The page, `docs/results/study-NAME.md`, is written by hand but for what stands between `<!-- study -->` and `<!-- end -->`:
the command, the time, what was read off, the figures and, folded, the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from finetrace.studies.registry import study

DOCS = Path(__file__).parent.parent / "docs" / "results"
NEW = "# {title}\n\n<!-- study -->\n<!-- end -->\n"


def main() -> None:
    """Replace what stands between the marks, and copy the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the folder")
    parser.add_argument("--where", help="in place of the time: what it ran on, where parts were brought together")
    args = parser.parse_args()
    config = json.loads((args.folder / "results.json").read_text(encoding="utf-8"))["config"]
    about = study(config["study"])
    page = DOCS / f"study-{about.name}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else NEW.format(title=about.name.capitalize())
    minutes = config["seconds"] / 60
    time = f"{minutes:.0f} minutes" if minutes > 2 else f"{config['seconds']:.0f} seconds"
    part = "; what was finished before is not counted" if config["resumed"] else ""
    seeds = f"{config['seeds']} seeds" if config["seeds"] > 1 else "one seed"
    took = args.where or f"{time} on two cores{part}"
    lines = ["```bash", args.command, "```", "", f"{seeds.capitalize()}, {took}.", ""]
    lines += [f"- {sentence}" for sentence in config["reading"]]
    figures = DOCS / f"study-{about.name}"
    shutil.rmtree(figures, ignore_errors=True)
    figures.mkdir()
    for path in sorted(args.folder.glob("*.png")):
        shutil.copy(path, figures / path.name)
        lines += ["", f"![{path.stem.replace('-', ' ')}](study-{about.name}/{path.name})"]
    for path in sorted(args.folder.glob("*.md")):
        table = path.read_text(encoding="utf-8").strip().splitlines()
        lines += ["", f'??? note "Table: {path.stem.replace("-", " ")}"', "", *(f"    {row}" for row in table)]
    block = "\n".join(["<!-- study -->", "", *lines, "", "<!-- end -->"])
    marks = re.compile(r"<!-- study -->.*?<!-- end -->", re.DOTALL)
    page.write_text(marks.sub(lambda found: block, text), encoding="utf-8")


if __name__ == "__main__":
    main()
