"""Studies piece by piece: written before all is there, gone on with after a stop, and the same with workers side by side."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import killed
from commands import run as command
from finetrace.errors import FinetraceError
from finetrace.execution import Engine
from finetrace.studies import capacity, ground_truth, iterations, write
from finetrace.studies.approximation_study import APPROXIMATION
from finetrace.studies.cells import Plan
from finetrace.studies.ground_truth import GROUND_TRUTH
from finetrace.studies.iterations import ITERATIONS
from finetrace.studies.pieces import Piece, Say, in_words, kept
from finetrace.studies.plots import panels
from finetrace.studies.registry import STUDIES
from finetrace.studies.study import Outcome, Setting, Study
from finetrace.studies.write import run
from test_engines import TWO, Carried
from tiny import make_llama, make_tokenizer, save_base

TASKS = ("b", "a")
Records = list[dict[str, Any]]


def quiet(text: str) -> None:
    """Nobody listens."""


def measure(folder: Path, task: str, seed: int, say: Say) -> Records:
    """Leaves a mark; a file of the name of task and seed stops it, or kills the process that it is in."""
    with (folder.parent / "measured").open("a") as file:
        file.write(f"{task}{seed} ")
    if (folder.parent / f"stop-{task}{seed}").exists():
        raise FinetraceError(f"{task}{seed} went wrong")
    if (folder.parent / f"kill-{task}{seed}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"task": task, "seed": seed, "value": float(len(task) + seed)}]


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    found = []
    for seed in range(setting.seeds):
        for task in TASKS:
            one = kept(folder, f"{task}-{seed}", f"{task}, seed {seed}", partial(measure, folder, task, seed), seed)
            found.append(replace(one, length=partial(float, ord(task))))
    return found


def outcome(setting: Setting, found: Sequence[Records]) -> Outcome:
    records = [record for each in found for record in each]
    table = (["task", "seed"], [[r["task"], str(r["seed"])] for r in records])
    return Outcome(records, {"made": table}, {"made": panels(1)[0]}, [f"{len(records)} values"])


@pytest.fixture(autouse=True)
def no_minute_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine."""
    monkeypatch.setattr(write, "OFTEN", float("inf"))


MADE = Study("made", "", "", 1, 1, pieces, outcome)
THREE = Setting(True, 3, dtype="float32", device="cpu")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def names(folder: Path) -> list[str]:
    return [f"{r['task']}{r['seed']}" for r in results(folder)["records"]]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Two workers that are in this process, to which everything is pickled."""
    monkeypatch.setattr(Engine, "_pool", lambda self, work, workers, shared: Carried(work))
    return TWO


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    base = save_base(tmp_path_factory.mktemp("pieces") / "base", make_llama(), make_tokenizer())
    return Setting(True, 1, str(base), "float32", "cpu")


def test_results_are_written_after_every_seed(tmp_path: Path) -> None:
    out, seen = tmp_path / "s", []

    def tell(text: str) -> None:
        seen.append((text, names(out), results(out)["config"]))

    last = run(MADE, out, THREE, quiet, tell)
    assert [there for _, there, _ in seen] == [["b0", "a0"], ["b0", "a0", "b1", "a1"]]
    texts = [text for text, _, _ in seen]
    assert texts[0] == f"written so far: {out / 'results.json'}; still missing: all of seed 1, 2"
    assert texts[1].endswith("; still missing: all of seed 2")
    config = seen[1][2]
    assert config["missing"] == ["b, seed 2", "a, seed 2"]
    assert config["reading"] == ["Not finished, and not in these numbers: all of seed 2.", "4 values"]
    assert results(out)["config"]["missing"] == []
    assert list(last.reading) == results(out)["config"]["reading"] == ["6 values"]
    assert {"made.md", "made.tex", "made.png", "made.svg", "results.parquet"} <= {each.name for each in out.iterdir()}


def test_a_minute_after_the_last_writing_a_piece_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "OFTEN", -1.0)
    told: list[str] = []
    run(MADE, tmp_path / "s", replace(THREE, seeds=2), quiet, told.append)
    assert [text.split("missing: ")[1] for text in told] == ["a, seed 0; all of seed 1", "all of seed 1", "a, seed 1"]


@pytest.mark.parametrize("workers", [1, TWO], ids=["alone", "workers"])
def test_what_is_finished_can_be_read_after_a_failure_and_is_not_done_again(
    tmp_path: Path, workers: Any, request: pytest.FixtureRequest
) -> None:
    if workers is TWO:
        request.getfixturevalue("carried")
    out, told = tmp_path / "s", list[str]()
    (tmp_path / "stop-a1").touch()
    with pytest.raises(FinetraceError, match="a1 went wrong"):
        run(MADE, out, replace(THREE, workers=workers), quiet, told.append)
    assert names(out) == ["b0", "a0", "b1"]
    assert results(out)["config"]["missing"] == ["a, seed 1", "b, seed 2", "a, seed 2"]
    assert told[-1].endswith("; still missing: a, seed 1; all of seed 2")
    (tmp_path / "stop-a1").unlink()
    (tmp_path / "measured").unlink()
    found = run(MADE, out, replace(THREE, workers=workers), quiet)
    assert names(out) == ["b0", "a0", "b1", "a1", "b2", "a2"]
    assert sorted((tmp_path / "measured").read_text().split()) == ["a1", "a2", "b2"]
    assert run(MADE, tmp_path / "t", THREE, quiet).records == found.records


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        if text == "a, seed 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(MADE, tmp_path / "s", THREE, interrupt)
    assert names(tmp_path / "s") == ["b0", "a0", "b1"]


def once(folder: str) -> None:
    run(MADE, Path(folder), THREE, quiet)


def test_a_killed_study_can_be_read_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "kill-b1").touch()
    assert not killed.run(once, tmp_path / "s")[0]
    assert names(tmp_path / "s") == ["b0", "a0"]
    assert results(tmp_path / "s")["config"]["missing"] == ["b, seed 1", "a, seed 1", "b, seed 2", "a, seed 2"]
    (tmp_path / "kill-b1").unlink()
    run(MADE, tmp_path / "s", THREE, quiet)
    assert (tmp_path / "measured").read_text().split() == ["b0", "a0", "b1", "b1", "a1", "b2", "a2"]


def test_parts_that_a_stopped_run_left_are_written_at_once(tmp_path: Path) -> None:
    out = tmp_path / "s"
    run(MADE, out, replace(THREE, seeds=1), quiet)
    (out / "results.json").unlink()
    (tmp_path / "stop-b1").touch()
    with pytest.raises(FinetraceError):
        run(MADE, out, THREE, quiet)
    assert names(out) == ["b0", "a0"]


def test_fewer_seeds_than_a_folder_holds_are_said(tmp_path: Path) -> None:
    """And nothing is found again when the others are asked for."""
    out, said = tmp_path / "s", list[str]()
    run(MADE, out, replace(THREE, seeds=2), said.append)
    whole = results(out)
    assert not [each for each in said if "writes them again" in each]
    said.clear()
    run(MADE, out, replace(THREE, seeds=1), said.append)
    assert said == [
        f"{out / 'results.json'} and its tables are of 2 seeds and will be of 1; what was found for the others stays, and "
        "--seeds 2 writes them again"
    ]
    assert len(results(out)["records"]) < len(whole["records"])
    said.clear()
    run(MADE, out, replace(THREE, seeds=2), said.append)
    assert said == [] and results(out)["records"] == whole["records"]


def test_tables_that_need_whole_seeds_get_them(tmp_path: Path) -> None:
    whole, told = replace(MADE, whole_seeds=True), list[str]()
    (tmp_path / "stop-a0").touch()
    with pytest.raises(FinetraceError, match="a0 went wrong"):
        run(whole, tmp_path / "s", THREE, quiet, told.append)
    assert told == [
        "nothing is written yet: made needs every piece of a seed; still missing: a, seed 0; all of seed 1, 2"
    ]
    assert not (tmp_path / "s" / "results.json").exists()
    (tmp_path / "stop-a0").rename(tmp_path / "stop-a1")
    with pytest.raises(FinetraceError, match="a1 went wrong"):
        run(whole, tmp_path / "s", THREE, quiet, told.append)
    assert names(tmp_path / "s") == ["b0", "a0"]
    assert results(tmp_path / "s")["config"]["missing"] == ["b, seed 1", "a, seed 1", "b, seed 2", "a, seed 2"]


def test_side_by_side_the_longest_of_a_seed_comes_first(tmp_path: Path, carried: Engine) -> None:
    said: list[str] = []
    found = run(MADE, tmp_path / "s", replace(THREE, seeds=2, workers=carried), said.append)
    assert (tmp_path / "measured").read_text().split() == ["b0", "a0", "b1", "a1"]
    assert said == [f"{task}, seed {seed}: done" for seed in (0, 1) for task in ("b", "a")]
    turned = replace(MADE, pieces=lambda folder, setting: pieces(folder, setting)[::-1])
    assert [r["task"] for r in run(turned, tmp_path / "t", replace(THREE, workers=carried), quiet).records] == [
        *"ab"
    ] * 3
    assert (tmp_path / "measured").read_text().split()[4:] == ["b0", "a0", "b1", "a1", "b2", "a2"]
    assert [r["task"] for r in found.records] == [*"ba"] * 2


@pytest.mark.slow
def test_processes_find_the_same(tmp_path: Path) -> None:
    alone = run(MADE, tmp_path / "s", THREE, quiet)
    assert run(MADE, tmp_path / "t", replace(THREE, workers=TWO), quiet).records == alone.records


@pytest.mark.parametrize("name", STUDIES)
def test_the_pieces_of_every_study_can_be_sent_to_a_worker(name: str, tmp_path: Path) -> None:
    made = STUDIES[name].pieces(tmp_path, replace(THREE, seeds=2))
    assert made
    assert len({piece.name for piece in made}) == len({piece.paths for piece in made}) == len(made)
    assert [piece.name for piece in pickle.loads(pickle.dumps(made))] == [piece.name for piece in made]
    assert all(piece.length() >= 0 and not piece.there() for piece in made)


def test_nothing_to_trace_is_one_sentence(tmp_path: Path) -> None:
    def empty(folder: Path, setting: Setting) -> list[Piece]:
        return [replace(each, find=lambda say: None) for each in pieces(folder, setting)]

    with pytest.raises(FinetraceError, match="complied with none of their requests"):
        run(replace(MADE, pieces=empty), tmp_path / "s", THREE, quiet)


def test_pieces_in_words() -> None:
    every = pieces(Path("x"), THREE)
    assert in_words(every[1:4], every) == "a, seed 0; all of seed 1"
    alone = [replace(each, seed=None, name=each.name[0]) for each in every[:2]]
    assert in_words(alone, alone) == "b; a"


def test_a_study_that_measures_seconds_takes_no_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "a")
    code, _, error = command(capsys, "study", "approximation", "--quick", "--workers", 2, *out)
    assert code == 2
    assert "approximation measures seconds" in error
    assert "leave --workers and --engine out" in error
    assert not (tmp_path / "a").exists()
    assert APPROXIMATION.engine(Setting(workers=1)).in_process
    assert [study.name for study in STUDIES.values() if study.spread == "timed"] == ["approximation"]


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("convex", ("--model", "base"), "--model: convex is of digits"),
        ("capacity", ("--dtype", "float16"), "--dtype: capacity is of digits"),
        ("approximation", ("--device", "cpu"), "--device: approximation is of digits"),
        ("layers", ("--cells", "cells"), "--cells: layers shares no fine-tuned tasks"),
        ("convex", ("--cells", "cells"), "--cells: convex shares no fine-tuned tasks"),
    ],
)
def test_what_a_study_does_not_heed_is_refused(
    name: str, given: tuple[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = command(capsys, "study", name, "--quick", *given, "--out", tmp_path / "a")
    assert code == 2
    assert says in error
    assert not (tmp_path / "a").exists()


def test_studies_of_digits_say_the_precision_that_they_had(tmp_path: Path) -> None:
    run(replace(MADE, digits="float64"), tmp_path / "a", replace(THREE, dtype="bfloat16", device="auto"), quiet)
    config = results(tmp_path / "a")["config"]
    assert (config["dtype"], config["device"]) == ("float64", "cpu")
    assert {study.name for study in STUDIES.values() if study.digits} == {"approximation", "capacity", "convex"}


@pytest.mark.slow
def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, carried: Engine
) -> None:
    monkeypatch.setattr(capacity, "QUICK_WIDTHS", (4, 8))
    code, said, _ = command(capsys, "study", "capacity", "--quick", "--seeds", 2, "--out", tmp_path / "c")
    assert code == 0
    assert f"written so far: {tmp_path / 'c' / 'results.json'}; still missing: all of seed 1" in said
    code, _, heard = command(
        capsys, "study", "capacity", "--quick", "--seeds", 2, "--workers", 2, "--out", tmp_path / "d"
    )
    assert code == 0
    assert "width 4, zero start, seed 0: done" in heard
    assert results(tmp_path / "d")["records"] == results(tmp_path / "c")["records"]


@pytest.mark.slow
def test_cells_side_by_side_give_the_same(
    tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried: Engine
) -> None:
    monkeypatch.setattr(iterations, "QUICK", Plan({"emotion": 0.05, "mathqa": 0.05}, ("corrected",), epochs=1))
    monkeypatch.setattr(write, "OFTEN", -1.0)
    told: list[str] = []
    alone = run(ITERATIONS, tmp_path / "a", tiny, quiet, told.append)
    assert [text.split("missing: ")[1] for text in told] == ["mathqa, corrected, seed 0"]
    monkeypatch.chdir(tmp_path)
    beside = run(ITERATIONS, Path("b"), replace(tiny, workers=carried), quiet)
    assert {r["task"] for r in beside.records} == {"emotion", "mathqa"}
    assert beside.records == alone.records
    assert not {"workers", "engine"} & results(tmp_path / "b")["config"].keys()


@pytest.mark.slow
def test_retrainings_of_the_ground_truth_are_shared_and_found_again(
    tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried: Engine
) -> None:
    assert GROUND_TRUTH.engine(Setting(workers=carried)).in_process  # the tasks one after another
    monkeypatch.setattr(ground_truth, "QUICK", {"emotion": ground_truth.Ground(2, 1, 1, (2,), 3, 1, 2)})
    alone = run(GROUND_TRUTH, tmp_path / "a", tiny, quiet)
    given: list[int] = []
    each = Engine.run_each

    def counted(self: Engine, work: Any, items: Any, **options: Any) -> Any:
        if not self.in_process:
            given.append(len(items))
        return each(self, work, items, **options)

    def interrupt(text: str) -> None:
        if text.startswith("the first took"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "run_each", counted)
    setting = replace(tiny, workers=carried)
    with pytest.raises(KeyboardInterrupt):
        run(GROUND_TRUTH, tmp_path / "b", setting, interrupt)
    said: list[str] = []
    beside = run(GROUND_TRUTH, tmp_path / "b", setting, said.append)
    assert given[1] < given[0]  # what was done before the interrupt is not done again
    assert beside.records == alone.records
    assert {r["measure"] for r in beside.records} == {"lds", "tail-patch", "drop"}
