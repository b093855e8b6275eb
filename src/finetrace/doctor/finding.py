"""One line of a check-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, and how it stands.

    Attributes:
        name: What was looked at.
        state: `ok`; `note`, something works less well than it could or is not there; `problem`, something is broken without
            which finetrace does not work.
        what: One sentence of facts.
        remedy: What to do about it, empty where there is nothing to do.
        facts: The same as numbers.
    """

    name: str
    state: State
    what: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
