"""The parameters study: distances against dense matrices, first-order changes against true ones, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetrace.collection import Block
from finetrace.studies.parameters import (
    MODELS,
    State,
    _measured,
    correlation,
    effective_distance,
    ends,
    pairs,
    raw_distance,
    states,
    steps,
)
from finetrace.studies.parameters_study import GOES_WITH, PARAMETERS, _pairs
from finetrace.studies.study import Setting
from finetrace.studies.write import run
from tiny import make_llama, make_tokenizer, save_base

BLOCKS = (
    Block("0.lora_A.weight", (2, 5), 0),
    Block("0.lora_B.weight", (3, 2), 10),
    Block("1.lora_A.weight", (2, 4), 16),
)
BLOCKS += (Block("1.lora_B.weight", (6, 2), 24),)


def state(model: str, epoch: int, seed: int, **more: Any) -> State:
    made = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "parameters": torch.randn(36, generator=made),
        "losses": torch.rand(4, generator=made),
        "gradients": torch.randn(4, 36, generator=made),
        "complied": np.array([0.0, 1.0, 1.0, 0.0]),
    }
    return State(model, epoch, blocks=BLOCKS, scale=1.5, **{**values, **more})


def dense(of: State) -> list[torch.Tensor]:
    matrices = [of.parameters[b.columns].view(b.shape).double() for b in BLOCKS]
    return [1.5 * up @ down for down, up in zip(matrices[::2], matrices[1::2], strict=True)]


def test_distances_are_those_of_dense_matrices() -> None:
    one, other = state("a", 1, 0), state("b", 1, 1)
    expected = sum(float((x - y).square().sum()) for x, y in zip(dense(one), dense(other), strict=True)) ** 0.5
    assert effective_distance(one, other) == pytest.approx(expected, rel=1e-10)
    assert effective_distance(one, one) == pytest.approx(0, abs=1e-5)
    assert raw_distance(one, other) == pytest.approx(float((one.parameters - other.parameters).norm()), rel=1e-6)


def test_another_factorisation_of_the_same_weights_is_far_only_in_raw_entries() -> None:
    one = state("a", 1, 0)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    pieces = [one.parameters[b.columns].view(b.shape) for b in BLOCKS]
    turned = [turn.T @ p if "lora_A" in b.name else p @ turn for b, p in zip(BLOCKS, pieces, strict=True)]
    other = state("b", 1, 0, parameters=torch.cat([p.flatten() for p in turned]))
    assert raw_distance(one, other) > 1
    assert effective_distance(one, other) < 1e-2


def test_steps_are_inner_products_of_consecutive_epochs() -> None:
    found = [
        state("base", 0, 0),
        state("benign", 1, 1),
        state("benign", 2, 2),
        state("harmful", 1, 3),
        state("mixed", 1, 4),
    ]
    records = steps(found)
    assert len(records) == 4 * 4
    moved = found[2].parameters - found[1].parameters
    here = [r for r in records if (r["model"], r["epoch"]) == ("benign", 2)]
    np.testing.assert_allclose([r["first"] for r in here], (found[1].gradients @ moved).numpy(), rtol=1e-5)
    mean = (found[1].gradients + found[2].gradients) / 2
    np.testing.assert_allclose([r["both"] for r in here], (mean @ moved).numpy(), rtol=1e-4)
    np.testing.assert_allclose([r["change"] for r in here], (found[2].losses - found[1].losses).numpy(), rtol=1e-5)
    own = state("start of harmful", 0, 9)
    first = next(r for r in steps([*found, own]) if r["model"] == "harmful")
    assert first["distance"] == pytest.approx(float((found[3].parameters - own.parameters).norm()))


def test_ends_go_from_the_start_to_the_last_epoch() -> None:
    silent = np.zeros(4)
    found = [state("base", 0, 0, complied=silent), state("benign", 1, 1), state("benign", 2, 2)]
    found += [state("harmful", 1, 3), state("mixed", 1, 4)]
    here = [r for r in ends(found) if r["model"] == "benign"]
    moved = found[2].parameters - found[0].parameters
    np.testing.assert_allclose([r["first"] for r in here], (found[0].gradients @ moved).numpy(), rtol=1e-5)
    np.testing.assert_allclose([r["change"] for r in here], (found[2].losses - found[0].losses).numpy(), rtol=1e-5)
    walked = [r for r in steps(found) if r["model"] == "benign"]
    sums = [sum(r["first"] for r in walked if r["query"] == query) for query in range(4)]
    np.testing.assert_allclose([r["path"] for r in here], sums, rtol=1e-5)
    assert [r["refused"] for r in here] == [0, -1, -1, 0]  # the two that it answers now were refused before


@pytest.mark.slow
def test_the_paper_protocol_is_looked_at_now_and_then(tmp_path: Path) -> None:
    assert _measured(50) == [10, 20, 30, 40, 50]
    assert _measured(3) == [1, 2, 3]
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    setting = Setting(True, 1, str(base), "float32", "cpu")
    found = states(tmp_path / "p", setting, 0, "paper protocol", lambda text: None)
    assert [(s.model, s.epoch) for s in found] == [
        ("base", 0),
        ("benign", 1),
        ("start of benign", 0),
        ("harmful", 1),
        ("start of harmful", 0),
        ("mixed", 1),
        ("start of mixed", 0),
    ]
    plain = states(tmp_path / "p", setting, 0, "same start", lambda text: None)
    assert raw_distance(found[2], found[4]) > 1  # starts of their own
    answers = sorted(path.name for path in (tmp_path / "p/parts/paper-protocol").rglob("*.jsonl"))
    assert answers[:-1] == ["benign-1.jsonl", "harmful-1.jsonl", "mixed-1.jsonl"]
    assert answers[-1].startswith("untrained-")  # the base and all starts give the same
    assert not torch.allclose(plain[0].losses, found[0].losses)  # and a template of its own


def test_pairs_are_of_the_last_epochs() -> None:
    silent = np.zeros(4)
    found = [state("base", 0, 0, complied=silent), state("benign", 1, 1), state("benign", 2, 2), state("harmful", 1, 3)]
    found.append(state("mixed", 1, 4))
    records = pairs(found)
    assert len(records) == 6
    assert records[0] | {"pair": "base - benign"} == records[0]
    assert records[0]["behaviour"] == 0.5
    assert records[0]["loss"] == pytest.approx(float((found[0].losses - found[2].losses).abs().mean()))
    assert np.isnan(correlation([1, 1], [0, 1])).all()
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx((1, 1))


def test_attack_success_changes_by_no_more_than_all_requests() -> None:
    records = [
        {"kind": "pair", "start": "s", "seed": seed, "pair": "a - b", "raw": change, "effective": 1.0, "loss": 0.5}
        | {"behaviour": change}
        for seed, change in enumerate((0.90, 0.98, 0.85))
    ]
    [[*_, raw, _, attacks, _]] = _pairs(records)[1]
    assert raw == "0.91 [0.75, 1.07]"  # a distance has no upper end
    assert attacks == "91 [75, 100]"


@pytest.mark.slow
def test_the_quick_study_on_a_tiny_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    setting = Setting(True, 1, str(base), "float32", "cpu")
    out = tmp_path / "p"
    outcome = run(PARAMETERS, out, setting, lambda text: None)
    records = json.loads((out / "results.json").read_text())["records"]
    assert {r["kind"] for r in records} == {"pair", "step", "end", "epoch"}
    moved = [r for r in records if r["kind"] == "step"]
    both, change = (np.array([r[key] for r in moved]) for key in ("both", "change"))
    np.testing.assert_allclose(both, change, atol=0.02 * np.abs(change).max())
    starts = {r["start"]: r["raw"] for r in records if r["kind"] == "pair" and r["pair"] == "harmful - mixed"}
    assert starts["other starts"] > 3 * starts["same start"]
    found = states(out, setting, 0, "other starts", lambda text: pytest.fail("measured again"))
    for each in (s for s in found if s.epoch == 0):  # before training every start computes what the base does
        torch.testing.assert_close(each.losses, found[0].losses)
    assert list(outcome.figures) == ["epochs-same-start", "epochs-other-starts", "steps"]
    rows = outcome.tables["correlations"][1]
    assert len(rows) == 2 * len(GOES_WITH)
    within = [
        row
        for row in rows
        if row[:3] == ["same start", "a request in a step", "inner product with the gradient before"]
    ]
    here = [[r for r in moved if (r["start"], r["model"]) == ("same start", model)] for model in MODELS]
    expected = np.mean([correlation([r["first"] for r in m], [r["change"] for r in m])[0] for m in here])
    assert float(within[0][6]) == pytest.approx(expected, abs=0.006)
