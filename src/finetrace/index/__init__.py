"""The index: a folder that answers queries without the training code or data."""

from finetrace.index.appending import append
from finetrace.index.build import build_index
from finetrace.index.store import Index, open_index
from finetrace.index.views import kronecker_factors, view

__all__ = ["Index", "append", "build_index", "kronecker_factors", "open_index", "view"]
