"""Is the adapter that an index keeps the one it was built with?"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finetrace import fingerprint
from finetrace.errors import FinetraceError
from finetrace.index.manifest import Manifest, inside


def fault(folder: Path, about: Manifest) -> tuple[Path, str] | None:
    """The file that is missing, broken or of another adapter, with a sentence; `None` where nothing is wrong.

    An adapter of another kind than plain LoRA is read, and compared whenever its model is loaded.
    """
    if about.model.adapter is None:
        return None
    path = folder / about.model.adapter
    try:
        home = inside(folder, about.model.adapter)
        path = home / "adapter_config.json"
        json.loads(path.read_text(encoding="utf-8"))
        path = home / "adapter_model.safetensors"
        with safe_open(str(path), framework="pt") as file:
            found = fingerprint.of_adapter_file({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FinetraceError as error:
        return path, str(error)
    except (OSError, ValueError, SafetensorError) as error:
        return path, f"{path}: cannot be read ({error})."
    if found not in (None, about.model.adapter_fingerprint):
        return path, f"{path}: not the adapter that the index was built with."
    return None
