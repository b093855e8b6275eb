"""One command as a user gives it, in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetrace.cli import main
from tiny import make_llama, save_base


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    before = sys.argv
    sys.argv = ["finetrace", *map(str, arguments)]
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class _Quiet:
    """In place of capsys where a fixture outlives a test."""

    def readouterr(self) -> Any:
        return type("Captured", (), {"out": "", "err": ""})()


def tuned_index(folder: Path, data: Path, epochs: int = 2, columns: Sequence[object] = ()) -> Path:
    """`base`, `adapter` and `idx` in `folder`: a tiny model, fine-tuned on `data` and indexed, as a user gives the commands.

    `columns` are options that name the columns of `data`.
    """
    save_base(folder / "base", make_llama().float())
    here = ["--model", folder / "base", *columns]
    tuned = ["--epochs", epochs, "--learning-rate", 0.01, "--batch-size", 4, "--rank", 2, "--out", folder / "adapter"]
    assert run(_Quiet(), "finetune", data, *here, *tuned)[0] == 0
    assert run(_Quiet(), "index", data, "--out", folder / "idx", "--adapter", folder / "adapter", *here)[0] == 0
    return folder
