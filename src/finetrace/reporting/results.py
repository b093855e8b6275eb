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
