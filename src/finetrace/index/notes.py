"""Noting shards as they become whole: a line of the journal each, and the manifest itself when it is worth it.

The manifest is written when the journal has as many lines as it has shards: all its writes together are a few of the last.
"""

from __future__ import annotations

from pathlib import Path

from finetrace.index.journal import Journal
from finetrace.index.manifest import JOURNAL, NAME, Arrival, Manifest, forget_journal, write

FEWEST = 64  # lines that a journal may have, however few shards there are


class Notes:
    """Shards as they become whole."""

    def __init__(self, folder: Path, started: Manifest, there: Manifest) -> None:
        """`started` lacks shards of the one that is `there` if they were found broken: the first note takes them out."""
        self.folder = folder
        self._noted = started
        self._fewer = started.shards != there.shards
        self._journal = Journal(folder / JOURNAL, (folder / NAME).read_bytes())
        self._arrived: list[Arrival] = []
        self._written = len(started.shards) - self._journal.lines  # in the manifest itself

    def add(self, arrival: Arrival) -> None:
        """On the disk when this returns."""
        self._arrived.append(arrival)
        if not self._fewer and self._journal.lines < max(FEWEST, self._written):
            self._journal.add(arrival.model_dump_json())
        else:
            self.fold()

    def fold(self) -> None:
        """Bring the journal into the manifest."""
        if self._arrived or self._journal.lines:
            self._noted, self._arrived = self._noted.having(self._arrived), []
            write(self.folder, self._noted)
            self._fewer, self._written = False, len(self._noted.shards)
            self._journal = Journal(self.folder / JOURNAL, (self.folder / NAME).read_bytes())
        forget_journal(self.folder)  # that of a manifest before, too
