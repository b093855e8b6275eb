"""Workers that are Ray actors, on a cluster that is running or on one that is started on this machine."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from finetrace.errors import FinetraceError
from finetrace.execution.dispatch import Event, Pool
from finetrace.execution.worker import SEEN, attempt, revived, settle

PATIENCE = 300.0  # seconds for the first worker to start
STORE_BYTES = 256 << 20  # of a cluster started here: descriptions and results are small, and more goes to disk


class RayPool(Pool):
    """Actors that hold `work` and do items one after another; `dispatch` starts another where one has died."""

    def __init__(
        self,
        work: Callable[[Any], Any],
        workers: int,
        address: str | None,
        gpus_per_task: float | None,
        threads: int,
        shared: Path | None,
    ) -> None:
        """Connect to the cluster at `address`, or start one with `workers` CPUs; a connection that is there is used.

        Raises:
            FinetraceError: Ray is not installed, the cluster cannot be reached, or no worker fits on it.
        """
        self._ray = _ray()
        self._own = not self._ray.is_initialized()
        self._token: Path | None = None
        self._running: dict[Any, tuple[Hashable, str]] = {}  # by reference: whose, and the event that it will be
        self._actors: dict[Hashable, Any] = {}
        self._count = 0
        self._began, self._any_ready = time.monotonic(), False
        if self._own:
            _connect(self._ray, address, workers)
        try:
            gpus = self._gpus(gpus_per_task)
            cpus = threads if address is not None else 1
            self._refuse_what_never_fits(cpus, gpus)
            self._seen = self._write_token(shared)
            self._work = self._ray.put(work)
            self._settings = threads, os.getcwd()
            self._actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Ask for one more; it is ready once the cluster has room for it, and has seen the shared folder."""
        name = self._count
        self._count += 1
        self._actors[name] = self._actor.remote(self._work, *self._settings)
        self._running[self._actors[name].ready.remote(self._seen)] = name, "ready"

    def give(self, worker: Hashable, item: Any) -> None:
        """Send the item; that the actor has died is seen by `wait`."""
        self._running[self._actors[worker].do.remote(item)] = worker, "done"

    def wait(self) -> list[Event]:
        """Wait for calls to return, or for actors to be gone."""
        while not (returned := self._ray.wait(list(self._running), num_returns=1, timeout=5.0)[0]):
            if not self._any_ready and time.monotonic() - self._began > PATIENCE:
                raise FinetraceError(
                    f"no Ray worker could start within {PATIENCE:.0f} seconds; look at `ray status` for what the cluster has "
                    "free, and give fewer --gpus-per-task."
                )
        events = []
        for reference in returned:
            worker, kind = self._running.pop(reference)
            try:
                kind, value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                del self._actors[worker]
                events.append(Event(worker, "died", type(error).__name__))
                continue
            self._any_ready = True
            events.append(Event(worker, kind, revived(value) if kind == "failed" else value))
        return events

    def close(self) -> None:
        """Kill the actors; a cluster that was started here ends with them."""
        if self._token is not None:
            self._token.unlink(missing_ok=True)
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._running.clear()
        if self._own:
            self._ray.shutdown()

    def _gpus(self, wanted: float | None) -> float:
        if wanted is not None:
            return wanted
        return 1.0 if self._ray.cluster_resources().get("GPU", 0) >= 1 else 0.0

    def _refuse_what_never_fits(self, cpus: int, gpus: float) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            most = ", ".join(f"{node.get('CPU', 0):.0f} CPUs and {node.get('GPU', 0):.0f} GPUs" for node in nodes[:4])
            raise FinetraceError(
                f"no node of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs, which each worker asks for (they have {most}); "
                "give fewer --gpus-per-task, or a smaller OMP_NUM_THREADS."
            )

    def _write_token(self, shared: Path | None) -> tuple[str, str] | None:
        """(path, content) of a file in the shared folder that workers have to find."""
        if shared is None:
            return None
        content = secrets.token_hex(16)
        token = shared.resolve() / f"{SEEN}{content[:8]}"
        try:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.write_text(content)
        except OSError as error:
            raise FinetraceError(f"{shared}: cannot be written ({error}); choose another folder.") from error
        self._token = token
        return str(token), content


class _Actor:
    """One worker."""

    def __init__(self, work: Callable[[Any], Any], threads: int, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # what the coordinator names by a relative path
        settle(threads)
        self.work = work

    def ready(self, seen: tuple[str, str] | None) -> tuple[str, Any]:
        """(`ready`, None), or why this worker cannot take part."""
        if seen is None:
            return "ready", None
        try:
            if Path(seen[0]).read_text() == seen[1]:
                return "ready", None
            why = "another file is there"
        except OSError as error:
            why = str(error)
        folder = Path(seen[0]).parent
        error_ = FinetraceError(
            f"{folder}: the Ray worker on {os.uname().nodename} does not see this folder ({why}); put --out on storage that "
            "all nodes mount at the same path."
        )
        return "failed", (error_, "")

    def do(self, item: Any) -> tuple[str, Any]:
        """(`done`, result), or (`failed`, error)."""
        return attempt(self.work, item)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise FinetraceError(
            "--engine ray needs Ray, which is not installed; run: pip install 'finetrace[cluster]' (or use --engine processes)."
        ) from error
    return ray


def _connect(ray: Any, address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
            ray.init(address="local", **own, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        where = (
            "a Ray cluster cannot be started here" if address is None else f"--address {address}: no Ray cluster there"
        )
        raise FinetraceError(f"{where} ({first}); see docs/how-to/cluster.md.") from error
