"""The check-up: what it measures is what is there, and what is broken is called so."""

from __future__ import annotations

import json

import pytest
import torch

from commands import run
from finetrace.doctor import Finding, invariance
from finetrace.doctor.machine import disks
from finetrace.doctor.software import standing
from finetrace.doctor.speed import attention, judged, rate
from tiny import make_encoded, make_llama, names, save_base, with_lora

CPU = torch.device("cpu")


def test_packages_are_held_against_their_requirements():
    assert standing("torch>=2.0")[2]
    assert not standing("torch>=999")[2]
    assert standing("no-such-package-here>=1")[1:] == (None, False)


def test_rates_and_kernels_are_measured():
    assert rate(torch.float32, CPU) > 1e6
    found = attention(CPU)
    assert found.state == "ok"
    assert 0 < found.facts["difference"] < 0.03
    slower = judged({"float32": 1e9, "bfloat16": 5e9}, "float32", CPU)
    assert (slower.state, "bfloat16" in slower.remedy) == ("note", True)
    assert judged({"float32": None}, "float32", CPU).state == "problem"


def test_rows_alone_and_in_a_batch_agree_in_float64_and_a_leak_is_seen(monkeypatch):
    model = with_lora(make_llama())
    items = make_encoded([20, 25, 31])
    apart = invariance.compare(model, items, names(items))
    assert apart.gradients < 1e-10
    assert invariance.judged(torch.float64, apart).state == "ok"
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out + 0.1 * out.mean(0, keepdim=True))
    leaking = invariance.compare(model, items, names(items))
    handle.remove()
    assert leaking.gradients > 1e-3
    assert invariance.judged(torch.float64, leaking).state == "note"
    assert "identical" in invariance.judged(torch.float32, invariance.Apart(0.0, 0.0, 1.0)).what


def test_the_command_with_a_model_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    base = save_base(tmp_path / "base", make_llama().float())
    code, out, err = run(capsys, "doctor", "--model", base, "--json")
    assert code == 0, err
    findings = {each["name"]: each for each in json.loads(out)["findings"]}
    assert findings["batches, float32"]["facts"]["gradients"] < 1e-4
    assert {"python", "packages", "processor", "matrix rate", "attention", "model", "hub"} <= findings.keys()
    code, out, _ = run(capsys, "doctor", "--model", tmp_path / "nothing")
    assert code == 1
    assert "problem" in out
    assert max(map(len, out.splitlines())) <= 80


def test_quick_leaves_the_model_out(capsys, monkeypatch):
    monkeypatch.setattr("finetrace.doctor.invariance.load", lambda spec: pytest.fail("the model was loaded"))
    code, out, _ = run(capsys, "doctor", "--quick")
    assert code == 0
    assert "model  " not in out
    assert Finding("a", "ok", "b").record()["state"] == "ok"


@pytest.mark.parametrize("given", [("--model", "base"), ("--adapter", "adapter"), ("--trust-remote-code",)])
def test_a_model_that_quick_would_leave_out_is_refused(capsys, given):
    code, out, err = run(capsys, "doctor", "--quick", *given)
    assert (code, out) == (2, "")
    assert f"{given[0]}: with --quick no model is loaded" in err


def test_a_cache_in_a_place_that_cannot_be_looked_at_is_told_of_by_the_folder_above(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETRACE_CACHE", str(tmp_path / ("a" * 300)))
    found = {each.name: each for each in disks()}
    assert found["cache"].facts["free"] > 0
    assert found["cache"].facts["writable"]
