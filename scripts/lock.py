"""Rewrite requirements/lock.txt and lock-3.10.txt: python scripts/lock.py [--python310 PATH].

Asks pip to resolve what pyproject.toml and the development tools need, with torch pinned, without installing anything. Each
file is resolved by an interpreter of its own: with `--python-version` alone, pip takes what the running one does not need
for unneeded there, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = "torch==2.13.0"
ROOT = Path(__file__).parent.parent
# the newest releases that run on every Python from 3.10 on where they would otherwise differ
PINS = ["numpy==2.2.6", "scipy==1.15.3", "scikit-learn==1.7.2", "pandas==2.3.3"]
HEADER = "# Made by scripts/lock.py for Python {version}; make installs it after torch.\n"


def dependencies() -> list[str]:
    """Everything in pyproject.toml that `make` needs, torch left out."""
    import tomllib  # type: ignore[import-not-found,unused-ignore]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["cluster"], "setuptools>=77"]
    return [each for each in wanted if not each.startswith("torch")]


def resolve(python: str) -> list[str]:
    """Pinned requirements for an interpreter that has pip."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.json"
        command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:"]
        command += ["--report", str(report), *PINS, *dependencies(), TORCH]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    names = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in found}
    return [f"{name}=={names[name]}" for name in sorted(names) if keep(name)] + [TORCH]


def keep(name: str) -> bool:
    """torch stands by itself, and the CUDA wheels that one of its builds asks for are its own affair."""
    return name not in ("torch", "triton") and not name.startswith(("nvidia-", "cuda-"))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python310", default="python3.10", help="an interpreter of Python 3.10")
    older = shutil.which(parser.parse_args().python310)
    if older is None:
        parser.error("no Python 3.10 was found; name one with --python310.")
    for name, python, label in (("lock.txt", sys.executable, "3.11 to 3.13"), ("lock-3.10.txt", older, "3.10")):
        lines = resolve(python)
        (ROOT / "requirements" / name).write_text(HEADER.format(version=label) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
