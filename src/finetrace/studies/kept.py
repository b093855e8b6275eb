"""Parts of a study that are done once: measured, kept as JSON, and found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetrace.index.manifest import write_atomically
from finetrace.studies.study import Say


def kept(
    folder: Path, name: str, what: str, say: Say, measure: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The records of `parts/NAME.json`, measured now if they are not there.

    Args:
        folder: Of the study.
        name: Of the part; it has to say everything that decides the records.
        what: What is said before it is measured.
        say: Hears it.
        measure: Makes the records.
    """
    path = folder / "parts" / f"{name}.json"
    if not path.exists():
        say(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measure()).encode())
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
