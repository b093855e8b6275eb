"""The verdict of retraining that an index carries, for every report page of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetrace.atomic import write_atomically
from finetrace.errors import FinetraceError
from finetrace.index import manifest
from finetrace.reporting.results import config_of
from finetrace.units import many
from finetrace.validation.plan import BASES, RETRAINED, VALIDATED, Validation

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


def replaced(folder: Path, plan: Validation) -> str | None:
    """What to say before results of more seeds, more subsets or other measures are replaced in a folder; `None` if none are."""
    config = config_of(folder)
    try:
        measures, seeds, subsets = list(config["measures"]), int(config["seeds"]), int(config["subsets"])
    except (ValueError, KeyError, TypeError):  # nobody's validation
        return None
    shared, was, will = set(measures) & set(plan.measures), [], []
    if shared & RETRAINED and seeds > plan.seeds:
        was.append(many(seeds, "seed"))
        will.append(many(plan.seeds, "seed"))
    if "lds" in shared and subsets > plan.subsets:
        was.append(many(subsets, "subset"))
        will.append(many(plan.subsets, "subset"))
    gone = [name for name in measures if name not in plan.measures]
    if not was + gone:
        return None
    will += [f"no {name}" for name in gone]
    return (
        f"{folder / 'results.json'} holds {', '.join(was + gone)} and will hold {', '.join(will)}, and so will tables and "
        "figures; all retrainings stay, and the options of before write it again"
    )
