"""Progress of long work on standard error: rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Heard = Callable[[str, int], None]
_listeners: list[Heard] = []


@contextmanager
def hearing(heard: Heard) -> Iterator[None]:
    """While open, `heard` gets the title and the units of every advance of every tracker."""
    _listeners.append(heard)
    try:
        yield
    finally:
        _listeners.remove(heard)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else "", style="dim")


class Tracker:
    """A line that shows `title`, how many of `total` units are done, the rate, the time left and a note.

    Use it as a context manager, or with `start` and `stop`.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        console = Console(stderr=True)
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, note="")

    def start(self) -> Tracker:
        """Show the line."""
        self._progress.start()
        return self

    def stop(self) -> None:
        """Leave the line as it stands."""
        self._progress.stop()

    def advance(self, units: int = 1) -> None:
        """So many more units are done."""
        self._progress.advance(self._task, units)
        for heard in tuple(_listeners):
            heard(self._title, units)

    def note(self, text: str) -> None:
        """A few words at the end of the line."""
        self._progress.update(self._task, note=text)

    def __enter__(self) -> Tracker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
