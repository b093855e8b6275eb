"""One thread fewer for arithmetic while another one reads: with one a core, all wait for the one whose core is shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetrace.execution import cores

LIGHT = 32  # vectors a row meets at most for reading to take as long as the arithmetic

_open = 0  # readers at this moment
_before = 0  # torch's threads without them


@contextmanager
def beside_a_reader(vectors: int) -> Iterator[None]:
    """Leave a core to a thread that reads rows, where each row meets so few vectors that reading is much of the work.

    Several readers at once, as for a mean of methods, take one core; torch has its threads again when the last is done.
    """
    global _open, _before
    if vectors > LIGHT:
        yield
        return
    if _open == 0:
        _before = torch.get_num_threads()
        if 1 < _before >= cores():
            torch.set_num_threads(_before - 1)
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if _open == 0:
            torch.set_num_threads(_before)
