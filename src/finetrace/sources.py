"""Where rows come from: a file, a folder saved by `datasets`, or the Hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from finetrace.errors import FinetraceError
from finetrace.formats import READERS, Table, first_line, pick_split, table_of

# What someone may type and mean a file by, although it is not read here: never to be looked up on the Hub.
_OTHER_FILE = re.compile(
    r"\.(txt|md|html|xml|ya?ml|xlsx?|docx|pdf|gz|bz2|xz|zst|zip|tar|arrow|feather|orc|avro|db|pkl|np[yz]|pt|safetensors)"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_table(source: str | Path, split: str | None, subset: str | None) -> Table:
    """Read a file by its suffix, a folder of `save_to_disk`, or else a dataset of the Hub.

    Raises:
        FinetraceError: Nothing is there, it cannot be read, or `split` or `subset` make no sense for it.
    """
    if source == "":
        raise FinetraceError("the name of the data is empty; give the path of a file, or the name of a dataset")
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, a forbidden folder, no home
        raise FinetraceError(f"{str(source)!r} cannot be looked up ({error}); give the path of a file") from None
    if not exists:
        if isinstance(source, Path) or not _may_be_on_hub(source):
            raise FinetraceError(_missing(source, path))
        return _read_hub(source, split, subset, _close_names(path))
    if subset is not None:
        raise FinetraceError(
            f"{source} is here on disk, and only a dataset of the Hub has subsets; leave out {subset!r}"
        )
    if is_folder:
        return _read_folder(path, str(source), split)
    if path.suffix.lower() not in READERS:
        raise FinetraceError(f"{source} has no suffix that finetrace reads; save it as one of {', '.join(READERS)}")
    return READERS[path.suffix.lower()](path, str(source), split)


def _read_folder(path: Path, name: str, split: str | None) -> Table:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved:
        readable = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in READERS)
        hint = f"name one of its files: {', '.join(readable[:10])}" if readable else "it holds no file that can be read"
        raise FinetraceError(f"the folder {name} was not saved by datasets.save_to_disk; {hint}")
    import datasets

    try:
        data = datasets.load_from_disk(os.fspath(path))
    except Exception as error:  # anything from Arrow, JSON or the file system
        raise FinetraceError(f"the saved dataset {name} cannot be read ({first_line(error)}); save it again") from error
    if isinstance(data, datasets.DatasetDict):
        data = data[pick_split([str(key) for key in data], split, name)]
    elif split is not None and str(data.split) != split:
        raise FinetraceError(f"{name} is one saved dataset without splits; leave out the split {split!r}")
    return table_of(data, name)


def _read_hub(name: str, split: str | None, subset: str | None, close: str) -> Table:
    import datasets

    wanted = split or "train"
    try:
        data = datasets.load_dataset(name, subset, split=wanted)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FinetraceError(
            f"there is no file or folder {name!r} here and no dataset of that name open to you on the Hugging Face Hub "
            f"({first_line(error)}); check the spelling{close}, or log in if it is gated"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise FinetraceError(
            f"there is no file or folder {name!r} here and the Hugging Face Hub cannot be reached "
            f"({first_line(error)}); check the path{close} or the connection"
        ) from error
    except Exception as error:  # the Hub, its client, its file systems and pyarrow each raise their own
        which = f"split {wanted!r}" + (f", subset {subset!r}" if subset else "")
        raise FinetraceError(
            f"the dataset {name!r} ({which}) cannot be loaded from the Hugging Face Hub ({first_line(error)}); "
            "check its name, split and subset"
        ) from error
    return table_of(data, name)


def _may_be_on_hub(source: str) -> bool:
    suffix = Path(source).suffix.lower()
    return bool(_HUB_NAME.fullmatch(source)) and suffix not in READERS and not _OTHER_FILE.fullmatch(suffix)


def _missing(source: str | Path, path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no file {source}: its folder {path.parent} does not exist; check the path"
    return f"there is no file {source}; check the path{_close_names(path)}"


def _close_names(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:  # a folder that may not be listed has no names to suggest
        return ""
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
