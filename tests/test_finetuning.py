"""Fine-tuning: the same seed gives the same bits, a killed run ends where an undisturbed one does, no pickle."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file

from finetrace import atomic, models
from finetrace.benchmark.stages import tuned_adapter
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.finetune_config import PRESETS, FinetuneConfig, configure, other_base, other_rows, other_template
from finetrace.finetuning import finetune, finished, new_adapter
from finetrace.forward import Batch, token_losses
from finetrace.index import build_index, open_index
from finetrace.models import Loaded, ModelSpec, load, save_adapter
from finetrace.training import ResponseTrainer, _order, fit
from tiny import CHATML, make_examples, make_gpt2, make_llama, make_tokenizer, save_base, with_lora

ROWS = 11
CONFIG = FinetuneConfig(epochs=3, batch_size=4, learning_rate=5e-3, rank=2, dropout=0.2)


@pytest.fixture
def fresh(base_folder: Path) -> Any:
    """A function that loads the tiny base model once more."""
    return lambda: load(ModelSpec(str(base_folder), dtype="float64", device="cpu"))


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def run(loaded: Loaded, folder: Path, config: FinetuneConfig = CONFIG, **options: Any) -> bytes:
    finetune(loaded, make_examples(ROWS), folder, config, **options)
    return adapter(folder)


def test_training_looks_for_no_garbage_and_leaves_none(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through all objects of the process takes ten times as long as a training of this size."""
    loaded = fresh()
    model = new_adapter(loaded, CONFIG)
    items, _ = Encoder(loaded.tokenizer).encode_all(make_examples(4))
    monkeypatch.setattr("accelerate.accelerator.release_memory", lambda *_: pytest.fail("it looked for garbage"))
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects()}
        fit(model, items, CONFIG)
        left = [each for each in gc.get_objects() if id(each) not in before]
        assert not [each for each in left if isinstance(each, ResponseTrainer | torch.optim.Optimizer)]
    finally:
        gc.enable()


def test_what_an_adapter_was_not_made_of_is_told(fresh: Any, tmp_path: Path) -> None:
    loaded = fresh()
    limit = longest(loaded) - 1
    run(loaded, tmp_path / "a", FinetuneConfig(epochs=1, rank=2, max_length=limit, learning_rate=5e-3))
    assert other_base(loaded) == ""
    base = loaded.model.peft_config["default"]
    base.base_model_name_or_path = f"owner/{Path(loaded.spec.model).name}"  # the same by another road
    assert other_base(loaded) == ""
    base.base_model_name_or_path = "owner/another"
    assert other_base(loaded).startswith(
        f"the adapter names owner/another as its base and --model is {loaded.spec.model};"
    )
    assert other_base(Loaded(make_llama(), loaded.tokenizer, loaded.spec)) == ""
    for count, cut, said in ((ROWS, limit, False), (ROWS - 1, limit, True), (ROWS, limit + 1, True)):
        encoder = Encoder(loaded.tokenizer, max_length=cut)
        index, _ = build_index(loaded, make_examples(ROWS)[:count], tmp_path / f"{count}-{cut}", encoder)
        assert ("other rows" in other_rows(tmp_path / "a", index.manifest.data_fingerprint)) is said
    assert other_rows(tmp_path, "anything") == ""


def longest(loaded: Loaded) -> int:
    """Tokens of the longest of the rows."""
    return max(len(item.ids) for item in Encoder(loaded.tokenizer).encode_all(make_examples(ROWS))[0])


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_another_template_beside_an_adapter_is_told(fresh: Any, tmp_path: Path, name: str) -> None:
    loaded = fresh()
    assert other_template(tmp_path, loaded) == ""
    for template, told in ((CHATML + "\n", False), ("{{ messages }}", True)):
        text = template if name.endswith("jinja") else json.dumps({"chat_template": template})
        (tmp_path / name).write_text(text)
        assert other_template(tmp_path, loaded).startswith(f"{tmp_path / name} holds another chat template") == told
    (tmp_path / name).write_bytes(b"\xff")
    assert other_template(tmp_path, loaded) == ""


def test_rows_longer_than_the_limits_are_said_before_the_training(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    loaded = fresh()
    limit = longest(loaded) - 1

    class Stopped(BaseException):
        pass

    def training(*_: object, **__: object) -> None:
        said.append("training")
        raise Stopped

    monkeypatch.setattr("finetrace.finetuning.fit", training)
    with pytest.raises(Stopped):
        run(loaded, tmp_path / "a", FinetuneConfig(epochs=1, rank=2, max_length=limit), say=said.append)
    assert len(said) == 2
    assert f"longer than {limit} tokens" in said[0]


class Killed(BaseException):
    """As a kill does, it passes every handler."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Any:
    """A context in which training dies in the middle of a step."""
    context = monkeypatch.context()
    patch = context.__enter__()
    compute = ResponseTrainer.compute_loss

    def dying(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        if model.training and self.state.global_step == step:
            raise Killed
        return compute(self, model, inputs, return_outputs, **more)

    patch.setattr(ResponseTrainer, "compute_loss", dying)
    return context


def run_killed(
    monkeypatch: pytest.MonkeyPatch, step: int, loaded: Loaded, folder: Path, config: FinetuneConfig, **options: Any
) -> None:
    context = kill_at(monkeypatch, step)
    try:
        with pytest.raises(Killed):
            run(loaded, folder, config, **options)
    finally:
        context.__exit__(None, None, None)


# the same bits


def test_the_same_seed_gives_the_same_bits(fresh: Any, tmp_path: Path) -> None:
    one = run(fresh(), tmp_path / "one")
    torch.manual_seed(12345)  # what happened before does not matter
    assert run(fresh(), tmp_path / "two") == one
    assert run(fresh(), tmp_path / "three", CONFIG.model_copy(update={"seed": 1})) != one
    for name in ("adapter_config.json", "log.json"):
        ours, theirs = (json.loads((tmp_path / each / name).read_text()) for each in ("one", "two"))
        assert strip_times(ours) == strip_times(theirs)


def strip_times(log: Any) -> Any:
    if isinstance(log, dict):
        return log
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]


@pytest.mark.parametrize("validation", [0.0, 0.3])
@pytest.mark.parametrize("step", [3, 4, 7])
def test_killed_and_resumed(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, validation: float
) -> None:
    """Three steps an epoch (two with validation); the kill comes after one checkpoint or two."""
    config = CONFIG.model_copy(update={"validation": validation, "epochs": 4})
    whole = run(fresh(), tmp_path / "whole", config)
    run_killed(monkeypatch, step, fresh(), tmp_path / "killed", config)
    assert not finished(tmp_path / "killed")
    torch.manual_seed(999)
    assert run(fresh(), tmp_path / "killed", config, resume=True) == whole
    for folder in sorted((tmp_path / "whole" / "checkpoints").iterdir()):
        twin = tmp_path / "killed" / "checkpoints" / folder.name
        assert (twin / "optimizer.safetensors").read_bytes() == (folder / "optimizer.safetensors").read_bytes()
        assert adapter(twin) == adapter(folder)


def test_killed_twice(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(fresh(), tmp_path / "whole")
    run_killed(monkeypatch, 4, fresh(), tmp_path / "killed", CONFIG)
    run_killed(monkeypatch, 8, fresh(), tmp_path / "killed", CONFIG, resume=True)
    assert run(fresh(), tmp_path / "killed", resume=True) == whole


def test_killed_before_the_first_checkpoint(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(fresh(), tmp_path / "whole")
    run_killed(monkeypatch, 1, fresh(), tmp_path / "killed", CONFIG)
    assert run(fresh(), tmp_path / "killed", resume=True) == whole


def test_killed_before_the_adapter_was_saved(fresh: Any, tmp_path: Path) -> None:
    whole = run(fresh(), tmp_path / "one")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "log.json"):
        (tmp_path / "one" / name).unlink()
    assert run(fresh(), tmp_path / "one", resume=True) == whole


def test_files_of_an_adapter_are_on_the_disk_before_they_get_their_names(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def flush(file: Path) -> None:
        assert not (tmp_path / "a" / file.name).exists()
        flushed.append(file.name)
        atomic.flush(file)

    monkeypatch.setattr(models, "flush", flush)
    save_adapter(new_adapter(fresh(), CONFIG), tmp_path / "a")
    assert sorted(flushed) == sorted(each.name for each in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("part", ["trainer_state.json", "optimizer.safetensors"])
def test_a_checkpoint_cut_short_is_passed_over(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A kill while the second checkpoint is being written: its state is missing or half there."""
    whole = run(fresh(), tmp_path / "whole")
    run_killed(monkeypatch, 7, fresh(), tmp_path / "killed", CONFIG)
    last = tmp_path / "killed" / "checkpoints" / "checkpoint-6"
    state = (last / "trainer_state.json").read_text()
    if part == "trainer_state.json":
        (last / part).write_text(state[: len(state) // 2])
    else:
        (last / part).unlink()
        (last / "trainer_state.json").unlink()
    assert run(fresh(), tmp_path / "killed", resume=True) == whole


def test_a_checkpoint_comes_whole_over_a_half_written_one(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the second checkpoint leaves files emptied or cut; PEFT would go on from such a model card."""
    run(fresh(), tmp_path / "whole")
    run_killed(monkeypatch, 4, fresh(), tmp_path / "killed", CONFIG)
    whole, half = (tmp_path / each / "checkpoints" / "checkpoint-6" for each in ("whole", "killed"))
    half.mkdir()
    names = sorted({path.name for path in whole.iterdir()} - {"trainer_state.json"})
    for i, name in enumerate(names):
        (half / name).write_bytes((whole / name).read_bytes()[: 40 * (i % 2)])
    run(fresh(), tmp_path / "killed", resume=True)
    assert names == sorted({path.name for path in half.iterdir()} - {"trainer_state.json"})
    for name in names:
        assert (half / name).read_bytes() == (whole / name).read_bytes(), name


# what is written


def test_what_a_run_leaves(fresh: Any, tmp_path: Path) -> None:
    loaded = fresh()
    result = finetune(loaded, make_examples(ROWS), tmp_path / "out", CONFIG)
    assert result.folder == tmp_path / "out"
    assert finished(result.folder)
    assert result.held_out == ()
    assert result.lengths.sentence() == ""
    losses = [entry["loss"] for entry in result.log if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    checkpoints = sorted((result.folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for checkpoint in checkpoints:
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json"} <= {
            path.name for path in checkpoint.iterdir()
        }
    suffixes = {path.suffix for path in result.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes <= {".json", ".safetensors", ".yaml", ".md"}
    assert adapter(checkpoints[-1]) == adapter(result.folder)
    assert not loaded.model.training
    assert type(loaded.model).__name__ == "PeftModelForCausalLM"


def test_the_adapter_saved_is_the_one_in_memory(fresh: Any, base_folder: Path, tmp_path: Path) -> None:
    loaded = fresh()
    run(loaded, tmp_path / "out")
    again = load(ModelSpec(str(base_folder), str(tmp_path / "out"), dtype="float64", device="cpu"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_the_saved_configuration_runs_again(fresh: Any, tmp_path: Path) -> None:
    one = run(fresh(), tmp_path / "one")
    config = configure("default", tmp_path / "one" / "finetune.yaml", {})
    assert config == CONFIG
    assert run(fresh(), tmp_path / "two", config) == one
    assert configure("paper", None, {"epochs": 2, "seed": None}) == PRESETS["paper"].model_copy(update={"epochs": 2})
    for bad, sentence in (
        (("nosuch", None, {}), "--preset nosuch: not known"),
        (("default", tmp_path / "none.yaml", {}), r"--config .*none.yaml: cannot be read"),
        (("default", None, {"epochs": 0}), r"--epochs: .* \(given 0\)"),
        (("default", None, {"dropout": 1.5}), r"--dropout: "),
        (("default", None, {"schedule": "sawtooth"}), r"--schedule: Input should be 'linear', 'cosine'"),
        (("default", None, {"seed": 2**32}), r"--seed: Input should be less than 4294967296"),
    ):
        with pytest.raises(FinetraceError, match=sentence):
            configure(*bad)
    (tmp_path / "odd.yaml").write_text("- 1\n")
    with pytest.raises(FinetraceError, match="cannot be read as a saved configuration"):
        configure("default", tmp_path / "odd.yaml", {})
    for text, sentence in (
        ("", "odd.yaml: the file is empty; give a finetune.yaml"),
        ("# nothing\n", "odd.yaml: the file is empty"),
        ("epochs: [1\nrank: 2\n", r"cannot be read as a saved configuration \(line 2: expected ',' or ']'"),
        ("1: 2\n", "it takes one setting a line, for instance epochs: 3"),
    ):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(FinetraceError, match=sentence) as caught:
            configure("default", tmp_path / "odd.yaml", {})
        assert "\n" not in str(caught.value)
    (tmp_path / "odd.yaml").write_text("surprise: 1\n")
    with pytest.raises(FinetraceError, match="surprise"):
        configure("default", tmp_path / "odd.yaml", {})


def test_the_first_step_is_that_of_a_plain_loop(fresh: Any, tmp_path: Path) -> None:
    """One epoch, one step, no dropout: AdamW on the mean over the batch's response tokens, by hand."""
    examples = make_examples(5)
    config = FinetuneConfig(epochs=1, batch_size=5, learning_rate=1e-2, rank=2, dropout=0)
    finetune(fresh(), examples, tmp_path / "out", config)
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    loaded = fresh()
    set_seed(0)
    model = get_peft_model(
        loaded.model, LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    batch = Batch.of(Encoder(loaded.tokenizer).encode_all(examples)[0])
    token_losses(model, batch)[0].mean().backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter, saved[name.replace(".default", "")], rtol=1e-8, atol=1e-12)


# validation


def test_validation_holds_rows_out(fresh: Any, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"validation": 0.3})
    result = finetune(fresh(), make_examples(ROWS), tmp_path / "out", config)
    assert len(result.held_out) == 3
    assert set(result.held_out) < {f"e{i}" for i in range(ROWS)}
    held = [entry["eval_loss"] for entry in result.log if "eval_loss" in entry]
    assert len(held) == 3
    told = yaml.safe_load((tmp_path / "out" / "finetune.yaml").read_text())
    assert tuple(told["held_out"]) == result.held_out
    note = other_rows(tmp_path / "out", told["data_fingerprint"])
    assert note.startswith("3 of these rows were held out")
    assert all(name in note for name in result.held_out)
    assert configure("default", tmp_path / "out" / "finetune.yaml", {}).validation == 0.3  # what is noted is no setting
    best = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    ordered = sorted(best, key=lambda path: int(path.name.split("-")[1]))
    assert adapter(tmp_path / "out") == adapter(ordered[held.index(min(held))])


def test_a_small_share_still_holds_one_row_out(fresh: Any, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"validation": 0.01, "epochs": 1})
    assert len(finetune(fresh(), make_examples(4), tmp_path / "out", config).held_out) == 1
    with pytest.raises(FinetraceError, match=r"--validation 0.01 of 1 examples leaves none to train on"):
        finetune(fresh(), make_examples(1), tmp_path / "other", config)


OVERFIT = CONFIG.model_copy(
    update={"validation": 0.3, "epochs": 40, "patience": 2, "learning_rate": 0.1, "batch_size": 2}
)


def test_early_stopping_stops(fresh: Any, tmp_path: Path) -> None:
    result = finetune(fresh(), make_examples(ROWS), tmp_path / "out", OVERFIT)
    held = [entry["eval_loss"] for entry in result.log if "eval_loss" in entry]
    assert len(held) < 40
    assert held.index(min(held)) == len(held) - 3
    checkpoints = sorted((tmp_path / "out" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert adapter(tmp_path / "out") == adapter(checkpoints[-3])


@pytest.mark.parametrize("before", [2, 1, 0])
def test_patience_survives_a_kill(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Killed in the epochs of rising loss, or after the last checkpoint, the run stops where it would have stopped."""
    result = finetune(fresh(), make_examples(ROWS), tmp_path / "whole", OVERFIT)
    epochs = len([entry for entry in result.log if "eval_loss" in entry])
    if before:
        run_killed(monkeypatch, (epochs - before) * 4 + 1, fresh(), tmp_path / "killed", OVERFIT)
        folder = tmp_path / "killed"
    else:
        folder = tmp_path / "whole"
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "log.json"):
            (folder / name).unlink()
    again = finetune(fresh(), make_examples(ROWS), folder, OVERFIT, resume=True)
    assert [e["eval_loss"] for e in again.log if "eval_loss" in e] == [
        e["eval_loss"] for e in result.log if "eval_loss" in e
    ]
    assert strip_times(again.log)[:-1] == strip_times(result.log)[:-1]
    if before:
        assert adapter(folder) == adapter(tmp_path / "whole")


# which layers


def saved_layers(folder: Path) -> set[str]:
    return {
        name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for name in load_file(folder / "adapter_model.safetensors")
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"layers": (1,)}, {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
        ({"target_modules": ("o_proj",)}, {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        ({"target_modules": ("o_proj",), "layers": (0,)}, {"model.layers.0.self_attn.o_proj"}),
        ({"target_modules": ("self_attn.o_proj",)}, {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        (
            {"target_modules": (r".*layers\.1\.mlp\.(up|down)_proj",)},
            {f"model.layers.1.mlp.{n}_proj" for n in ("up", "down")},
        ),
        ({"target_modules": ("all-linear",), "layers": None}, 14),
    ],
)
def test_target_modules_and_layers(fresh: Any, tmp_path: Path, given: dict[str, Any], expected: Any) -> None:
    run(fresh(), tmp_path / "out", CONFIG.model_copy(update={"epochs": 1, **given}))
    found = saved_layers(tmp_path / "out")
    assert (len(found) if isinstance(expected, int) else found) == expected


def test_gpt2(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_gpt2())
    spec = ModelSpec(str(base), dtype="float32", device="cpu")
    run(load(spec), tmp_path / "out", CONFIG.model_copy(update={"target_modules": ("c_attn",), "epochs": 1}))
    loaded = load(ModelSpec(str(base), str(tmp_path / "out"), dtype="float32", device="cpu"))
    assert len(build_index(loaded, make_examples(3), tmp_path / "i", Encoder(loaded.tokenizer))[0]) == 3


# in words


def test_existing_folders(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = tmp_path / "done"
    before = run(fresh(), done)
    for resume in (False, True):
        with pytest.raises(FinetraceError, match="done: a finished adapter is already there; choose another --out"):
            run(fresh(), done, resume=resume)
    assert adapter(done) == before
    run_killed(monkeypatch, 4, fresh(), tmp_path / "half", CONFIG)
    with pytest.raises(FinetraceError, match="half: an unfinished run is there; go on with --resume"):
        run(fresh(), tmp_path / "half")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(FinetraceError, match="mine: there is something else already"):
        run(fresh(), tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    with pytest.raises(FinetraceError, match=r"README.md: there is something else already"):
        run(fresh(), tmp_path / "mine" / "README.md")
    with pytest.raises(FinetraceError, match=r"README.md.x: cannot be written"):
        run(fresh(), tmp_path / "mine" / "README.md" / "x")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"target_modules": ("nowhere",)}, "--target-modules nowhere: .*nowhere"),
        ({"target_modules": ("q_proj", "nowhere")}, "--target-modules q_proj nowhere: no layer is called nowhere"),
        ({"target_modules": ("(",)}, r"--target-modules \(: "),
        ({"target_modules": ()}, "--target-modules"),
        ({"target_modules": (r".*q_proj",), "layers": (0,)}, r"--target-modules .*layers_to_transform"),
        ({"layers": (2,)}, "--layers 2: the model has layers 0 to 1"),
        ({"layers": (0, -1)}, "--layers 0 -1: the model has layers 0 to 1"),
        ({"chat_template": "nowhere.jinja"}, r"nowhere.jinja: no such chat template file"),
        ({"max_length": 8}, "example e0: no response token"),
        ({"schedule": "constant", "warmup_steps": 5}, "--warmup-steps 5: .* take constant_with_warmup"),
        ({"schedule": "polynomial", "learning_rate": 1e-7}, "--learning-rate 1e-07: .* take a larger one"),
    ],
)
def test_settings_that_cannot_be(fresh: Any, tmp_path: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FinetraceError, match=sentence):
        run(fresh(), tmp_path / "out", CONFIG.model_copy(update=given))
    assert not (tmp_path / "out").exists()


def test_no_rows(fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match="the training set is empty"):
        finetune(fresh(), [], tmp_path / "out")
    with pytest.raises(FinetraceError, match="example q: the last turn is not an assistant's; give it a response"):
        finetune(fresh(), [Example.from_prompt("q", id="q")], tmp_path / "out")


def test_a_model_with_an_adapter(fresh: Any, tmp_path: Path) -> None:
    """A second run on what the first one left would start from its adapter and say that it had not."""
    loaded = fresh()
    run(loaded, tmp_path / "one")
    with pytest.raises(FinetraceError, match="the model carries an adapter already; load its base alone"):
        run(loaded, tmp_path / "two")


@pytest.mark.parametrize("given", [{"learning_rate": 1e-3}, {"seed": 4}, {"epochs": 9}, {"layers": (0,)}])
def test_resuming_with_other_settings(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    run_killed(monkeypatch, 4, fresh(), tmp_path / "half", CONFIG)
    name = next(iter(given))
    with pytest.raises(
        FinetraceError, match=rf"finetune.yaml: the unfinished run has {name} .*, this one .*same settings"
    ):
        run(fresh(), tmp_path / "half", CONFIG.model_copy(update=given), resume=True)


def test_resuming_with_other_data_or_model(fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_killed(monkeypatch, 4, fresh(), tmp_path / "half", CONFIG)
    with pytest.raises(FinetraceError, match="the unfinished run has data_fingerprint"):
        finetune(fresh(), make_examples(ROWS, seed=2), tmp_path / "half", CONFIG, resume=True)
    other = load(ModelSpec(str(save_base(tmp_path / "other", make_llama(3))), dtype="float64", device="cpu"))
    with pytest.raises(FinetraceError, match="the unfinished run has model"):
        run(other, tmp_path / "half", CONFIG, resume=True)


def test_resuming_in_another_precision_or_over_other_weights(
    fresh: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed(monkeypatch, 4, fresh(), tmp_path / "half", CONFIG)
    narrow, other = fresh(), fresh()
    narrow.model.float()
    with pytest.raises(FinetraceError, match="the unfinished run has dtype float64, this one float32"):
        run(narrow, tmp_path / "half", CONFIG, resume=True)
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(FinetraceError, match="the unfinished run has base_fingerprint"):
        run(other, tmp_path / "half", CONFIG, resume=True)


def test_a_finished_adapter_of_other_settings_is_not_taken_over(base_folder: Path, tmp_path: Path) -> None:
    spec, rows = ModelSpec(str(base_folder), dtype="float64", device="cpu"), make_examples(ROWS)
    first = FinetuneConfig(epochs=1, batch_size=4, rank=2)
    tuned_adapter(tmp_path / "a", spec, rows, first)
    before = adapter(tmp_path / "a")
    tuned_adapter(tmp_path / "a", spec, rows, first)
    with pytest.raises(FinetraceError, match="an adapter of another fine-tuning is there"):
        tuned_adapter(tmp_path / "a", spec, rows, first.model_copy(update={"epochs": 2}))
    assert adapter(tmp_path / "a") == before


def test_no_two_seeds_share_an_order() -> None:
    """The sampler orders epoch e by the seed of the data plus e."""
    seeds = range(50)
    orders = {_order(seed) + epoch for seed in seeds for epoch in range(100)}
    assert len(orders) == 50 * 100
    assert _order(0) == 0  # as it was when published tables were made
    assert 0 <= _order(2**31) < 2**32
    drawn = []
    for seed in range(3):
        sampler = SeedableRandomSampler(range(30), data_seed=_order(seed))
        drawn += [tuple(sampler) for _ in range(5)]
    assert len(set(drawn)) == 15


def test_divergence_is_told(fresh: Any, tmp_path: Path) -> None:
    loaded = fresh()
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FinetraceError, match=r"training diverged: .* smaller --learning-rate"):
        run(loaded, tmp_path / "out", CONFIG.model_copy(update={"epochs": 1}))
    assert not finished(tmp_path / "out")


def test_what_is_cut_is_reported(fresh: Any, tmp_path: Path) -> None:
    examples = [*make_examples(3), Example.from_prompt("q", "x" * 100, id="long")]
    config = CONFIG.model_copy(update={"epochs": 1, "max_length": 90})
    assert [item.id for item in finetune(fresh(), examples, tmp_path / "a", config).lengths.longer] == ["long"]


# made elsewhere


def test_an_adapter_trained_by_plain_peft(base_folder: Path, tmp_path: Path) -> None:
    """PEFT and a loop over torch, nothing of this library: it loads, is indexed and asked."""
    model = with_lora(make_llama(), ["q_proj", "k_proj", "up_proj"], rank=3).train()
    tokenizer = make_tokenizer()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for example in make_examples(4):
        text = tokenizer.apply_chat_template([m._asdict() for m in example.messages], tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(ModelSpec(str(base_folder), str(tmp_path / "adapter"), dtype="float64", device="cpu"))
    index, _ = build_index(loaded, make_examples(5), tmp_path / "i", Encoder(loaded.tokenizer))
    assert [block.name for block in index.blocks[:2]] == [
        f"model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"
    ]
    assert len(index.blocks) == 12
    found = open_index(tmp_path / "i").features(make_examples(5))[0]
    assert torch.allclose(found.gradients, index.gradients(slice(None)), rtol=1e-5, atol=1e-7)
    assert yaml.safe_load((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
