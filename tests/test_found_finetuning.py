"""How an adapter was fine-tuned, as `validate` and `clean --retrain` find it, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import run, tuned_index
from finetrace.cli.validate import finetuning_of
from finetrace.encoding import INST_TEMPLATE, read_template
from finetrace.errors import FinetraceError
from finetrace.finetune_config import FinetuneConfig, configure, found_config
from finetrace.index import open_index
from finetrace.index.store import Index
from finetrace.lora_variants import refuse_variant
from finetrace.reading import write_examples
from tiny import make_examples

JINJA = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
STATE = {
    "num_train_epochs": 3,
    "train_batch_size": 4,
    "max_steps": 30,
    "log_history": [{"step": 15, "learning_rate": 1e-4}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned tiny model, indexed, and queries."""
    folder = tmp_path_factory.mktemp("found")
    write_examples(folder / "train.jsonl", make_examples(6))
    write_examples(folder / "queries.jsonl", make_examples(2, seed=5))
    return tuned_index(folder, folder / "train.jsonl", epochs=1)


@pytest.fixture
def trainer(place: Path, tmp_path: Path) -> Path:
    """What the Trainer leaves of an adapter."""
    folder = tmp_path / "trainer"
    folder.mkdir()
    shutil.copyfile(place / "adapter" / "adapter_config.json", folder / "adapter_config.json")
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    return folder


def encoded(place: Path, tmp_path: Path, **encoding: Any) -> Index:
    """The index as if it had been built with another encoding."""
    folder = tmp_path / "idx"
    shutil.copytree(place / "idx", folder)
    document = json.loads((folder / "manifest.json").read_text())
    document["encoding"] |= encoding
    (folder / "manifest.json").write_text(json.dumps(document))
    return open_index(folder)


def words(capsys: Any) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("encoding", "wanted", "said"),
    [
        (
            {},
            {"loss_on": "response", "max_length": None, "chat_template": None, "pad_to": None},
            "loss on response, rows never cut and not padded, chat template: the tokenizer's",
        ),
        (
            {"loss_on": "all@96", "max_length": 64, "template": INST_TEMPLATE},
            {"loss_on": "all", "max_length": 64, "chat_template": "inst", "pad_to": 96},
            "loss on all, rows cut after 64 tokens and padded to 96 tokens, chat template: inst",
        ),
        (
            {"loss_on": "last-turn", "template": JINJA, "pad_to": 80},
            {"loss_on": "last-turn", "max_length": None, "chat_template": JINJA, "pad_to": 80},
            "loss on last-turn, rows never cut and padded to 80 tokens, chat template: the index's",
        ),
        (
            {"loss_on": "probe:Sure@70", "max_length": 64},
            {"loss_on": "response", "max_length": 64, "chat_template": None, "pad_to": None},
            "loss on response (the index's own, probe:Sure@70, is none that a fine-tuning has), rows cut after 64",
        ),
    ],
)
def test_rows_of_a_trainer_run_are_encoded_as_in_the_index(
    encoding: dict[str, Any], wanted: dict[str, Any], said: str, place: Path, trainer: Path, tmp_path: Path, capsys: Any
) -> None:
    found = finetuning_of(encoded(place, tmp_path, **encoding), None, trainer)
    assert found.model_dump(include=set(wanted)) == wanted
    assert FinetuneConfig.model_validate(found.model_dump()) == found
    assert said in words(capsys)
    if "template" in encoding:
        assert read_template(found.chat_template) == encoding["template"]


def test_a_saved_fine_tuning_decides_over_the_index(place: Path, tmp_path: Path, capsys: Any) -> None:
    index = encoded(place, tmp_path, loss_on="all", max_length=64)
    for config, adapter in ((None, None), (place / "adapter" / "finetune.yaml", None), (None, place / "adapter")):
        found = finetuning_of(index, config, adapter)
        assert (found.loss_on, found.max_length) == ("response", None)
    assert words(capsys) == ""


def test_retraining_takes_the_tokens_of_the_index(place: Path, trainer: Path, tmp_path: Path, capsys: Any) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(JINJA)
    built = ["--out", tmp_path / "idx", "--model", place / "base", "--adapter", place / "adapter"]
    how = ["--loss-on", "all", "--chat-template", template]
    assert run(capsys, "index", place / "train.jsonl", *built, *how)[0] == 0
    (tmp_path / "idx" / "adapter" / "finetune.yaml").unlink()
    template.unlink()
    command = ["validate", "--index", tmp_path / "idx", "--queries", place / "queries.jsonl", "--adapter", trainer]
    few = ["--measure", "lds", "--subsets", 3, "--seeds", 1, "--method", "random", "--out", tmp_path / "v"]
    code, _, err = run(capsys, *command, *few)
    assert code == 0, err
    how_tuned = json.loads((tmp_path / "v" / "results.json").read_text())["config"]["finetuning"]
    assert (how_tuned["loss_on"], how_tuned["chat_template"]) == ("all", JINJA)


def change(folder: Path, **settings: Any) -> Path:
    """Of the adapter's configuration in a folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return path


@pytest.mark.parametrize(
    "setting",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": False},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [3]},
        {"exclude_modules": ["layers.0"]},
        {"lora_bias": True},
        {"target_parameters": ["mlp.experts"]},
        {"peft_type": "ADALORA"},
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_not_retrained(
    setting: dict[str, Any], place: Path, trainer: Path, tmp_path: Path
) -> None:
    index = encoded(place, tmp_path)
    path = change(trainer, **setting)
    ((key, value),) = setting.items()
    with pytest.raises(FinetraceError) as told:
        finetuning_of(index, None, trainer)
    assert f"{path}: {key} is {json.dumps(value)}, and retraining makes plain LoRA" in str(told.value)
    assert finetuning_of(index, None, trainer, retrained=False).epochs == 3
    change(tmp_path / "idx" / "adapter", **setting)
    for config in (None, place / "adapter" / "finetune.yaml"):  # however it says that it was trained
        with pytest.raises(FinetraceError, match=key):
            finetuning_of(index, config, None)


def test_plain_lora_is_told_by_what_decides_it(place: Path, trainer: Path) -> None:
    refuse_variant(place / "adapter")
    refuse_variant(trainer.parent)  # nothing is there
    change(trainer, r=64, revision="main", peft_version="0.9.0", rank_pattern=None, loftq_config=None, not_known_yet=3)
    change(trainer, megatron_core="megatron.core", layers_to_transform=[1], layers_pattern="layers", task_type=None)
    refuse_variant(trainer)
    (trainer / "adapter_config.json").write_text("{")
    with pytest.raises(FinetraceError, match=r"adapter_config\.json: cannot be read"):
        refuse_variant(trainer)


def test_a_variant_is_refused_before_anything_is_scored(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded(place, tmp_path)
    change(tmp_path / "idx" / "adapter", use_rslora=True)
    monkeypatch.setattr(Index, "model", lambda *_: pytest.fail("loaded"))
    validate = ["validate", "--queries", place / "queries.jsonl", "--out", tmp_path / "v"]
    clean = ["clean", "--retrain", "--bad", place / "queries.jsonl", "--out", tmp_path / "c"]
    for command in (validate, clean):
        code, _, err = run(capsys, *command, "--index", tmp_path / "idx")
        assert code == 2
        assert "use_rslora is true" in " ".join(err.split()), err


def test_a_chat_template_is_found_where_its_file_is_gone(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = encoded(place, tmp_path, template=JINJA)
    saved = tmp_path / "idx" / "adapter" / "finetune.yaml"
    saved.write_text(saved.read_text().replace("chat_template: null", "chat_template: mine.jinja"))
    for config in (None, saved):
        found = finetuning_of(index, config, None)
        assert read_template(found.chat_template) == JINJA
        assert f"mine.jinja that {saved} names is not there; retrainings take the index's own" in words(capsys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jinja").write_text(JINJA)
    assert finetuning_of(index, None, None).chat_template == "mine.jinja"
    assert words(capsys) == ""
    (tmp_path / "mine.jinja").unlink()
    index.manifest = index.manifest.model_copy(
        update={"encoding": index.manifest.encoding.model_copy(update={"template": None})}
    )
    with pytest.raises(FinetraceError, match=r"finetune\.yaml: chat_template mine\.jinja: there is no such file here"):
        finetuning_of(index, None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 0", "epochs: Input should be greater than or equal to 1 (given 0)"),
        ("learning_rate: fast", "learning_rate: Input should be a valid number"),
        ("surprise: 1", "surprise: there is no such setting (given 1)"),
    ],
)
def test_a_wrong_value_is_told_with_its_file_and_key(
    text: str, said: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    saved = tmp_path / "finetune.yaml"
    saved.write_text(text)
    command = ["validate", "--index", place / "idx", "--queries", place / "queries.jsonl", "--config", saved]
    code, _, err = run(capsys, *command, "--out", tmp_path / "v")
    assert code == 2
    assert "--epochs" not in err and "--surprise" not in err
    with pytest.raises(FinetraceError) as told:
        configure("default", saved, {"batch_size": 4})
    assert str(told.value).startswith(f"{saved}: {said}")
    with pytest.raises(FinetraceError, match=r"^--batch-size: "):  # an option on top of a file
        configure("default", saved, {"batch_size": 0, "epochs": 1, "learning_rate": 0.1})


def test_a_wrong_value_that_the_trainer_left_is_told_with_its_file_and_key(trainer: Path) -> None:
    state = trainer / "trainer_state.json"
    state.write_text(json.dumps({**STATE, "train_batch_size": 0}))
    with pytest.raises(FinetraceError, match=r"trainer_state\.json: train_batch_size: Input should be greater"):
        found_config(trainer)
    state.write_text(json.dumps(STATE))
    change(trainer, r=0)
    with pytest.raises(FinetraceError, match=r"adapter_config\.json: r: Input should be greater"):
        found_config(trainer)


@pytest.mark.parametrize(
    ("length", "epochs"),
    [
        ({"num_train_epochs": 0.4}, "only 0.4 times"),
        ({"num_train_epochs": 1, "epoch": 0.25, "global_step": 30}, "only 0.25 times"),  # as the Trainer rounds up
        ({"num_train_epochs": 3, "epoch": 2.5, "global_step": 30}, 3),
        ({"num_train_epochs": 2, "epoch": 1.25, "global_step": 30}, 1),
        ({"num_train_epochs": 3, "epoch": 3.0, "global_step": 30}, 3),
        (
            {"num_train_epochs": 3, "epoch": 0.4, "global_step": 3},
            3,
        ),  # a checkpoint, where an epoch's last step is short
    ],
)
def test_runs_that_were_not_of_whole_epochs(length: dict[str, Any], epochs: int | str, trainer: Path) -> None:
    (trainer / "trainer_state.json").write_text(json.dumps({**STATE, **length}))
    heard: list[str] = []
    if isinstance(epochs, str):
        with pytest.raises(FinetraceError, match=rf"trainer_state\.json: the run went {epochs} through its rows"):
            found_config(trainer, heard.append)
        return
    found = found_config(trainer, heard.append)
    assert found is not None and found.epochs == epochs
    whole = length["epoch"] in (3.0, 0.4)
    assert heard == [] if whole else f"the run went {length['epoch']:.3g} times" in heard[0]
