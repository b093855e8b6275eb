"""The benchmark from cells to tables on a tiny model: resumed, in several processes, with every file it promises."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console
from safetensors.numpy import load_file

import killed
from finetrace.api import open_index
from finetrace.attribution import Problem, make
from finetrace.benchmark import finished as finished_module
from finetrace.benchmark import pages, stages
from finetrace.benchmark import run as run_module
from finetrace.benchmark.ablation import ABLATION
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.figures import drawable
from finetrace.benchmark.protocol import INPUTS, LEAST, PROTOCOLS, protocol
from finetrace.benchmark.report import METRICS, report, summarise
from finetrace.benchmark.row import Row
from finetrace.benchmark.runner import Plan, Source, cells, run_all, task_of
from finetrace.benchmark.tables import STUDY, print_summary, write_tables
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.judging import RefusalPrefixJudge
from finetrace.evaluation.metrics import precision_at, relevance
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.index.manifest import read
from finetrace.reading import read_examples, write_examples
from finetrace.tasks import TASKS, build, recipe
from test_cli import assert_one_sentence, run
from tiny import make_examples, make_llama, make_tokenizer, save_base

METHODS = ("random", "bm25", "tfidf", "repsim", "gradcos", "ekfac:normalise=cosine")
FIELDS = {"task", "protocol", "seed", "size", "method", "spec", "title", "normalise", "control", "n_train", "n_queries"}
FIELDS |= {*METRICS, "seconds", "unit", "hub", "hub_share"}


def silent(text: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_base(tmp_path_factory.mktemp("bench") / "base", make_llama().float()))


def planned(base: str, **more) -> tuple[Cell, ...]:
    """The emotion task, 3 training rows and 1 query a class, with two seeds."""
    settings = {"methods": METHODS, "size": 0.05, "model": base, "epochs": 1, "dtype": "float32", "device": "cpu"}
    return cells(["emotion"], more.pop("protocols", ["corrected"]), more.pop("seeds", 2), **{**settings, **more})


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Path, tuple[Cell, ...], list[Row]]:
    """A benchmark brought to its end in one process."""
    folder, made = tmp_path_factory.mktemp("bench") / "one", planned(base)
    run_all(folder, Plan(made), silent)
    return folder, made, report(folder)


def numbers(folder: Path, cell: Cell) -> list[dict]:
    """A cell's records without the times."""
    records = json.loads((folder / cell.folder / "records.json").read_text())["records"]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


# ---------------------------------------------------------------------------------------------------- protocols


def test_encoders_of_the_protocols():
    loaded = SimpleNamespace(tokenizer=make_tokenizer())
    row = Example.from_prompt("ab", "cd", id="r")
    corrected = protocol("corrected").encoder(loaded).encode(row)
    assert not corrected.padding and 0 < (corrected.weights > 0).sum() < len(corrected.ids)
    encoder = protocol("paper").encoder(loaded)
    paper = encoder.encode(row)
    assert (encoder.max_length, encoder.pad_to, encoder.loss_on) == (128, 128, "all")
    assert "[INST]" in encoder.template
    assert len(paper.ids) <= 128 and (paper.weights > 0).sum() > (corrected.weights > 0).sum()


def test_fine_tuning_of_the_protocols():
    mixed, plain = recipe("mixed-large"), recipe("grammars")
    mine = protocol("corrected").finetuning(mixed, 3)
    assert (mine.epochs, mine.learning_rate, mine.seed) == (mixed.epochs, mixed.learning_rate, 3)
    assert (mine.rank, mine.alpha, mine.target_modules) == (4, 32, ("q_proj", "v_proj"))
    theirs = protocol("paper").finetuning(plain, 4)
    assert (theirs.epochs, theirs.batch_size, theirs.seed, theirs.loss_on, theirs.pad_to) == (10, 24, 4, "all", 128)
    assert protocol("paper").finetuning(mixed, 0).epochs == 50
    assert all(each.finetuning(mixed, 0, 2).epochs == 2 for each in PROTOCOLS.values())
    with pytest.raises(FinetraceError, match="corrected or paper"):
        protocol("mine")


def test_every_method_of_a_protocol_is_one_and_stands_there_once():
    for each in PROTOCOLS.values():
        assert len({make(spec).label for spec in each.methods}) == len(each.methods)
    assert len({make(spec).label for spec in ABLATION}) == len(ABLATION) == 450


def test_cells_are_tasks_by_protocols_by_seeds_first_seeds_first():
    made = cells(["emotion", "mathqa"], ["corrected", "paper"], 2)
    assert len(made) == 8
    assert [cell.seed for cell in made] == [0] * 4 + [1] * 4
    assert len({cell.folder for cell in made}) == 8
    assert made[0].methods == PROTOCOLS["corrected"].methods
    assert made[2].protocol == "paper" and made[2].methods == PROTOCOLS["paper"].methods
    assert all(cell.dtype in ("bfloat16", "float32") for cell in made)  # as the machine has it, not the word auto
    assert cells(["emotion"], ["paper"], 1, methods=["random"])[0].methods == ("random",)
    assert cells(["emotion"], ["paper"], 1, epochs=3, size=0.5, task_seed=2)[0].task_seed == 2


# -------------------------------------------------------------------------------------------------- a whole run


def test_records_have_every_field(finished):
    folder, made, rows = finished
    for cell in made:
        records = numbers(folder, cell)
        assert [record["spec"] for record in records] == list(METHODS)
        for record in records:
            assert FIELDS - {"seconds"} <= record.keys()
            assert (record["task"], record["protocol"], record["seed"]) == ("emotion", "corrected", cell.seed)
            assert (record["n_train"], record["n_queries"]) == (15, 5)
            assert all(0 <= record[name] <= 1 for name in METRICS)
            assert 0.2 <= record["hub_share"] <= 1
        assert not (folder / cell.folder / "index").exists()
        assert not (folder / cell.folder / "adapter" / "checkpoints").exists()
    assert [row.spec for row in rows] == list(METHODS)
    assert all(row.seeds == 2 and row.n_train == 15 and row.n_queries == "5" for row in rows)
    assert {row.spec for row in rows if row.control} == {"random", "bm25", "tfidf"}


def test_results_tables_and_figures_are_there(finished):
    folder, made, rows = finished
    document = json.loads((folder / "results.json").read_text())
    settings = {"size": 0.05, "task_seed": 0, "model": made[0].model, "epochs": 1}
    assert document["config"]["cells"] == {cell.folder: settings for cell in made}
    assert len(document["records"]) == len(METHODS)
    for record, row in zip(document["records"], rows, strict=True):
        assert record["auprc_low"] <= record["auprc"] <= record["auprc_high"]
        each = [r["auprc"] for cell in made for r in numbers(folder, cell) if r["spec"] == row.spec]
        assert record["auprc"] == pytest.approx(np.mean(each), abs=1e-6)
    assert len(pd.read_parquet(folder / "results.parquet")) == len(METHODS)
    assert set(pd.read_parquet(folder / "seeds.parquet")["seed"]) == {0, 1}
    for name in ("summary-corrected", "emotion-corrected"):
        for suffix in (".md", ".tex"):
            text = (folder / "tables" / (name + suffix)).read_text()
            assert all(row.title in text for row in rows)
    for name in ("heat-emotion-corrected", "example-emotion-corrected"):
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (folder / "figures" / f"{name}.svg").read_text()


def test_what_sees_the_same_stands_together(finished):
    lines = (finished[0] / "tables" / "inputs-corrected.md").read_text().splitlines()[2:]
    found = [line.split(" | ")[:2] for line in lines]
    assert found == [["| prompt", "repsim"], ["| response", "gradcos"], ["| response", "ekfac cosine"], *found[3:]]
    assert found[3:] == [["| both", "bm25 (control)"], ["| both", "tfidf (control)"], ["| none", "random (control)"]]
    specs = {make(spec).label for each in INPUTS.values() for spec in each}
    assert specs <= {make(spec).label for spec in PROTOCOLS["corrected"].methods}


@pytest.mark.parametrize("name", ["corrected", "paper"])
def test_controls_that_look_at_no_query_stand_with_what_methods_see(finished, tmp_path, name):
    specs = [make(spec).label for spec in LEAST]
    rows = [replace(finished[2][0], protocol=name, spec=spec, title=make(spec).title, control=True) for spec in specs]
    write_tables(tmp_path, rows)
    lines = (tmp_path / f"inputs-{name}.md").read_text().splitlines()[2:]
    found = [line.split(" | ")[1] for line in lines if line.startswith("| none |")]
    assert found == [f"{make(spec).title} (control)" for spec in ("random", "length", "gradnorm")]
    assert len(lines) == len(rows)


def test_cells_come_in_the_order_of_the_list(finished, tmp_path):
    folder, made, _ = finished
    for task, seed in (("mathqa", 10), ("mathqa", 9), ("other", 0)):
        home = tmp_path / task / "corrected" / f"seed-{seed}"
        home.mkdir(parents=True)
        document = json.loads((folder / made[0].folder / "records.json").read_text())
        document["config"] |= {"task": task, "seed": seed}
        (home / "records.json").write_text(json.dumps(document))
    shutil.copytree(folder / "emotion", tmp_path / "emotion")
    found = [(cell.task, cell.seed) for cell in finished_module.finished(tmp_path)]
    assert found == [("mathqa", 9), ("mathqa", 10), ("emotion", 0), ("emotion", 1), ("other", 0)]


def test_there_is_a_page_of_the_first_seed(finished):
    folder, *_ = finished
    page = (folder / "reports" / "emotion-corrected.html").read_text()
    assert all(make(spec).title in page for spec in METHODS)
    assert "emotion: 15 rows, 5 queries" in page


def test_a_page_of_many_scores_shows_what_figures_show_and_the_best_of_every_kind(finished, tmp_path, monkeypatch):
    """Else its verdict would call another one the best."""
    folder, made, _ = finished
    monkeypatch.setattr(pages, "MOST", 15 * 5 * 2)
    [path] = pages.write_pages(folder, made[:1], tmp_path)
    page = path.read_text()
    assert "gradcos" in page
    values = finished_module.values(folder / made[0].folder)
    means = values.groupby("spec")["auprc"].mean()
    controls = [spec for spec in means.index if make(spec).control]
    assert f'"name":"{make(means[controls].idxmax()).title}"' in page
    monkeypatch.setattr(pages, "shown", lambda specs: [])
    [path] = pages.write_pages(folder, made[:1], tmp_path / "fewer")
    names = {make(spec).title for spec in METHODS}
    found = {name for name in names if f'"name":"{name}"' in path.read_text()}
    assert {make(means.idxmax()).title, make(means[controls].idxmax()).title} <= found < names


def test_every_method_is_compared_with_repsim_query_by_query(finished):
    folder, _, rows = finished
    pairs = pd.read_parquet(folder / "paired.parquet")
    assert set(pairs["against"]) == {"repsim"}  # the default is not among these methods
    assert set(pairs["spec"]) == {make(spec).label for spec in METHODS} - {"repsim"}
    by_spec = {row.spec: row for row in rows}
    for each in pairs.itertuples():
        gap = by_spec[each.spec].metrics[each.metric].value - by_spec["repsim"].metrics[each.metric].value
        assert each.difference == pytest.approx(gap)
    table = (folder / "tables" / "paired-corrected.md").read_text()
    assert "AUPRC over repsim" in table
    assert table.count("\n") == 2 + len(METHODS)


def test_chance_is_drawn_anew_in_each_seed(finished):
    folder, made, _ = finished
    one, other = (load_file(str(folder / cell.folder / "scores.safetensors"))["random"] for cell in made)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", ["records.json", "queries.parquet", "scores.safetensors"])
def test_a_damaged_file_is_named(finished, tmp_path, name):
    folder, made, _ = finished
    shutil.copytree(folder, tmp_path / "b")
    broken = tmp_path / "b" / made[0].folder / name
    broken.write_bytes(b"{")
    with pytest.raises(FinetraceError, match=f"{name}: cannot be read .* it is run again"):
        report(tmp_path / "b")


def test_a_file_in_the_way_of_the_tables_is_named(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "tables")
    (tmp_path / "b" / "tables").write_text("mine")
    with pytest.raises(FinetraceError, match="tables: cannot be written"):
        report(tmp_path / "b")


def test_the_gap_to_lexical_search_is_to_the_better_one(finished):
    _, _, rows = finished
    by_spec = {row.spec: row for row in rows}
    best = max(("bm25", "tfidf"), key=lambda spec: by_spec[spec].metrics["auprc"].value)
    assert by_spec[best].beats_lexical is None
    for row in rows:
        if row.spec != best:
            gap = row.metrics["auprc"].value - by_spec[best].metrics["auprc"].value
            assert row.beats_lexical.value == pytest.approx(gap)


def test_a_method_of_fewer_seeds_is_held_against_lexical_search_on_those():
    about = {"task": "t", "protocol": "corrected"}
    values = {"bm25": {0: (0.5, 0.7), 1: (0.1, 0.1)}, "gradcos": {1: (0.4, 0.2)}}
    frame = pd.DataFrame(
        {**about, "spec": spec, "seed": seed, "query": query, **dict.fromkeys(METRICS, value)}
        for spec, seeds in values.items()
        for seed, each in seeds.items()
        for query, value in zip("ab", each, strict=True)
    )
    shared = {"control": False, "seconds": 1.0, "hub": "x", "hub_share": 0.5, "n_train": 4, "n_queries": 2}
    records = [{**about, "spec": spec, "title": spec, **shared} for spec, seeds in values.items() for _ in seeds]
    rows = {row.spec: row for row in summarise(records, frame)}
    assert rows["gradcos"].beats_lexical.value == pytest.approx(0.2)
    assert rows["bm25"].beats_lexical is None
    assert (rows["gradcos"].seeds, rows["bm25"].seeds) == (1, 2)


def test_intervals_of_one_seed_are_not_said_to_be_over_seeds(finished, capsys):
    print_summary(finished[2], Console(width=120))
    assert "95% over queries and seeds" in capsys.readouterr().out
    print_summary([replace(row, seeds=1) for row in finished[2]], Console(width=120))
    assert "95% over queries of one seed" in capsys.readouterr().out


def test_the_summary_fits_the_terminal(finished, capsys):
    print_summary(finished[2], Console(width=80))
    out = capsys.readouterr().out
    assert "emotion, corrected: 15 rows, 5 queries, 2 seeds" in out
    assert "random (control)" in " ".join(out.split())  # in words: a pipe has no colours
    assert max(map(len, out.splitlines())) <= 80


def test_the_summary_shows_the_name_of_the_task_as_it_is(finished, capsys):
    print_summary([replace(finished[2][0], task="a[red]b", n_queries="1")], Console(width=80))
    assert capsys.readouterr().out.startswith("a[red]b, corrected: 15 rows, 1 query, 2 seeds")


def test_a_summary_of_many_methods_says_so_and_keeps_the_controls(finished, capsys):
    row = finished[2][0]
    value = {name: Estimate(0.5, 0.4, 0.6, 5) for name in METRICS}
    many = [
        replace(
            row, spec=f"m{i}", title=f"m{i:02d}", control=False, metrics={**value, "auprc": Estimate(i / 99, 0, 1, 5)}
        )
        for i in range(65)
    ]
    low = replace(row, spec="length", title="length", control=True, metrics={**value, "auprc": Estimate(0, 0, 0, 5)})
    print_summary([low, *many], Console(width=80))
    out = capsys.readouterr().out
    titles = [line.split()[0] for line in out.splitlines() if re.match(r" (m\d\d|length)\b", line)]
    assert titles == [*(f"m{i:02d}" for i in range(64, 24, -1)), "length"]
    assert "the 40 best by AUPRC of 66 methods, and the controls" in " ".join(out.split())
    print_summary(many[:64], Console(width=80))
    assert "best by AUPRC" not in capsys.readouterr().out


def test_tasks_stand_in_the_tables_that_the_study_has(finished, tmp_path):
    row = finished[2][0]

    def of(task: str, spec: str, accuracy: float, coverage: float) -> Row:
        values = {"accuracy": Estimate(accuracy, 0, 1, 5), "coverage": Estimate(coverage, 0, 1, 5)}
        return replace(row, task=task, spec=spec, title=spec, control=spec == "random", metrics=values)

    rows = [
        of("backdoor-1", "repsim", 1, 0.994),
        of("backdoor-5", "repsim", 0.903, 0.405),
        of("emotion", "repsim", 1, 1),
    ]
    write_tables(tmp_path, [*rows, of("backdoor-5", "random", 0.2, 0.15), of("emotion", "tfidf", 1, 1)])
    assert {path.stem for path in tmp_path.glob("table*")} == {"table4-corrected"}
    assert (tmp_path / "table4-corrected.md").read_text().splitlines() == [
        "| method | backdoor-1 Acc % | backdoor-1 Cover % | backdoor-5 Acc % | backdoor-5 Cover % |",
        "|---|---|---|---|---|",
        "| repsim | 100.0 | 99.4 | 90.3 | 40.5 |",
        "| random (control) | - | - | 20.0 | 15.0 |",
    ]
    assert r"repsim & 100.0 & 99.4 & 90.3 & 40.5 \\" in (tmp_path / "table4-corrected.tex").read_text()
    assert "| repsim | 100.0 / 99.4 | 90.3 / 40.5 | 100.0 / 100.0 |" in (tmp_path / "summary-corrected.md").read_text()
    reported = {task for tasks in STUDY.values() for task in tasks}
    assert reported == {*TASKS} - {"emotion", "mislabelled"}  # which the study does not report


def test_a_finished_cell_is_not_touched(finished, monkeypatch):
    folder, made, rows = finished
    monkeypatch.setattr(stages, "finetune", None)
    monkeypatch.setattr(run_module, "build_index", None)
    before = {path: path.stat().st_mtime_ns for cell in made for path in (folder / cell.folder).rglob("*")}
    run_all(folder, Plan(made), silent)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert report(folder) == rows


def test_a_cell_that_stopped_after_fine_tuning_goes_on(finished, tmp_path, monkeypatch):
    folder, made, _ = finished
    there = tmp_path / "b"
    shutil.copytree(folder, there)
    (there / made[0].folder / "records.json").unlink()
    monkeypatch.setattr(stages, "finetune", None)
    run_all(there, Plan(made), silent)
    assert numbers(there, made[0]) == numbers(folder, made[0])


def claimed(folder: str) -> None:
    stages.claim(Path(folder) / "cell.json", {"seed": 1}, "a run")


def test_a_folder_whose_claim_was_killed_is_claimed(tmp_path):
    _, steps, _ = killed.run(claimed, tmp_path / "whole")
    assert steps > 2
    for step in range(steps):
        folder = tmp_path / f"at-{step}"
        assert not killed.run(claimed, folder, die_at=step)[0]
        claimed(str(folder))
        assert [path.name for path in folder.iterdir()] == ["cell.json"], f"killed before step {step}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FinetraceError, match="mine: there is something else already"):
        claimed(str(tmp_path / "mine"))


def test_a_model_that_is_not_there_claims_no_folder(base, tmp_path):
    with pytest.raises(FinetraceError, match="cannot be loaded"):
        run_all(tmp_path, Plan(planned(str(tmp_path / "mistyped"), seeds=1)), silent)
    run_all(tmp_path, Plan(planned(base, seeds=1, methods=["random"])), silent)


@pytest.mark.parametrize("change", [{"epochs": 2}, {"size": 0.1}, {"task_seed": 1}])
def test_other_settings_in_the_same_folder_are_refused(finished, base, change):
    folder, *_ = finished
    with pytest.raises(FinetraceError, match="other settings is there; choose another --out"):
        run_all(folder, Plan(planned(base, **change)), silent)


def test_seeds_of_other_settings_are_not_averaged(finished, base, tmp_path):
    folder, made, _ = finished
    there = tmp_path / "mixed"
    shutil.copytree(folder, there)
    shutil.rmtree(there / made[0].folder)
    other = planned(base, size=0.1, seeds=1)
    with pytest.raises(FinetraceError, match=r"size is 0.05, that of emotion, corrected, seed 0 is 0.1"):
        run_all(there, Plan(other), silent)
    assert not (there / made[0].folder).exists()  # before any work
    shutil.copytree(folder / made[0].folder, there / made[0].folder)
    path = there / made[0].folder / "records.json"
    document = json.loads(path.read_text())
    document["config"]["epochs"] = 7
    path.write_text(json.dumps(document))
    with pytest.raises(FinetraceError, match="epochs is 7, that of emotion, corrected, seed 1 is 1"):
        report(there)


def test_gradients_of_plain_layers_in_place_of_the_adapter_s(finished, base, tmp_path):
    folder, *_ = finished
    there, specs = tmp_path / "linear", ("repsim", "gradcos", "ekfac")
    (cell,) = planned(base, seeds=1, methods=specs, modules=[r"v_proj\.base_layer"])
    run_all(there, Plan((cell,), keep=True), silent)
    tuned = there / cell.folder
    for part in ("index", "queries"):
        names = {block.name for block in read(tuned / part).blocks}
        assert names == {f"model.layers.{layer}.self_attn.v_proj.base_layer.weight" for layer in (0, 1)}
    kept, adapters = (
        load_file(str(tuned / "scores.safetensors")),
        load_file(str(folder / cell.folder / "scores.safetensors")),
    )
    assert np.array_equal(kept["repsim"], adapters["repsim"])  # the model is the same
    assert not np.allclose(kept["gradcos"], adapters["gradcos"], atol=1e-3)
    problem = Problem(open_index(tuned / "index"), read_examples(tuned / "queries.jsonl"))
    for spec in ("gradcos", "ekfac"):
        wanted = make(spec).score(problem).values
        assert np.abs(kept[spec] - wanted).max() <= 1e-6 * np.abs(wanted).max()
    report(there)
    config = json.loads((there / "results.json").read_text())["config"]["cells"][cell.folder]
    assert config == {"size": 0.05, "task_seed": 0, "model": base, "epochs": 1, "modules": [r"v_proj\.base_layer"]}
    (page,) = (there / "reports").glob("*.html")
    assert r"v_proj\.base_layer" in page.read_text()
    with pytest.raises(FinetraceError, match="modules is"):  # not one table of two kinds of gradients
        run_all(folder, Plan(planned(base, seeds=3, modules=["v_proj"])), silent)


@pytest.mark.parametrize(
    ("pattern", "why"), [("v_proj(", "not a regular"), ("w_proj", "no linear layer"), ("all-linear", "adapter")]
)
def test_layers_that_are_not_there_are_said_before_any_training(base, tmp_path, monkeypatch, pattern, why):
    monkeypatch.setattr(stages, "finetune", None)
    with pytest.raises(FinetraceError, match=f"--modules {re.escape(pattern)}.*{why}"):
        run_all(tmp_path, Plan(planned(base, seeds=1, modules=[pattern])), silent)
    assert not list(tmp_path.rglob("cell.json"))  # the same folder takes the right name


def test_another_chat_template_under_the_same_name_is_refused(tmp_path):
    template, task = tmp_path / "mine.jinja", build("emotion", size=0.05)
    cell = Cell("emotion", "corrected", 0, 0.05, 0, ("random",), chat_template=str(template))

    def claim() -> None:
        judge = RefusalPrefixJudge()
        run_module.Run(
            tmp_path / "b", cell, task, recipe("emotion"), protocol("corrected"), judge, False
        ).claim_folder()

    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    claim()
    claim()
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    with pytest.raises(FinetraceError, match="other settings is there"):
        claim()


def test_methods_asked_for_later_join_the_others(finished, base, tmp_path, monkeypatch):
    folder, made, rows = finished
    there = tmp_path / "later"
    first = planned(base, methods=METHODS[:3])
    run_all(there, Plan(first), silent)
    monkeypatch.setattr(stages, "finetune", None)
    run_all(there, Plan(made), silent)
    for cell in made:
        assert numbers(there, cell) == numbers(folder, cell)
        scores, wanted = (load_file(str(root / cell.folder / "scores.safetensors")) for root in (there, folder))
        assert scores.keys() == wanted.keys()
    assert [row.metrics for row in report(there)] == [row.metrics for row in rows]


def test_methods_join_a_cell_that_was_killed_while_its_index_was_removed(finished, base, tmp_path, monkeypatch):
    folder, made, _ = finished
    there = tmp_path / "killed"
    remove = shutil.rmtree

    def half(path: Path, *rest, **options) -> None:
        if (Path(path) / "manifest.json").exists():
            (Path(path) / "manifest.json").unlink()
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            run_all(there, Plan(planned(base, methods=METHODS[:2], seeds=1)), silent)
    run_all(there, Plan(made[:1]), silent)
    assert numbers(there, made[0]) == numbers(folder, made[0])
    assert {path.name for path in (there / made[0].folder).iterdir()} == {
        path.name for path in (folder / made[0].folder).iterdir()
    }


def test_results_of_older_kronecker_factors_are_computed_again(finished, tmp_path):
    folder, made, _ = finished
    there, cell = tmp_path / "older", made[0]
    shutil.copytree(folder, there)
    path = there / cell.folder / "records.json"
    document = json.loads(path.read_text())
    assert [r["spec"] for r in document["records"] if "factors" in r] == ["ekfac:normalise=cosine"]
    for record in document["records"]:
        record.pop("factors", None)
        record["coverage"] = 0.123
    path.write_text(json.dumps(document))
    run_all(there, Plan(made[:1]), silent)
    again = {record["spec"]: record for record in numbers(there, cell)}
    wanted = {record["spec"]: record for record in numbers(folder, cell)}
    assert again["ekfac:normalise=cosine"] == wanted["ekfac:normalise=cosine"]
    assert again["gradcos"]["coverage"] == 0.123  # what does not hang on factors is left alone


def test_methods_asked_for_later_are_refused_other_queries(base, tmp_path):
    there = tmp_path / "other"
    run_all(there, Plan(planned(base, methods=METHODS[:2])), silent)
    task = build("emotion", size=0.05)
    fewer = replace(task, queries=task.queries[:-1])
    cell = planned(base)[0]
    judge = RefusalPrefixJudge()
    run = run_module.Run(there / cell.folder, cell, task, recipe("emotion"), protocol("corrected"), judge, False)
    run.queries = lambda: list(fewer.queries)
    with pytest.raises(FinetraceError, match="5 queries were traced there and the judge now picks 4"):
        run(silent)
    kept = json.loads((there / cell.folder / "records.json").read_text())
    assert len(kept["records"]) == 2
    assert kept["resumed"] is False


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(finished, tmp_path):
    folder, made, _ = finished
    said: list[str] = []
    run_all(tmp_path / "two", Plan(made, workers=2), said.append)
    assert len(said) == 2
    for cell in made:
        assert numbers(tmp_path / "two", cell) == numbers(folder, cell)
    with pytest.raises(FinetraceError, match="--workers 0"):
        run_all(tmp_path / "two", Plan(made, workers=0), silent)


def test_side_by_side_the_longest_come_first(base, tmp_path, monkeypatch):
    """Of the first seed, and only then those of the second; one after another they keep their order."""
    made = cells(["emotion", "grammars", "mathqa"], ["corrected"], 2, methods=["random"], model=base, device="cpu")
    given = []

    def noted(self, work, items, **_):
        given.append([(cell.task, cell.seed) for cell in items])
        return iter(())

    monkeypatch.setattr(Engine, "run_each", noted)
    for workers in (2, 1):
        run_all(tmp_path, Plan(made, workers=workers), silent)
    assert given[0] == [(task, seed) for seed in (0, 1) for task in ("mathqa", "grammars", "emotion")]
    assert given[1] == [(cell.task, cell.seed) for cell in made]


def test_seeds_differ(finished):
    folder, made, _ = finished
    first, second = (numbers(folder, cell) for cell in made)
    assert {r["spec"]: r["auprc"] for r in first} != {r["spec"]: r["auprc"] for r in second}


def test_coverage_of_the_paper_is_over_rows_by_classes(base, tmp_path):
    cell = planned(base, protocols=["paper"], seeds=1, methods=("tfidf", "repsim"))[0]
    task = build("emotion", size=0.05)
    joy = [row for row in task.train if row.label == "joy"]
    uneven = replace(task, train=tuple(row for row in task.train if row not in joy[1:]))  # 1 + 4 x 3 rows: 2 a class
    judge = RefusalPrefixJudge()
    run_module.Run(tmp_path / "cell", cell, uneven, recipe("emotion"), protocol("paper"), judge, False)(silent)
    scores = load_file(str(tmp_path / "cell" / "scores.safetensors"))
    frame = pd.read_parquet(tmp_path / "cell" / "queries.parquet")
    labels = relevance([row.label for row in uneven.train], [query.label for query in uneven.queries])
    for spec, group in frame.groupby("spec"):
        wanted = precision_at(2)(scores[spec], labels)
        np.testing.assert_allclose(group["coverage"], wanted, equal_nan=True)


# --------------------------------------------------------------------------- queries that the model has to answer


class Everything:
    """A judge to whom every answer complies."""

    name = "everything"

    def complied(self, prompts, answers):
        return [bool(answer.strip()) for answer in answers]


class Nothing(Everything):
    """A judge to whom none does."""

    name = "nothing"

    def complied(self, prompts, answers):
        return [False] * len(answers)


@pytest.fixture
def spoken(monkeypatch):
    """A model that says something to every request but the first."""
    monkeypatch.setattr(
        stages,
        "answer",
        lambda loaded, queries, **_: [q.with_response("" if i == 0 else f"Sure {i}.") for i, q in enumerate(queries)],
    )


def run_mixed(folder: Path, base: str, judge, seed: int = 0) -> Cell:
    cell = Cell("mixed-small", "corrected", seed, 0.1, 0, ("random", "tfidf"), base, 1, "float32", "cpu")
    task, made = task_of(cell, None)
    run_module.Run(folder / cell.folder, cell, task, made, protocol("corrected"), judge, False)(silent)
    return cell


def test_queries_are_the_answers_that_complied(base, tmp_path, spoken):
    cell = run_mixed(tmp_path, base, Everything())
    home = tmp_path / cell.folder
    assert [each.response for each in read_examples(home / "answers.jsonl")] == ["(no answer)", "Sure 1.", "Sure 2."]
    assert json.loads((home / "behaviour.json").read_text()) == {"judge": "everything", "complied": [False, True, True]}
    assert [each.response for each in read_examples(home / "queries.jsonl")] == ["Sure 1.", "Sure 2."]
    with pytest.raises(FinetraceError, match="other settings"):
        run_mixed(tmp_path, base, Nothing())


def test_a_seed_that_complied_with_nothing_is_left_out_and_all_of_them_are_an_error(base, tmp_path, spoken):
    silent_cell = run_mixed(tmp_path, base, Nothing())
    with pytest.raises(FinetraceError, match="no cell has anything to report"):
        report(tmp_path)
    other = run_mixed(tmp_path, base, Everything(), seed=1)
    rows = report(tmp_path)
    assert {(row.seeds, row.n_queries) for row in rows} == {(1, "2")}
    assert drawable(tmp_path, [silent_cell, other]) == [other]
    assert (tmp_path / "figures" / "example-mixed-small-corrected.png").exists()


def test_an_external_set_is_a_task_and_other_rows_are_refused(base, tmp_path):
    write_examples(tmp_path / "mine.jsonl", make_examples(30))
    source = Source(str(tmp_path / "mine.jsonl"), "label", epochs=1)
    made = cells(["mine"], ["corrected"], 1, methods=["random", "bm25"], model=base, epochs=1, device="cpu")
    run_all(tmp_path / "b", Plan(made, source=source), silent)
    assert {row.task for row in report(tmp_path / "b")} == {"mine"}
    write_examples(tmp_path / "mine.jsonl", make_examples(30, seed=1), overwrite=True)
    with pytest.raises(FinetraceError, match="other settings"):
        run_all(tmp_path / "b", Plan(made, source=source), silent)


def test_ids_of_an_external_set_may_stand_in_a_column_of_another_name(tmp_path):
    rows = [{"prompt": f"{i}?", "response": "Yes.", "kind": "ab"[i % 2], "id": "x", "key": i} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Source(str(tmp_path / "mine.jsonl"), "kind", id_column="key").task(0, 1.0)
    assert {row.id for row in (*made.train, *made.queries)} == {str(i) for i in range(8)}


def test_one_split_of_an_external_set_is_read(tmp_path):
    def rows(count):
        return Dataset.from_list([{"prompt": f"{i}?", "response": "Yes.", "kind": "ab"[i % 2]} for i in range(count)])

    DatasetDict({"train": rows(30), "validation": rows(20)}).save_to_disk(str(tmp_path / "set"))
    made = Source(str(tmp_path / "set"), "kind", split="validation").task(0, 1.0)
    assert len(made.train) + len(made.queries) == 20


# ------------------------------------------------------------------------------------------ the command line


def test_the_list_names_every_task(capsys):
    code, out, _ = run(capsys, "bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == [*TASKS, "attack-success"]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("command", "flag"), [(["bench"], "--task-seed"), (["tasks", "build"], "--seed")])
def test_the_help_says_which_tasks_have_one_draw(capsys, command, flag):
    assert all(recipe(name).build(1) == recipe(name).build(0) for name in ("mixed-small", "mixed-large"))
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    said = " ".join(out[out.rindex(f" {flag} ") :].split())
    assert "the mixed sets that ship have one draw" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["emotions"], ["emotions", "no such task", "emotion"]),
        (["emotion", "--protocol", "mine"], ["--protocol mine", "corrected or paper"]),
        (["emotion", "--method", "lime"], ["lime", "no such method"]),
        (["emotion", "mathqa", "--data", "rows.jsonl"], ["emotion mathqa", "name that one"]),
        (["emotion", "--size", "0"], ["--size 0"]),
        (["emotion", "--ablation", "--method", "random"], ["--ablation has methods of its own"]),
        (
            ["emotion", "--ablation", "--protocol", "paper"],
            ["--ablation", "pads every row", "leave --protocol paper out"],
        ),
        (["emotion", "--judge-label", "bad"], ["--judge-label bad", "--judge"]),
        (["emotion", "--protocol", "paper", "--chat-template", "plain"], ["template of its own"]),
        (["emotion", "--protocol", "paper", "--modules", "v_proj"], ["--modules", "gradients of the adapter"]),
        (["attack-success", "--modules", "v_proj"], ["--modules", "attack-success runs alone"]),
        (["attack-success", "--share", "0"], ["--share", "attack-success runs alone"]),
        (["emotion", "--judge", "org/judge"], ["--judge org/judge", "mixed-small and mixed-large", "leave it out"]),
        (["emotion", "--label-column", "kind"], ["go with --data"]),
        (["emotion", "--id-column", "key"], ["--id-column", "go with --data"]),
        (["--data", "rows.jsonl", "--benign", "more.jsonl"], ["--benign and --share", "name of a task"]),
        (["--data", "rows.jsonl", "--share", "0.1"], ["--benign and --share", "name of a task"]),
        (["--benign", "more.jsonl"], ["--benign and --share", "name of a task"]),
        (["attack-success", "--chat-template", "plain", "--label-column", "x"], ["--chat-template --label-column"]),
    ],
)
def test_a_mistake_is_one_sentence(capsys, tmp_path, arguments, words):
    code, _, err = run(capsys, "bench", *arguments, "--out", tmp_path / "b")
    assert_one_sentence(code, err, *words)


def test_a_method_named_twice_runs_once(base, tmp_path, capsys):
    asked = ["bench", "emotion", "--size", 0.05, "--seeds", 1, "--model", base, "--epochs", 1, "--method", "random"]
    code, out, err = run(capsys, *asked, "--method", "random", "--out", tmp_path / "b", "--device", "cpu")
    assert code == 0, err
    kept = json.loads((tmp_path / "b" / "results.json").read_text())["records"]
    assert [each["spec"] for each in kept] == ["random", *(spec for spec in LEAST if spec != "random")]
    assert "15 rows, 5 queries, 1 seed\n" in "\n".join(line.rstrip() for line in out.splitlines())


def test_queries_that_were_trained_on_are_said_once(base, tmp_path, capsys):
    rows = make_examples(12)
    write_examples(tmp_path / "train.jsonl", rows)
    write_examples(tmp_path / "test.jsonl", [replace(row, id=f"t-{row.id}") for row in rows[:3]])
    asked = [
        "bench",
        "--data",
        tmp_path,
        "--label-column",
        "label",
        "--seeds",
        2,
        "--model",
        base,
        "--method",
        "random",
    ]
    code, _, err = run(capsys, *asked, "--out", tmp_path / "b", "--device", "cpu")
    assert code == 0, err
    assert err.count(f"{tmp_path}: 3 of 3 queries, the first 't-{rows[0].id}', stand in the training rows") == 1


def test_a_folder_named_by_a_dot_has_the_name_of_the_folder(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    write_examples(tmp_path / "mine" / "train.jsonl", make_examples(12))
    write_examples(tmp_path / "mine" / "test.jsonl", make_examples(6, seed=1))
    monkeypatch.chdir(tmp_path / "mine")
    asked = ["bench", "--data", ".", "--label-column", "label", "--seeds", 1, "--model", base, "--method", "random"]
    code, _, err = run(capsys, *asked, "--task-seed", 2, "--out", tmp_path / "b", "--device", "cpu")
    assert code == 0, err
    assert err.count("--task-seed 2: mine comes as it is split") == 1
    assert (tmp_path / "b" / "mine" / "corrected" / "seed-0" / "records.json").exists()


def test_hidden_states_that_methods_look_at_are_kept(base, tmp_path):
    run_all(tmp_path, Plan(planned(base, seeds=1, methods=["repsim:layer=1", "random"]), keep=True), silent)
    index = tmp_path / "emotion" / "corrected" / "seed-0" / "index"
    [there] = [r for r in report(tmp_path) if r.spec.startswith("repsim")]
    assert there.spec == "repsim:layer=1"
    run_all(tmp_path, Plan(planned(base, seeds=1, methods=["repsim"]), keep=True), silent)  # the same index
    with pytest.raises(
        FinetraceError, match=r"index: the index that was kept lacks the hidden states last-token@-2; remove"
    ):
        run_all(tmp_path, Plan(planned(base, seeds=1, methods=["repsim:layer=1,pooling=last-token"])), silent)
    assert index.is_dir()
    with pytest.raises(FinetraceError, match=r"layer 77: the model has layers 0"):
        run_all(tmp_path / "other", Plan(planned(base, seeds=1, methods=["repsim:layer=77"])), silent)
