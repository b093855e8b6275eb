"""The verdict of retraining that an index carries, for every report page of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError
from finetrace.index import manifest
from finetrace.validation.plan import BASES, VALIDATED

NAME = "validation.json"


def keep_verdict(index: Path, verdict: Sequence[str], command: str, basis: str = VALIDATED) -> str | None:
    """Leave the sentences in the folder of an index, with what they rest on and the command that found them.

    A verdict of the same rows that rests on more is left as it is; the command that found it is returned then.
    """
    rows = manifest.read(index).data_fingerprint
    try:
        there = json.loads((index / NAME).read_text(encoding="utf-8"))
        if there["data_fingerprint"] == rows and BASES.index(there["basis"]) > BASES.index(basis):
            return str(there["command"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or none that a page could show
    document = {"verdict": list(verdict), "basis": basis, "command": command, "data_fingerprint": rows}
    write_atomically(index / NAME, json.dumps(document, indent=1).encode())
    return None


def kept_verdict(index: Path) -> str | None:
    """The verdict that an index carries, as one paragraph that says whether it was of other rows; `None` without one."""
    path = index / NAME
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        said = " ".join(map(str, document["verdict"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetraceError(
            f"{path}: this verdict cannot be read ({error}); remove it, or run finetrace validate again."
        ) from error
    of = document.get("data_fingerprint")
    changed = of is not None and of != manifest.read(index).data_fingerprint
    since = ", before the rows of the index changed" if changed else ""
    return f"{document.get('basis', VALIDATED)}{since}. {said}"
