"""Options that the command would have to ignore, or to take for something else."""

from __future__ import annotations

import json
import shutil

import pytest

from commands import run
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.finetune_config import PRESETS, configure
from test_cli import index, place  # noqa: F401  (fixtures)

ASK = ("--ask", "Why?", "--answer", "yes")


def methods_of(output: str) -> list[dict]:
    return json.loads(output)["config"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--normalise", "relatif"], {"ekfac": ("relatif", 0.1)}),  # of the default method
        (["--method", "exact:damping=0.5", "--method", "datainf", "--damping", "0.2"], {"exact": 0.5, "datainf": 0.2}),
    ],
)
def test_an_option_is_for_methods_that_do_not_set_it(index, capsys, given, wanted):  # noqa: F811
    code, out, err = run(capsys, "trace", "--index", index, *ASK, *given, "--format", "json")
    assert code == 0, err
    found = {each["method"].split(":")[0]: each["parameters"] for each in methods_of(out)}
    for name, value in wanted.items():
        used = found[name]
        assert (used["normalise"], used["damping"]) == value if isinstance(value, tuple) else used["damping"] == value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--method", "exact:damping=0.5", "--damping", "0.1"], "--damping 0.1: none of the methods chosen"),
        (["--method", "bm25", "--damping", "0.1"], "--damping 0.1: none of the methods chosen"),
        (["--method", "exact:damping=inf"], "exact:damping=inf: parameter damping: Input should be a finite number"),
        (["--method", "exact:damping=5,damping=0.1"], "damping is given twice, here and as '5'; give it once"),
        (
            ["--method", "gradcos:scope"],
            "gradcos:scope: the parameter 'scope' lacks a value; write gradcos:scope=VALUE.",
        ),
        (["--label-column", "kind"], "the column options and --split are of --queries"),
        (["--split", "test"], "the column options and --split are of --queries"),
    ],
)
def test_what_would_be_ignored_is_refused(index, capsys, given, says):  # noqa: F811
    code, _, err = run(capsys, "trace", "--index", index, *ASK, *given)
    assert code == 2
    assert says in " ".join(err.split())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--ask", "caf\udce9", "--answer", "ok"), "--ask: character 4 is no valid text"),
        (("--ask", "ok", "--answer", "\ud800"), "--answer: character 1 is no valid text"),
    ],
)
@pytest.mark.parametrize("method", ["gradcos", "bm25"])
def test_bytes_that_are_no_text_are_refused(index, capsys, given, says, method):  # noqa: F811
    code, _, err = run(capsys, "trace", "--index", index, *given, "--method", method)
    assert code == 2
    assert says in err
    with pytest.raises(FinetraceError, match="the prompt: character 4 is no valid text"):
        Example.from_prompt("caf\udce9", id="q")


def test_queries_are_of_the_split_that_is_named(index, tmp_path, capsys):  # noqa: F811
    rows = {name: [{"id": name, "prompt": "Why?", "response": "yes"}] for name in ("train", "bad")}
    (tmp_path / "q.json").write_text(json.dumps(rows))
    for more, wanted in (((), "train"), (("--split", "bad"), "bad")):
        asked = ("trace", "--index", index, "--queries", tmp_path / "q.json", "--method", "bm25", "--format", "json")
        code, out, err = run(capsys, *asked, *more)
        assert code == 0, err
        assert {each["query"] for each in json.loads(out)["records"]} == {wanted}
    none = ("validate", "--index", index, "--queries", tmp_path / "q.json", "--split", "none")
    code, _, err = run(capsys, *none, "--out", tmp_path / "v")
    assert code == 2
    assert "'none'" in err and "train" in err


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_an_adapter_that_cannot_be_read_is_said(index, tmp_path, capsys, damage):  # noqa: F811
    copied = tmp_path / "idx"
    shutil.copytree(index, copied)
    if damage == "gone":
        shutil.rmtree(copied / "adapter")
    else:
        (copied / "adapter" / "adapter_config.json").write_text("{")
    code, _, err = run(capsys, "trace", "--index", copied, *ASK, "--method", "bm25")
    assert code == 2
    assert "no adapter can be read there" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("layers", ["5-2", "0,3-1", "-1"])
def test_layers_that_are_none_are_refused(capsys, tmp_path, layers):
    code, _, err = run(capsys, "finetune", tmp_path / "rows.jsonl", f"--layers={layers}", "--out", tmp_path / "a")
    assert code == 2
    assert f"--layers {layers}" in " ".join(err.split())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--target-modules", ""), "--target-modules '': a name is empty"),
        (("--target-modules", "q_proj,"), "--target-modules 'q_proj,': a name is empty"),
        (("--patience", 2), "--patience 2: only --validation heeds it"),
        (("--model", ""), "this model cannot be loaded"),
        (("--config", "{full}", "--preset", "paper"), "--preset paper: --config {full} sets all that this preset does"),
    ],
)
def test_finetune_refuses_what_would_have_no_effect(place, capsys, tmp_path, given, says):  # noqa: F811
    full = tmp_path / "full.yaml"
    full.write_text(json.dumps(PRESETS["released"].model_dump(mode="json")))
    given = [str(each).format(full=full) for each in given]
    out = ("--out", tmp_path / "out")
    code, _, err = run(capsys, "finetune", place / "train.jsonl", "--model", place / "base", *out, *given)
    assert code == 2
    assert says.format(full=full) in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_preset_fills_what_a_configuration_leaves_open(tmp_path):
    (tmp_path / "part.yaml").write_text("epochs: 2\n")
    found = configure("paper", tmp_path / "part.yaml", {})
    assert found == PRESETS["paper"].model_copy(update={"epochs": 2})


def test_an_empty_list_of_layers_is_not_all_of_them():
    from finetrace.finetune_config import FinetuneConfig

    with pytest.raises(ValueError, match="layers"):
        FinetuneConfig(layers=())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--kept", "k.jsonl", "--removed", "./sub/../k.jsonl"], "give them different names"),
        (["--seeds", "3"], "--seeds: only --retrain heeds it"),
        (["--draws", "2", "--out", "zzz"], "--draws --out: only --retrain heeds it"),
        (["--split", "test"], "--split test: that is of --data"),
    ],
)
def test_clean_refuses_before_the_work(index, capsys, tmp_path, monkeypatch, given, says):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Why?", "response": "yes"}\n')
    code, _, err = run(capsys, "clean", "--index", index, "--bad", "bad.jsonl", "--top", "1", *given)
    assert code == 2
    assert says in " ".join(err.split())
    assert not list(tmp_path.glob("k*.jsonl"))


def test_no_row_is_no_ranking():
    from finetrace.attribution.ranked import Strongest

    with pytest.raises(FinetraceError, match="ask for 1 or more"):
        Strongest(2, 0)


def test_one_epoch_three_epochs():
    from finetrace.units import many

    assert (many(1, "epoch"), many(3, "epoch"), many(3, "batch")) == ("1 epoch", "3 epochs", "3 batches")
