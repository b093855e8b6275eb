"""Memory of the machine and of containers and jobs within it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetrace import host_memory
from finetrace.doctor.machine import memory


def test_memory_of_this_machine_is_known() -> None:
    found = host_memory.available_memory()
    assert found is not None
    assert found > 1 << 20


def test_files_that_were_read_do_not_count_as_memory_that_a_container_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{90 << 20}\n")
    assert host_memory.available_memory() == 10 << 20
    (tmp_path / "memory.stat").write_text(f"anon {20 << 20}\ninactive_file {50 << 20}\nactive_file {20 << 20}\n")
    assert host_memory.available_memory() == 80 << 20


def test_a_limit_of_the_first_version_of_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{100 << 20}\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(f"{90 << 20}\n")
    assert host_memory.available_memory() == 10 << 20
    stat = f"inactive_file 0\ntotal_inactive_file {50 << 20}\ntotal_active_file {20 << 20}\n"
    (tmp_path / "memory" / "memory.stat").write_text(stat)
    assert host_memory.available_memory() == 80 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_within_others_counts(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the jobs of a cluster have it, in a group of their own below that of the machine, which has none."""
    named = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    root = tmp_path / "memory" if version == 1 else tmp_path
    job = root / "slice" / "job_7" / "step_0"
    job.mkdir(parents=True)
    for place, most, taken in ((job, "max", 5 << 20), (job.parent, 60 << 20, 25 << 20), (root, 1 << 62, 90 << 20)):
        (place / named[0]).write_text(f"{most}\n")
        (place / named[1]).write_text(f"{taken}\n")
    own = {1: "9:name=systemd:/\n4:cpu,memory:/slice/job_7/step_0\n0::/\n", 2: "0::/slice/job_7/step_0\n"}[version]
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "own", raising=False)
    assert host_memory.available_memory() == 35 << 20
    assert f"the container may use {(60 << 20) / 1e9:.1f} GB" in memory().what
    (tmp_path / "own").write_text("0::/../elsewhere\n1:memory:/no/such/group\n")  # seen from within a container
    (root / named[0]).write_text(f"{100 << 20}\n")
    assert host_memory.available_memory() == 10 << 20
    (tmp_path / "own").unlink()
    assert host_memory.available_memory() == 10 << 20
