"""kill -9 at random moments and at every step: what is left goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import killed
from finetrace.errors import FinetraceError
from finetrace.index import open_index
from finetrace.reading import write_examples
from test_index import files
from tiny import make_examples

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes are forked")

KILLS = 20


@pytest.mark.parametrize("kronecker", [None, "model"])
def test_killed_at_random_moments(base_folder: Path, adapter_folder: Path, tmp_path: Path, kronecker: Any) -> None:
    given = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 31, "rows_per_shard": 2}
    given |= {"kronecker": kronecker}
    finished, _, duration = killed.run(killed.build, tmp_path / "whole", **given)
    assert finished
    expected = files(tmp_path / "whole")
    draw, stopped, folder = random.Random(5), 0, tmp_path / "i"
    for _ in range(KILLS // 2):  # the two variants make twenty
        finished, _, _ = killed.run(killed.build, folder, after=draw.uniform(0, duration), **given)
        stopped += not finished
        if finished:
            assert files(folder) == expected
            shutil.rmtree(folder)
        else:
            assert_unfinished_or_whole(folder, expected)
    killed.run(killed.build, folder, **given)
    assert files(folder) == expected
    assert stopped >= KILLS // 4  # else the test looked at nothing


def assert_unfinished_or_whole(folder: Path, expected: dict[str, bytes]) -> None:
    """What a kill left is said to be unfinished, or has all its rows."""
    try:
        index = open_index(folder)
    except FinetraceError as error:
        assert "unfinished" in str(error) or "no index there" in str(error)  # noqa: PT017
        return
    assert {name: data for name, data in files(folder).items() if "factors" not in name and "part" not in name} == {
        name: data for name, data in expected.items() if "factors" not in name
    }
    assert len(index) == index.manifest.examples


@pytest.mark.slow
@pytest.mark.parametrize("kronecker", [None, "model", "data"])
def test_killed_before_every_step(base_folder: Path, adapter_folder: Path, tmp_path: Path, kronecker: Any) -> None:
    """Before each change of the file system that Python makes; two shards."""
    given = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 5, "rows_per_shard": 3}
    given |= {"kronecker": kronecker}
    _, steps, _ = killed.run(killed.build, tmp_path / "whole", **given)
    expected = files(tmp_path / "whole")
    assert steps > 20
    folder = tmp_path / "i"
    for step in range(steps):
        assert not killed.run(killed.build, folder, die_at=step, **given)[0]
        assert killed.run(killed.build, folder, **given)[0]
        assert files(folder) == expected, f"killed before step {step}"
        shutil.rmtree(folder)


COMMAND = """
import sys
from finetrace.index import sizing
sizing.SHARD_BYTES = 8_000
from finetrace.cli import main
sys.argv = ["finetrace", "index", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [(), ("--engine", "processes", "--workers", "2")], ids=["alone", "processes"])
def test_the_command_killed_at_random_moments(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    """From the start of the interpreter to its end, the coordinator alone killed; its workers end by themselves."""
    data = tmp_path / "rows.jsonl"
    write_examples(data, make_examples(120))
    options = ["--model", base_folder, "--adapter", adapter_folder, "--dtype", "float64", "--device", "cpu"]

    def command(out: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", COMMAND, data, "--out", out, *options, "--kronecker", "model", *engine]
        return subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    began = time.monotonic()
    process = command(tmp_path / "whole")
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    duration, expected = time.monotonic() - began, files(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("shards")]) > 5
    draw, stopped, folder = random.Random(7), 0, tmp_path / "i"
    for _ in range(KILLS // 2):
        process = command(folder)
        try:
            process.wait(draw.uniform(duration / 3, duration))  # imports are behind it by then
        except subprocess.TimeoutExpired:
            process.kill()
        said = process.communicate()[1].decode()
        stopped += process.returncode != 0
        assert process.returncode in (0, -signal.SIGKILL), said
        if process.returncode == 0:
            assert files(folder) == expected
            shutil.rmtree(folder)
        elif folder.exists():
            assert_unfinished_or_whole(folder, expected)
    process = command(folder)
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert files(folder) == expected
    assert stopped >= KILLS // 4
