"""An index collected by several workers: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetrace.collection import Representation
from finetrace.collection.batch_pass import BatchPass
from finetrace.errors import FinetraceError
from finetrace.execution import Engine
from finetrace.execution.dispatch import Event, Pool
from finetrace.execution.worker import attempt, revived
from finetrace.index import append, kronecker_factors, open_index
from finetrace.index import collecting as module
from finetrace.index.work import Collected, Piece, ShardWork
from finetrace.models import Loaded, ModelSpec, load
from test_bad_rows import poisoned, rows
from test_index import PER_SHARD, ROWS, build, damage, files
from tiny import make_examples, make_llama, make_tokenizer, save_base, with_lora

TWO = Engine("processes", 2, threads=1)


def engine(name: str, workers: int = 2) -> Engine:
    if name == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install 'finetrace[cluster]'")
    return Engine(name, workers, threads=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def found_by_workers() -> Iterator[None]:
    """A Ray worker imports what it is sent by name, this module among it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def loaded(base_folder: Path, adapter_folder: Path) -> Loaded:
    return load(ModelSpec(str(base_folder), str(adapter_folder), dtype="float64", device="cpu"))


@pytest.fixture(scope="module")
def built(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collected in this process, with factors."""
    folder = tmp_path_factory.mktemp("engines") / "local"
    build(loaded, folder, kronecker="model")
    return folder


@dataclass(frozen=True)
class Marked(ShardWork):
    """Leaves its process id in `marks` under the first row of each piece, waits, and lets something happen at one row."""

    marks: Path = Path()
    at: int = -1
    times: int = 0
    how: str = ""
    wait: float = 0.0

    def __call__(self, piece: Piece) -> Collected:
        (self.marks / f"{piece.start}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(self.wait)
        if piece.start == self.at and len(list(self.marks.glob(f"{piece.start}-*"))) <= self.times:
            if self.how == "killed":
                (self.folder / "shards" / ".000000000.safetensors.other-7.part").write_bytes(b"half")
                for place in (self.folder / "shards", self.folder / "factors"):  # of which safetensors writes the file
                    left = place / ".000000002.safetensors.folder.other-7.part"
                    left.mkdir(parents=True, exist_ok=True)
                    (left / ".tmpAb12Cd").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            raise FinetraceError("row 9 is bad")
        return super().__call__(piece)


def marking(monkeypatch: pytest.MonkeyPatch, marks: Path, **options: Any) -> None:
    """Workers are `Marked`."""
    marks.mkdir()
    monkeypatch.setattr(module, "ShardWork", lambda *described: Marked(*described, marks=marks, **options))


def begun(marks: Path) -> list[tuple[int, int]]:
    """(first row, process id) of every piece that was begun, in time."""
    found = sorted((path.name.split("-") for path in marks.iterdir()), key=lambda parts: int(parts[2]))
    return [(int(start), int(pid)) for start, pid, _ in found]


def until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


SLOW = pytest.mark.slow  # workers that import everything, several times


@pytest.fixture(params=["processes", pytest.param("ray", marks=SLOW)])
def two(request: pytest.FixtureRequest) -> Engine:
    """Two workers of each kind; one Ray cluster for a test, as a command has it."""
    return engine(request.param)


@SLOW
def test_the_bytes_of_one_process(loaded: Loaded, built: Path, tmp_path: Path, two: Engine) -> None:
    index = build(loaded, tmp_path / "i", kronecker="model", engine=two)
    assert len(index) == ROWS
    assert files(tmp_path / "i") == files(built)


class Carried(Pool):
    """Workers in this process that get what a worker gets: everything is pickled on its way."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = pickle.loads(pickle.dumps(work))
        self.events: list[Event] = []
        self.started = 0

    def start(self) -> None:
        self.events.append(Event(self.started, "ready"))
        self.started += 1

    def give(self, worker: Hashable, item: Any) -> None:
        kind, value = attempt(self.work, pickle.loads(pickle.dumps(item)))
        value = pickle.loads(pickle.dumps(value))
        self.events.append(Event(worker, kind, revived(value) if kind == "failed" else value))  # type: ignore[arg-type]

    def wait(self) -> list[Event]:
        happened, self.events = self.events, []
        return happened

    def close(self) -> None:
        self.events.clear()


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(Engine, "_pool", lambda self, work, workers, shared: Carried(work))
    return TWO


def test_a_worker_finds_its_own_device(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, carried: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def noted(spec: ModelSpec) -> Loaded:
        found.append(spec.device)
        return load(spec)

    monkeypatch.setattr("finetrace.index.work.load", noted)
    for asked in ("auto", "cpu"):
        build(
            load(ModelSpec(str(base_folder), str(adapter_folder), "float64", asked)), tmp_path / asked, engine=carried
        )
    assert found == ["auto", "cpu"]


@pytest.mark.parametrize(
    "options",
    [
        {"at": "start"},
        {"kronecker": "data"},
        {"modules": ["down_proj"], "kronecker": "model", "feature_dtype": "float16"},
        {"modules": ["all-linear"], "projection": "two-sided:3x4", "projection_seed": 5, "kronecker": "model"},
        {"modules": ["mlp"], "projection": "rademacher:6", "projection_seed": 2, "batch_tokens": 64},
        {"representations": (Representation(), Representation(-2, "mean-response")), "feature_dtype": "bfloat16"},
    ],
)
def test_the_same_options_mean_the_same(
    base_folder: Path, loaded: Loaded, tmp_path: Path, carried: Engine, options: dict[str, Any]
) -> None:
    if "at" in options:  # an adapter that began with B = 0
        with_lora(load(ModelSpec(str(base_folder), dtype="float64", device="cpu")).model).save_pretrained(
            tmp_path / "a"
        )
        config = tmp_path / "a" / "adapter_config.json"
        config.write_text(config.read_text().replace('"init_lora_weights": false', '"init_lora_weights": true'))
        loaded = load(ModelSpec(str(base_folder), str(tmp_path / "a"), dtype="float64", device="cpu"))
    elif "modules" in options:  # layers of a model without an adapter
        loaded = load(ModelSpec(str(base_folder), dtype="float32", device="cpu"))
    build(loaded, tmp_path / "one", **options)
    build(loaded, tmp_path / "two", engine=carried, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_rows_left_out_by_workers(tmp_path: Path, carried: Engine) -> None:
    """Named as one process names them, left out of shards and factors alike, and known when they are asked for again."""
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    save_base(tmp_path / "base", poisoned(token, float("nan")))
    with_lora(make_llama()).save_pretrained(tmp_path / "adapter")
    loaded = load(ModelSpec(str(tmp_path / "base"), str(tmp_path / "adapter"), dtype="float64", device="cpu"))
    with pytest.raises(FinetraceError, match=r"example e2 \(row 3\): its loss is not finite"):
        build(loaded, tmp_path / "refused", rows(), engine=carried)
    options = {"skip_bad": True, "kronecker": "model"}
    build(loaded, tmp_path / "one", rows(), **options)
    build(loaded, tmp_path / "two", rows(), engine=carried, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    build(loaded, tmp_path / "later", rows(), engine=carried, skip_bad=True)
    build(loaded, tmp_path / "later", rows(), engine=carried, **options)  # the factors alone
    assert files(tmp_path / "one") == files(tmp_path / "later")


def test_rows_appended_by_workers(loaded: Loaded, tmp_path: Path, carried: Engine) -> None:
    """Six rows leave a shard half full: the seventh begins another."""
    examples = make_examples(17)
    for name, engine_ in (("one", Engine()), ("two", carried)):
        first = build(loaded, tmp_path / name, examples[:6])
        append(first, examples[6:], engine=engine_)
        kronecker_factors(open_index(tmp_path / name, loaded), "model")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_halved_batches_of_workers_are_counted(
    loaded: Loaded, tmp_path: Path, carried: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = BatchPass.measure

    def small(self: BatchPass, items: Any, *rest: Any) -> Any:
        if len(items) > 2:
            raise MemoryError
        return measure(self, items, *rest)

    monkeypatch.setattr(BatchPass, "measure", small)
    said: dict[str, list[str]] = {"one": [], "two": []}
    build(loaded, tmp_path / "one", make_examples(8), say=said["one"].append)
    build(loaded, tmp_path / "two", make_examples(8), say=said["two"].append, engine=carried)
    assert said["one"] == said["two"]
    assert "2 batches did not fit in memory and were halved" in said["one"][0]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_worker_that_is_killed_is_replaced(
    loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: Engine
) -> None:
    """With a file half written; the bytes are those of one process."""
    marking(monkeypatch, tmp_path / "marks", at=8, times=1, how="killed")
    build(loaded, tmp_path / "i", kronecker="model", engine=two)
    assert files(tmp_path / "i") == files(built)
    starts = [start for start, _ in begun(tmp_path / "marks")]
    assert starts.count(8) == 2
    assert len({pid for start, pid in begun(tmp_path / "marks") if start == 8}) == 2


@SLOW
def test_a_worker_killed_from_outside(
    loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: Engine
) -> None:
    marking(monkeypatch, tmp_path / "marks", wait=1.0)
    killed = []

    def kill() -> None:
        until(lambda: len(begun(tmp_path / "marks")) >= 3)
        killed.append(begun(tmp_path / "marks")[-1])
        os.kill(killed[0][1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    build(loaded, tmp_path / "i", kronecker="model", engine=two)
    thread.join()
    assert files(tmp_path / "i") == files(built)
    assert [start for start, _ in begun(tmp_path / "marks")].count(killed[0][0]) == 2  # it was tried again


@SLOW
def test_a_shard_that_kills_every_worker_is_named(
    loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: Engine
) -> None:
    marking(monkeypatch, tmp_path / "marks", at=8, times=99, how="killed")
    with pytest.raises(
        FinetraceError, match=r"rows 9 to 12: a worker process died over it 3 times \(.*fewer --workers"
    ):
        build(loaded, tmp_path / "i", kronecker="model", engine=two)
    with pytest.raises(FinetraceError, match="unfinished"):
        open_index(tmp_path / "i")
    monkeypatch.undo()
    build(loaded, tmp_path / "i", kronecker="model")
    assert files(tmp_path / "i") == files(built)


@SLOW
def test_an_error_in_a_worker_comes_through_and_stops_the_others(
    loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two: Engine
) -> None:
    marking(monkeypatch, tmp_path / "marks", at=0, times=1)
    with pytest.raises(FinetraceError, match="row 9 is bad"):
        build(loaded, tmp_path / "i", kronecker="model", engine=two)
    left = begun(tmp_path / "marks")
    assert len(left) < -(-ROWS // PER_SHARD)
    for pid in {pid for _, pid in left}:
        until(lambda pid=pid: not alive(pid), 60)  # type: ignore[misc]
    assert begun(tmp_path / "marks") == left
    build(loaded, tmp_path / "i", kronecker="model")
    assert files(tmp_path / "i") == files(built)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


COORDINATOR = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_engines as tests
from finetrace.index import collecting as module
if __name__ == "__main__":
    Path({marks!r}).mkdir()
    module.ShardWork = lambda *described: tests.Marked(*described, marks=Path({marks!r}), wait=1.0)
    spec = tests.ModelSpec({base!r}, {adapter!r}, dtype="float64", device="cpu")
    tests.build(tests.load(spec), Path({folder!r}), kronecker="model", engine=tests.engine({name!r}))
"""


@SLOW
def test_the_coordinator_is_killed_and_another_goes_on(
    base_folder: Path, adapter_folder: Path, loaded: Loaded, built: Path, tmp_path: Path, two: Engine
) -> None:
    folder, marks = tmp_path / "i", tmp_path / "marks"
    script = tmp_path / "coordinator.py"
    script.write_text(
        COORDINATOR.format(
            tests=str(Path(__file__).parent),
            marks=str(marks),
            base=str(base_folder),
            adapter=str(adapter_folder),
            folder=str(folder),
            name=two.name,
        )
    )
    process = subprocess.Popen([sys.executable, str(script)])
    until(lambda: process.poll() is not None or len(list((folder / "shards").glob("0*"))) >= 2)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list((folder / "shards").glob("0*")))
    assert 2 <= there < -(-ROWS // PER_SHARD)
    build(loaded, folder, kronecker="model", engine=two)  # at once: the lock is free
    assert files(folder) == files(built)
    for pid in {pid for _, pid in begun(marks)}:
        until(lambda pid=pid: not alive(pid), 60)  # type: ignore[misc]
    assert files(folder) == files(built)


def test_only_what_is_lost_is_collected_again(
    loaded: Loaded, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried: Engine
) -> None:
    shutil.copytree(built, tmp_path / "i")
    for start in (4, 12):
        damage(tmp_path / "i" / "shards" / f"{start:09d}.safetensors", "flipped")
    marking(monkeypatch, tmp_path / "marks")
    build(loaded, tmp_path / "i", kronecker="model", engine=carried)
    assert sorted(start for start, _ in begun(tmp_path / "marks")) == [4, 12]
    assert files(tmp_path / "i") == files(built)


def test_a_worker_with_another_model_is_refused(loaded: Loaded, tmp_path: Path, carried: Engine) -> None:
    """The model in this process is not the one that its name leads to."""
    other = replace(loaded, model=with_lora(load(replace(loaded.spec, adapter=None)).model, seed=9))
    with_base_moved = replace(other, spec=replace(loaded.spec, adapter=None))
    for weight in (other.model.get_base_model().model.layers[0].mlp.up_proj.weight,):
        weight.data += 1
    with pytest.raises(FinetraceError, match=r"a worker loads another model than this process: .* another base model"):
        build(with_base_moved, tmp_path / "i", engine=carried)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Engine("cloud"), "--engine cloud: not known; use local, processes, ray"),  # type: ignore[arg-type]
        (lambda: Engine("processes", 0), "--workers 0"),
        (lambda: Engine("local", 3), "--engine local is this process alone"),
        (lambda: Engine("processes", 2, "auto"), "--address and --gpus-per-task go with --engine ray"),
        (lambda: Engine("ray", 2, gpus_per_task=-1), "--gpus-per-task -1"),
    ],
)
def test_engines_that_cannot_be(made: Callable[[], Engine], said: str) -> None:
    with pytest.raises(FinetraceError, match=said):
        made()
