"""Every study's --quick on the embedded model, end to end as a user gives it; within the three minutes it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetrace.studies.registry import STUDIES

PROMISED = 180  # seconds, on two cores


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quick") / "cells"


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_study_keeps_its_promise(name: str, tmp_path: Path, cells: Path) -> None:
    command = [str(Path(sys.executable).parent / "finetrace"), "study", name, "--quick", "--out", str(tmp_path / name)]
    began = time.perf_counter()
    shared = ["--cells", str(cells)] if STUDIES[name].cells else []
    done = subprocess.run([*command, *shared], capture_output=True, text=True, check=False)
    spent = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / name / "results.json").read_text())
    assert document["records"]
    assert all(sentence in done.stdout for sentence in document["config"]["reading"])
    for kind in ("png", "svg", "md", "tex"):
        assert list((tmp_path / name).glob(f"*.{kind}")), f"no .{kind} was written"
    if (os.cpu_count() or 1) >= 2 and not os.environ.get("CI"):  # machines of every speed, and shared ones
        assert spent < PROMISED
