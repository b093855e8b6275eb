"""Kernels that add in one order are asked for on a GPU, and torch is left as it was."""

from __future__ import annotations

import os

import pytest
import torch

from finetrace.reproducible import CUBLAS, reproducible


def state() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_a_cpu_is_left_alone() -> None:
    before = state()
    with reproducible(torch.device("cpu")):
        assert state() == before


@pytest.mark.parametrize(("asked", "warns"), [(False, False), (True, True), (True, False)])
def test_a_gpu_and_back(monkeypatch: pytest.MonkeyPatch, asked: bool, warns: bool) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    before = state()
    torch.use_deterministic_algorithms(asked, warn_only=warns)
    mine = state()
    try:
        with pytest.raises(ValueError, match="in the middle"), reproducible(torch.device("cuda")):
            assert state() == (True, not asked or warns, False)  # who wants a refusal keeps it
            assert os.environ[CUBLAS] == ":4096:8"
            raise ValueError("in the middle")
        assert state() == mine
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_a_workspace_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    with reproducible(torch.device("cuda")):
        assert os.environ[CUBLAS] == ":16:8"
