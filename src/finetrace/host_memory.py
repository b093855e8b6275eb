"""Memory of this machine, or of the container or job in which this process runs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")  # in which groups this process is
# A container's limit, what it takes, and what of that are files: in version 2 of control groups, and in 1, by the controller
# that lines of `OWN` name.
LIMITS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def container_limit() -> int | None:
    """Bytes that the container, or the job of a cluster, in which this process is may take; `None` without a limit."""
    found = []
    for controller, limit, _, _ in LIMITS:
        for group in _groups(controller):
            with contextlib.suppress(OSError, ValueError):
                found.append(int(_said(group / limit)))
    return min(found, default=None)


def _left_to_container() -> int | None:
    """Bytes of its limit that a container has left; files that were read stay in its memory for as long as there is room.

    Of groups within groups, as jobs of a cluster are, the one that has the least.
    """
    found = []
    for controller, limit, taken, files in LIMITS:
        for group in _groups(controller):
            with contextlib.suppress(OSError, ValueError):  # another version, or no limit (`max`)
                left = int(_said(group / limit)) - int(_said(group / taken))
                with contextlib.suppress(OSError, ValueError):
                    known = dict(line.split() for line in _said(group / "memory.stat").splitlines())
                    left += sum(int(known.get(name, 0)) for name in files)
                found.append(max(0, left))
    return min(found, default=None)


def _groups(controller: str) -> list[Path]:
    """The folder of every group that this process is in, from the outermost: of a container that sees its own alone, that."""
    root = CGROUP / controller
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        for line in OWN.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                names = [name for name in path.split("/") if name]
    return [root.joinpath(*names[:depth]) for depth in range(len(names) + 1)] if ".." not in names else [root]


def _said(path: Path) -> str:
    return path.read_text(encoding="ascii")


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, within a container's limit; `None` where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    if (left := _left_to_container()) is not None:
        found.append(left)
    if found:
        return min(found)
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return None


def total_memory() -> int | None:
    """Bytes of this machine, or of a container's limit where that is lower; `None` where the system does not say."""
    limit = container_limit()
    with contextlib.suppress(AttributeError, ValueError, OSError):
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole if limit is None else min(whole, limit)
    return limit
