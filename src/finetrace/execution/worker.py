"""What every worker is told when it starts, whatever started it."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

NUMBER = "FINETRACE_WORKER"  # of a worker process on this machine; decides which of several GPUs it takes
SEEN = ".seen-"  # how a file begins that workers on other machines have to find


def settle(threads: int, number: int | None = None) -> None:
    """Threads of this process, and its number among the workers of the machine.

    What libraries have to say of their own future is said once, by the coordinator, and not by every worker.
    """
    warnings.simplefilter("ignore", FutureWarning)
    if number is not None:
        os.environ[NUMBER] = str(number)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(threads)


def attempt(work: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    """(`done`, result) or (`failed`, error) of one item; the error can be pickled and carries its traceback as its cause."""
    import pickle

    try:
        return "done", work(item)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return "failed", (error, text)


def revived(failed: tuple[BaseException, str]) -> BaseException:
    """An error from a worker, with where it was raised as its cause: a traceback does not travel."""
    error, text = failed
    error.__cause__ = RuntimeError(f"in a worker:\n{text}")
    return error
