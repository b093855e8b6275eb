"""The verdict of retraining that an index carries, for every report page of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetrace.errors import FinetraceError
from finetrace.index.manifest import write_atomically

NAME = "validation.json"


def keep_verdict(index: Path, verdict: Sequence[str], command: str) -> None:
    """Leave the sentences in the folder of an index, with the command that found them."""
    document = {"verdict": list(verdict), "command": command}
    write_atomically(index / NAME, json.dumps(document, indent=1).encode())


def kept_verdict(index: Path) -> str | None:
    """The verdict that an index carries, as one paragraph; `None` where it was not validated."""
    path = index / NAME
    if not path.exists():
        return None
    try:
        sentences = json.loads(path.read_text(encoding="utf-8"))["verdict"]
        return "Validated by retraining. " + " ".join(map(str, sentences))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FinetraceError(
            f"{path}: this verdict cannot be read ({error}); remove it, or run finetrace validate again."
        ) from error
