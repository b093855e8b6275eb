"""The folder of a fine-tuning: one process at a time writes there, and what is somebody's own stays as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import run
from finetrace.cli.commands import Found
from finetrace.errors import FinetraceError
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finetune, finished
from finetrace.lock import writing
from finetrace.models import ModelSpec, load
from finetrace.reading import write_examples
from tiny import make_examples

ROWS = make_examples(6)
CONFIG = FinetuneConfig(epochs=1, batch_size=3, rank=2)


@pytest.fixture
def fresh(base_folder: Path) -> Any:
    """A function that loads the tiny base model once more."""
    return lambda: load(ModelSpec(str(base_folder), dtype="float32", device="cpu"))


@pytest.fixture
def command(base_folder: Path, tmp_path: Path) -> list[Any]:
    write_examples(tmp_path / "train.jsonl", ROWS)
    return ["finetune", tmp_path / "train.jsonl", "--model", base_folder, "--epochs", 1, "--out", tmp_path / "out"]


def test_the_second_run_is_refused_and_a_killed_one_leaves_no_lock(
    command: list[Any], tmp_path: Path, capsys: Any
) -> None:
    holding = "import sys, time; from pathlib import Path; from finetrace.lock import writing\n"
    holding += "with writing(Path(sys.argv[1])): print('held', flush=True); time.sleep(3600)"
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", holding, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "another process is writing this adapter; wait until it is done" in err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    assert run(capsys, *command)[0] == 0
    assert finished(tmp_path / "out")


def test_what_came_while_rows_were_encoded_is_seen(fresh: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Another process began and ended between the first look and the lock."""
    out, other = tmp_path / "out", tmp_path / "other"
    finetune(fresh(), ROWS, other, CONFIG)

    def meanwhile(folder: Path, what: str = "index") -> Any:
        if folder == out:
            out.rmdir()
            other.rename(out)
        return writing(folder, what)

    monkeypatch.setattr("finetrace.finetuning.writing", meanwhile)
    with pytest.raises(FinetraceError, match="out: a finished adapter is already there"):
        finetune(fresh(), ROWS, out, CONFIG.model_copy(update={"rank": 3}))


OWN = {"finetune.yaml": "# my notes\nepochs: 1\n", "log.json": "mine", "README.md": "mine"}


@pytest.mark.parametrize("names", [["finetune.yaml"], ["log.json"], [*OWN]])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_files_of_ones_own_are_left_as_they_are(
    command: list[Any], tmp_path: Path, capsys: Any, names: list[str], resume: list[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text(OWN[name])
    saved = ["--config", out / "finetune.yaml"] if "finetune.yaml" in names else []
    code, _, err = run(capsys, *command, *saved, *resume)
    assert code == 2
    assert f"{out}: there is something else already" in err
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != ".lock"} == {
        name: OWN[name] for name in names
    }


def test_saved_settings_of_the_same_run_are_kept_and_others_refused(fresh: Any, tmp_path: Path) -> None:
    """As a run leaves them that was killed in its first epoch."""
    finetune(fresh(), ROWS, tmp_path / "one", CONFIG)
    said = "# mine\n" + (tmp_path / "one" / "finetune.yaml").read_text()
    for name, config in (("same", CONFIG), ("other", CONFIG.model_copy(update={"rank": 3}))):
        out = tmp_path / name
        (out / "checkpoints").mkdir(parents=True)
        (out / ".finetune.yaml.part").touch()
        (out / "finetune.yaml").write_text(said)
        if name == "same":
            finetune(fresh(), ROWS, out, config)
            assert finished(out)
        else:
            with pytest.raises(
                FinetraceError, match="a finetune.yaml with rank 2 where this run has 3; choose another"
            ):
                finetune(fresh(), ROWS, out, config)
        assert (out / "finetune.yaml").read_text() == said
    assert yaml.safe_load(said)["rank"] == 2


def test_a_folder_that_is_taken_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "out" / name).touch()
    monkeypatch.setattr("finetrace.models.load", lambda *_: pytest.fail("loaded for nothing"))
    code, out, err = run(capsys, "finetune", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert code == 2
    assert not out
    assert (
        err.strip()
        == f"finetrace: {tmp_path / 'out'}: a finished adapter is already there; choose another --out or remove it."
    )


def test_the_help_says_what_is_so_where_nothing_is_given() -> None:
    shown = {
        parameter.name: match[1]
        for parameter in Found()["finetune"].params
        if parameter.name in FinetuneConfig.model_fields
        and (match := re.search(r"; (\S+) if not given", parameter.help or ""))
    }
    assert set(FinetuneConfig.model_fields) - set(shown) == {"max_length", "chat_template", "pad_to"}
    assert shown.pop("layers") == "all"
    assert FinetuneConfig().layers is None
    assert shown.pop("target_modules").split(",") == list(FinetuneConfig().target_modules)
    for name, text in shown.items():
        default = getattr(FinetuneConfig(), name)
        assert text == default if isinstance(default, str) else float(text) == default
