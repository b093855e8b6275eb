"""The lock files name all that their Python needs: pip reads a lock file and nothing else of what is in it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parent.parent / "requirements"
ALONE = re.compile("nvidia|cuda|triton")  # what some builds of torch ask for


def locked(name: str) -> dict[str, str]:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    pinned = (line.partition("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, _, version in pinned}


@pytest.mark.parametrize(("name", "version"), [("lock-3.10.txt", "3.10"), ("lock.txt", "3.11"), ("lock.txt", "3.13")])
def test_what_is_locked_lacks_nothing_that_it_needs(name: str, version: str) -> None:
    """By what installed releases ask for on that Python, where they are those that are locked."""
    there, missing, looked = locked(name), [], 0
    environment = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    for each in sorted(there):
        try:
            if metadata.version(each).partition("+")[0] != there[each]:
                continue
            needs = metadata.requires(each) or []
            looked += 1
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            other = canonicalize_name(need.name)
            wanted = need.marker is None or need.marker.evaluate(environment)
            if wanted and other not in there and not ALONE.match(other):
                missing.append(f"{each} needs {need}")
    assert looked > 20
    assert not missing
