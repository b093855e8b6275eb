"""Where an index keeps its views."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetrace import lock
from finetrace.errors import FinetraceError
from finetrace.index import manifest

FOLDER = "views"
GONE = ".views.gone"  # where views are while they are removed


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
    """Remove a view; of one that lies elsewhere the link alone.

    It goes from its place in one step, since another process may be reading it, and writing to its cache.

    Raises:
        FinetraceError: It cannot be removed.
    """
    root = folder.parent.parent
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        sweep_views(root)
        (root / GONE).mkdir(exist_ok=True)
        folder.rename(root / GONE / folder.name)
    except OSError as error:
        raise FinetraceError(f"{folder}: this view cannot be removed ({error}); remove it, and start again.") from error
    sweep_views(root)


def sweep_views(root: Path) -> None:
    """Remove what is left of views that were removed, as far as that can be done now."""
    shutil.rmtree(root / GONE, ignore_errors=True)
