"""The index: a folder that answers queries without the training code or data."""

from finetrace.index.build import build_index
from finetrace.index.store import Index, open_index

__all__ = ["Index", "build_index", "open_index"]
