"""A batch for which memory does not suffice: halved, counted once, and the row named that does not fit by itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import killed
from finetrace.collection import Collector, Representation, track
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import build_index, open_index
from finetrace.models import ModelSpec, load
from tiny import make_encoded, make_examples, make_llama, names, relative_error, with_lora

LENGTHS = [12, 7, 30, 9, 22, 15, 8, 11, 40]
CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(CPU),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


def failing(model: Any, where: str, error: BaseException, most: int) -> Any:
    """A hook by which a batch of more than `most` rows does not fit, in the forward or the backward pass."""

    def forward(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.shape[0] > most and where == "forward":
            raise error
        if output.shape[0] > most and where == "backward" and output.requires_grad:
            output.register_hook(backward)

    def backward(delta: torch.Tensor) -> None:
        raise error

    return model.get_base_model().model.layers[1].self_attn.q_proj.register_forward_hook(forward)


@pytest.mark.parametrize(
    ("labels", "where", "error"),
    [
        ("model", "forward", ERRORS[0]),
        ("model", "backward", ERRORS[1]),
        ("data", "forward", ERRORS[2]),
        ("data", "backward", ERRORS[3]),
        (None, "backward", ERRORS[0]),
    ],
)
def test_halves_give_what_the_whole_gives(labels: Any, where: str, error: BaseException) -> None:
    """Gradients, losses, hidden states and factor sums of a run that was disturbed, in float64."""
    items, results = make_encoded(LENGTHS), []
    for disturbed in (False, True):
        model = with_lora(make_llama())
        collector = Collector(
            model, track(model, None), (Representation(), Representation(-2, "mean-response")), 10_000
        )
        sums = collector.factor_sums(labels) if labels is not None else None
        if disturbed:
            failing(model, where, error, 2)
        heard: list[int] = []
        results.append((collector.collect(items, names(items), heard.append, factors=sums), sums))
        assert sum(heard) == len(items)
        assert not any(parameter.grad is not None for parameter in model.parameters())
    (expected, whole), (found, halved) = results
    assert (expected.halved, found.halved > 1, found.left_out) == (0, True, {})
    assert relative_error(found.gradients, expected.gradients) < 1e-10
    assert relative_error(found.losses, expected.losses) < 1e-10
    for name, values in expected.representations.items():
        assert relative_error(found.representations[name], values) < 1e-10
    if whole is not None and halved is not None:
        assert halved.tokens == whole.tokens
        for block in whole.left:
            assert torch.allclose(halved.left[block], whole.left[block], rtol=1e-10, atol=1e-13)
            assert torch.allclose(halved.right[block], whole.right[block], rtol=1e-10, atol=1e-13)
    if labels == "model":
        assert relative_error(found.sampled, expected.sampled) < 1e-10


def test_a_row_that_does_not_fit_by_itself_is_named() -> None:
    model = with_lora(make_llama())
    failing(model, "forward", RuntimeError(CPU), 0)
    items = make_encoded([5, 9])
    with pytest.raises(FinetraceError, match=r"example r0 \(row 41\): its 5 tokens do not fit in memory.*--max-length"):
        Collector(model, track(model, None), (), 100).collect(items, names(items), first=40)


def test_other_errors_are_not_taken_for_it() -> None:
    model = with_lora(make_llama())
    failing(model, "forward", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0)
    items = make_encoded([5, 9])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Collector(model, track(model, None), (), 100).collect(items, names(items))


def long_rows(tokens: int, count: int) -> list[Example]:
    return [*make_examples(3), *(Example.from_prompt("q", "x" * (tokens - i), id=f"long{i}") for i in range(count))]


def limited(folder: str, base: str, adapter: str, room: int, tokens: int, count: int) -> None:
    """Index rows with `room` bytes of address space beyond what the process has by now; its sentence goes to a file.

    Buffers of 64 KiB and more are mapped one by one, so that none comes out of heaps that were reserved before the limit.
    """
    import ctypes
    import resource

    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD of glibc; set by hand, it grows no more by itself
    torch.set_num_threads(1)  # the stacks of others would count
    loaded = load(ModelSpec(base, adapter, dtype="float64", device="cpu"))
    encoder = Encoder(loaded.tokenizer)
    build_index(loaded, make_examples(3), Path(folder) / "warm", encoder, kronecker="data")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    said: list[str] = []
    try:
        build_index(
            loaded,
            long_rows(tokens, count),
            Path(folder) / "i",
            encoder,
            batch_tokens=10**6,
            kronecker="data",
            say=said.append,
        )
    except FinetraceError as error:
        said.append(str(error))
    (Path(folder) / "said").write_text("\n".join(said))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited and read as Linux does")
def test_memory_that_really_runs_out(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    """Sixteen rows of 500 tokens do not fit together; one of 10,000 does not fit at all."""
    given: dict[str, Any] = {"base": str(base_folder), "adapter": str(adapter_folder)}
    finished, _, _ = killed.run(limited, tmp_path, room=16 << 20, tokens=500, count=16, **given)
    assert finished
    assert "batches did not fit in memory and were halved" in (tmp_path / "said").read_text()
    loaded = load(ModelSpec(str(base_folder), str(adapter_folder), dtype="float64", device="cpu"))
    whole, _ = build_index(loaded, long_rows(500, 16), tmp_path / "whole", Encoder(loaded.tokenizer), kronecker="data")
    found = open_index(tmp_path / "i")
    assert relative_error(found.gradients(slice(None)), whole.gradients(slice(None))) < 1e-6
    assert killed.run(limited, tmp_path / "one", room=16 << 20, tokens=10_000, count=1, **given)[0]
    said = (tmp_path / "one" / "said").read_text()
    assert "example long0 (row 4): its 100" in said
    assert "do not fit in memory, even by themselves; cut it with --max-length" in said
    with pytest.raises(FinetraceError, match="unfinished"):
        open_index(tmp_path / "one" / "i")
