"""Torch has a thread fewer while rows are read and met by few vectors, and has it again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finetrace.attribution import threads
from finetrace.attribution.threads import LIGHT, beside_a_reader


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores, with a thread for each."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "cores", lambda: 4)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_several_readers_take_one_thread() -> None:
    with beside_a_reader(1):
        assert torch.get_num_threads() == 3
        with beside_a_reader(LIGHT):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 4


def test_much_arithmetic_keeps_them_all() -> None:
    with beside_a_reader(LIGHT + 1):
        assert torch.get_num_threads() == 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_where_a_core_is_free_or_one_thread_is_all_nothing_changes(count: int) -> None:
    torch.set_num_threads(count)
    with beside_a_reader(1):
        assert torch.get_num_threads() == count


def test_they_come_back_where_reading_stops_halfway() -> None:
    def blocks() -> Iterator[int]:
        with beside_a_reader(1):
            yield 1
            yield 2

    reading = blocks()
    next(reading)
    assert torch.get_num_threads() == 3
    reading.close()
    assert torch.get_num_threads() == 4
    with pytest.raises(ValueError, match="broken"), beside_a_reader(1):
        raise ValueError("broken")
    assert torch.get_num_threads() == 4
