"""Where an index keeps its views."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetrace import lock
from finetrace.index import manifest

FOLDER = "views"


def views_of(folder: Path) -> list[Path]:
    """The folders of an index's views, finished or not."""
    return sorted(path for path in (folder / FOLDER).glob("*") if path.is_dir())


def root_of(folder: Path) -> Path:
    """The folder of the index that a view is of; that of an index is its own."""
    root = folder.parent.parent
    return root if folder.parent.name == FOLDER and (root / manifest.NAME).exists() else folder


def headless(folder: Path) -> bool:
    """Whether a folder has what comes after a manifest, and no manifest: it was lost, since it is the first to be written."""
    if (folder / manifest.NAME).exists() or not folder.is_dir():
        return False
    return any(path.name not in (manifest.PART, lock.NAME) for path in folder.iterdir())


def remove_view(folder: Path) -> None:
    """Remove a view; of one that lies elsewhere the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
