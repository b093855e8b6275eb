"""Where an index keeps its views."""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDER = "views"


def views_of(folder: Path) -> list[Path]:
    """The folders of an index's views, finished or not."""
    return sorted(path for path in (folder / FOLDER).glob("*") if path.is_dir())


def remove_view(folder: Path) -> None:
    """Remove a view; of one that lies elsewhere the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
