"""finetrace: which training examples made my fine-tuned language model say that, and can I trust the answer?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetrace._version import __version__

if TYPE_CHECKING:
    from finetrace.api import Index, build_index, open_index
    from finetrace.attribution import Scores
    from finetrace.errors import FinetraceError
    from finetrace.examples import Example
    from finetrace.reading import read_examples

# loaded on first use, so that `import finetrace` and `finetrace --help` do not wait for torch
_HOMES = {
    "Index": "finetrace.api",
    "build_index": "finetrace.api",
    "open_index": "finetrace.api",
    "Scores": "finetrace.attribution",
    "FinetraceError": "finetrace.errors",
    "Example": "finetrace.examples",
    "read_examples": "finetrace.reading",
}

__all__ = ["Example", "FinetraceError", "Index", "Scores", "__version__", "build_index", "open_index", "read_examples"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'finetrace' has no attribute {name!r}")
