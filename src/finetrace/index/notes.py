"""Noting shards as they become whole: a line of the journal each, and the manifest itself when it is worth it.

The manifest is written when the journal has as many lines as it has shards: all its writes together are a few of the last.
"""

from __future__ import annotations

from pathlib import Path

from finetrace.index.journal import Journal
from finetrace.index.manifest import JOURNAL, NAME, Arrival, Manifest, forget_journal, write

FEWEST = 64  # lines that a journal may have, however few shards there are


class Notes:
    """Shards as they become whole.

    One that was found broken stays noted until it is whole again, so that whoever goes on after a kill knows what it was.
    """

    def __init__(self, folder: Path, there: Manifest) -> None:
        """`there` is the manifest in the folder, with its journal."""
        self.folder = folder
        self._noted = there
        self._journal = Journal(folder / JOURNAL, (folder / NAME).read_bytes())
        self._arrived: list[Arrival] = []
        self._written = len(there.shards) - self._journal.lines  # in the manifest itself, about

    def add(self, arrival: Arrival) -> None:
        """On the disk when this returns."""
        self._arrived.append(arrival)
        if self._journal.lines < max(FEWEST, self._written):
            self._journal.add(arrival.model_dump_json())
        else:
            self.fold()

    def fold(self) -> None:
        """Bring the journal into the manifest."""
        if self._arrived or self._journal.lines:
            self._noted, self._arrived = self._noted.having(self._arrived), []
            write(self.folder, self._noted)
            self._written = len(self._noted.shards)
            self._journal = Journal(self.folder / JOURNAL, (self.folder / NAME).read_bytes())
        forget_journal(self.folder)  # that of a manifest before, too
