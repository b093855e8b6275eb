"""results.json and its Parquet twin: flat records, and the configuration they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError


def write_results(folder: Path, records: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Path:
    """Write `results.json` (`config`, `records`) and `results.parquet` in `folder`; returns the former."""
    import pandas as pd

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{folder}: cannot be written ({error}).") from error
    document = {"config": dict(config), "records": [dict(record) for record in records]}
    path = folder / "results.json"
    write_atomically(path, (json.dumps(document, indent=1, default=str) + "\n").encode())
    write_atomically(folder / "results.parquet", pd.DataFrame.from_records(list(records)).to_parquet(index=False))
    return path


def config_of(folder: Path) -> Mapping[str, Any]:
    """The configuration that a folder's results come from; empty where there are none that can be read."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def of_more_seeds(folder: Path, seeds: int) -> str | None:
    """What to say before a folder's results are written for fewer seeds than they are of; `None` where they are of no more."""
    config = config_of(folder)
    before = config.get("seeds")
    if not isinstance(before, int) or before <= seeds or config.get("missing"):
        return None
    return (
        f"{folder / 'results.json'} and its tables are of {before} seeds and will be of {seeds}; what was found for the "
        f"others stays, and --seeds {before} writes them again"
    )
