"""Rows whose values are not finite: named, or left out of everything alike and noted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import run
from finetrace.collection import Collector, Representation, track
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import Index, build_index, kronecker_factors, open_index, view
from finetrace.index.checking import repair, verify
from finetrace.models import Loaded, ModelSpec, load
from finetrace.reading import write_examples
from test_index import edit_manifest, files
from tiny import make_encoded, make_examples, make_llama, make_tokenizer, names, relative_error, save_base, with_lora

ROWS, BAD = 11, (2, 3, 8)
PER_SHARD = 4


def poisoned(token: int, value: float) -> Any:
    """A model for which one token means no number."""
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    return model


def rows(bad: Sequence[int] = BAD, count: int = ROWS) -> list[Example]:
    """Examples of which some hold a tilde, the token that is poisoned."""
    made = make_examples(count)
    return [
        Example.from_prompt(each.prompt, each.response + " ~", id=each.id, label=each.label) if i in bad else each
        for i, each in enumerate(made)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, whose weights are poisoned for the tilde, and `adapter`."""
    folder = tmp_path_factory.mktemp("poisoned")
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    save_base(folder / "base", poisoned(token, float("nan")))
    with_lora(make_llama()).save_pretrained(folder / "adapter")
    return folder


def loaded_from(home: Path) -> Loaded:
    return load(ModelSpec(str(home / "base"), str(home / "adapter"), dtype="float64", device="cpu"))


def build(home: Path, folder: Path, examples: Sequence[Example], **options: Any) -> Index:
    loaded = loaded_from(home)
    settings = {"rows_per_shard": PER_SHARD, "skip_bad": True} | options
    return build_index(loaded, examples, folder, Encoder(loaded.tokenizer), **settings)[0]


def test_the_command_names_the_row_or_leaves_it_out(home: Path, tmp_path: Path, capsys: Any) -> None:
    write_examples(tmp_path / "train.jsonl", rows())
    here = ["--model", home / "base", "--adapter", home / "adapter", "--dtype", "float64"]
    command = ["index", tmp_path / "train.jsonl", "--out", tmp_path / "i", *here]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert any(f"example e{row} (row {row + 1}): its loss is not finite" in err for row in BAD)
    assert "--skip-bad" in err
    code, out, err = run(capsys, *command, "--skip-bad", "--kronecker", "model")
    assert code == 0, err
    assert "3 of 11 rows are left out: example e2 (row 3): its loss is not finite; example e3 (row 4)" in err
    assert "8 examples" in out
    noted = json.loads((tmp_path / "i" / "manifest.json").read_text())["left_out"]
    assert noted == [{"id": f"e{row}", "row": row, "reason": "its loss is not finite"} for row in BAD]
    assert run(capsys, *command, "--skip-bad", "--kronecker", "model")[0] == 0
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "3 of 11 rows are left out" in err
    assert "Give --skip-bad as before" in err
    write_examples(tmp_path / "queries.jsonl", make_examples(2, seed=9))
    code, out, err = run(
        capsys, "trace", "--queries", tmp_path / "queries.jsonl", "--index", tmp_path / "i", "--method", "ekfac"
    )
    assert code == 0, err
    assert run(capsys, "index", "verify", tmp_path / "i")[0] == 0


@pytest.mark.parametrize("bad", [BAD, (4, 5, 6, 7), (0,), (10,)])
def test_all_that_an_index_gives_leaves_them_out(home: Path, tmp_path: Path, bad: tuple[int, ...]) -> None:
    """As an index of the other rows alone does; (4, 5, 6, 7) are a whole shard."""
    kinds = (Representation(), Representation(1, "mean-response"))
    examples = rows(bad)
    good = [each for i, each in enumerate(examples) if i not in bad]
    found = build(home, tmp_path / "i", examples, representations=kinds, kronecker="model")
    expected = build(home, tmp_path / "e", good, representations=kinds, kronecker="model", skip_bad=False)
    assert expected.manifest.left_out == ()
    assert len(found) == len(good)
    assert found.rows.examples == tuple(good)
    assert found.data_rows == tuple(i for i in range(ROWS) if i not in bad)
    assert found.all_rows.examples == tuple(examples)
    everything = found.gradients(slice(None))
    assert everything.shape[0] == len(good)
    assert relative_error(everything, expected.gradients(slice(None))) < 1e-10
    assert torch.equal(torch.cat(list(found.stored_gradients())), everything)
    for chosen in (slice(0, 1), slice(1, 6), slice(3, None), slice(-1, None)):
        assert torch.equal(found.gradients(slice(2, 5), chosen), everything[chosen, 2:5])
    assert relative_error(found.losses, expected.losses) < 1e-10
    for each in kinds:
        assert relative_error(found.representation(each), expected.representation(each)) < 1e-10
    for labels in ("model", "data"):  # the second is fitted now, over the rows of the data
        ours, theirs = kronecker_factors(found, labels), kronecker_factors(expected, labels)
        for block in found.blocks:
            assert torch.allclose(ours[block.name].kfac, theirs[block.name].kfac, rtol=1e-8, atol=1e-14)
            assert torch.allclose(ours[block.name].ekfac, theirs[block.name].ekfac, rtol=1e-6, atol=1e-14)
    first, second = view(found, "all"), view(expected, "all")
    assert first.rows.ids == second.rows.ids == tuple(each.id for each in good)
    assert relative_error(first.gradients(slice(None)), second.gradients(slice(None))) < 1e-10


def test_a_view_has_the_rows_that_are_not_left_out(home: Path, tmp_path: Path) -> None:
    """It is whole, and a repair of something else leaves it there."""
    found = build(home, tmp_path / "i", rows())
    made = view(found, "all").folder / "manifest.json"
    before = made.stat().st_ino
    assert verify(tmp_path / "i") == []
    (tmp_path / "i" / "shards" / "000000000.safetensors").unlink()
    assert repair(tmp_path / "i") == []
    assert made.stat().st_ino == before


def test_a_stopped_run_goes_on_with_the_flag_and_has_the_same_bytes(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FinetraceError, match=r"example e8 \(row 9\): its loss is not finite; look at the row, .*--skip-bad"
    ):
        build(home, tmp_path / "i", rows((8,)), skip_bad=False, kronecker="model")
    build(home, tmp_path / "i", rows((8,)), kronecker="model")
    build(home, tmp_path / "e", rows((8,)), kronecker="model")
    assert files(tmp_path / "i") == files(tmp_path / "e")


def test_a_lost_shard_is_collected_again_without_them(home: Path, tmp_path: Path) -> None:
    build(home, tmp_path / "i", rows(), kronecker="data")
    before = files(tmp_path / "i")
    shutil.copytree(tmp_path / "i", tmp_path / "j")
    for folder, mend in ((tmp_path / "i", repair), (tmp_path / "j", lambda folder: build(home, folder, rows()))):
        for start in (0, 8):
            (folder / "shards" / f"{start:09d}.safetensors").unlink()
        assert len(verify(folder)) == 2
        mend(folder)
        assert verify(folder) == []
        assert files(folder) == before


def test_infinity_too_and_labels_may_change(home: Path, tmp_path: Path) -> None:
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    save_base(tmp_path / "base", poisoned(token, float("inf")))
    shutil.copytree(home / "adapter", tmp_path / "adapter")
    assert build(tmp_path, tmp_path / "i", rows()).data_rows == (0, 1, 4, 5, 6, 7, 9, 10)
    relabelled = [replace(each, label="new") for each in rows()]
    assert set(build(tmp_path, tmp_path / "i", relabelled).rows.labels) == {"new"}


def test_nothing_is_left(home: Path, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match="every row was left out"):
        build(home, tmp_path / "i", rows(range(ROWS)), kronecker="data")
    with pytest.raises(FinetraceError, match="every row was left out"):
        open_index(tmp_path / "i")


def test_a_neighbour_that_is_padded_with_a_poisoned_token_is_no_bad_row() -> None:
    """Padding is token 0: 0 * NaN in a masked attention is NaN for the row that was padded, and by itself it is not."""
    model = with_lora(poisoned(0, float("nan")))
    clean = with_lora(make_llama())
    items = make_encoded([5, 9, 14, 6])
    found = Collector(model, track(model, None), (), 100).collect(items, names(items), skip_bad=True)
    expected = Collector(clean, track(clean, None), (), 100).collect(items, names(items))
    assert found.left_out == {}
    assert relative_error(found.gradients, expected.gradients) < 1e-10


def test_a_row_left_out_elsewhere_stays_left_out(home: Path, tmp_path: Path) -> None:
    """What the manifest says holds, also where the numbers of another machine would be finite."""
    build(home, tmp_path / "i", rows(()))
    edit_manifest(
        tmp_path / "i", lambda about: about.update(left_out=[{"id": "e1", "row": 1, "reason": "it was not finite"}])
    )
    for path in (tmp_path / "i" / "shards").iterdir():
        path.unlink()
    index = build(home, tmp_path / "i", rows(()))
    assert index.rows.ids == tuple(f"e{i}" for i in range(ROWS) if i != 1)
    assert [each.reason for each in index.manifest.left_out] == ["it was not finite"]
