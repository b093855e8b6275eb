"""kill -9 at random moments and at every step: what is left goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import killed
from finetrace.errors import FinetraceError
from finetrace.index import open_index
from finetrace.index.manifest import Manifest
from finetrace.reading import write_examples
from test_index import files
from tiny import make_examples

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these processes are forked")

KILLS = 20


class Moments:
    """Seconds after which to kill, drawn within the length of an undisturbed run as far as it is known.

    A run that came to its end shortens that, so that kills hit on a machine whose first run was slow too.
    """

    def __init__(self, seed: int, seconds: float, first: float = 0.0) -> None:
        self.draw, self.seconds, self.first = random.Random(seed), seconds, first
        self.stopped = self.tried = 0

    def __iter__(self) -> Iterator[float]:
        """`KILLS` / 2 moments (two variants make twenty), and more as long as not half of them stopped a run."""
        while self.tried < KILLS // 2 or (self.stopped < KILLS // 4 and self.tried < 5 * KILLS):
            self.tried += 1
            yield self.draw.uniform(self.first, 1) * self.seconds
        assert self.stopped >= KILLS // 4  # else the test looked at nothing

    def note(self, stopped: bool, seconds: float) -> None:
        """What became of the last one, and how long it ran."""
        self.stopped += stopped
        if not stopped:
            self.seconds = min(self.seconds, (self.seconds + seconds) / 2)


@pytest.mark.parametrize("kronecker", [pytest.param(None, marks=pytest.mark.slow), "model"])
def test_killed_at_random_moments(base_folder: Path, adapter_folder: Path, tmp_path: Path, kronecker: Any) -> None:
    given = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 31, "rows_per_shard": 2}
    given |= {"kronecker": kronecker}
    finished, _, duration = killed.run(killed.build, tmp_path / "whole", **given)
    assert finished
    expected = files(tmp_path / "whole")
    moments, folder = Moments(5, duration), tmp_path / "i"
    for after in moments:
        finished, _, seconds = killed.run(killed.build, folder, after=after, **given)
        moments.note(not finished, seconds)
        if finished:
            assert files(folder) == expected
            shutil.rmtree(folder)
        else:
            assert_unfinished_or_whole(folder, expected)
    killed.run(killed.build, folder, **given)
    assert files(folder) == expected


@pytest.mark.parametrize("at", [0, 1, 2, 6])
def test_killed_while_safetensors_writes(base_folder: Path, adapter_folder: Path, tmp_path: Path, at: int) -> None:
    """Its own temporary file is nobody's at the next start; first a shard or its sums, last the factors."""
    given = {"base": str(base_folder), "adapter": str(adapter_folder), "rows": 5, "rows_per_shard": 3}
    given |= {"kronecker": "model"}
    assert killed.run(killed.build, tmp_path / "whole", **given)[0]
    assert not killed.run(killed.build_dying_in_the_library, tmp_path / "i", at=at, **given)[0]
    assert list((tmp_path / "i").rglob(".tmp*"))
    assert killed.run(killed.build, tmp_path / "i", **given)[0]
    assert files(tmp_path / "i") == files(tmp_path / "whole")


def assert_unfinished_or_whole(folder: Path, expected: dict[str, bytes]) -> None:
    """What a kill left is said to be unfinished, or has all its rows."""
    try:
        index = open_index(folder)
    except FinetraceError as error:
        assert "unfinished" in str(error) or "no index there" in str(error)  # noqa: PT017
        return
    apart = ("factors", "part", "manifest")
    there, whole = (
        {name: data for name, data in each.items() if not any(word in name for word in apart)}
        for each in (files(folder), expected)
    )
    assert there == whole
    assert index.manifest == Manifest.model_validate_json(expected["manifest.json"])  # some of it may be in the journal
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
    moments, folder = Moments(7, duration, first=1 / 3), tmp_path / "i"  # imports are behind it by then
    for after in moments:
        began = time.monotonic()
        process = command(folder)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
        said = process.communicate()[1].decode()
        moments.note(process.returncode != 0, time.monotonic() - began)
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
