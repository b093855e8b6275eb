"""Collection against the study's released loop: python benchmarks/released_loop.py [--rows 24] [--rounds 3] [--task grammars]
[--dtype float32].

The loop is a literal one: one example at a time, padded to 128 tokens, every position of the window in the loss, logits at
all of them, float32, the gradient of every adapter matrix copied out. Against it stands an index that is written to disk, in
float32 and in bfloat16. All of them in turn, ratios within each round: of the clock, which is what counts on a quiet machine,
and of the process's seconds of processor time, which others leave alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from collection import with_adapter
from finetrace.encoding import Encoder
from finetrace.examples import Example
from finetrace.index import build_index
from finetrace.models import Loaded
from finetrace.tasks import build

WINDOW = 128
DTYPES = ("float32", "bfloat16")


def loop(loaded: Loaded, examples: list[Example]) -> list[dict[str, Tensor]]:
    """The gradients of every example, by matrix."""
    model, tokenizer = loaded.model, loaded.tokenizer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found = []
    for example in examples:
        text = f"{example.prompt}\n{example.response}"
        given = tokenizer(text, padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt")
        given = given.to(model.device)
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        found.append(
            {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    model.zero_grad(set_to_none=True)
    return found


def index(loaded: Loaded, examples: list[Example]) -> None:
    """An index on disk, of the response's loss."""
    with tempfile.TemporaryDirectory() as work:
        build_index(loaded, examples, Path(work) / "index", Encoder(loaded.tokenizer))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of one call: of the clock, and of the processor, all threads together."""
    started, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - spent


def spread(ratios: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f})"


def main() -> None:
    """Print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", default="grammars")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="of the index; both if not given")
    args = parser.parse_args()
    rows = list(build(args.task).train)
    examples = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    models = {dtype: with_adapter(dtype) for dtype in args.dtype or DTYPES}
    plain = models["float32"] if "float32" in models else with_adapter("float32")
    for loaded in models.values():  # warm up
        index(loaded, examples[:2])
    loop(plain, examples[:1])
    times: dict[str, list[tuple[float, float]]] = {"loop": [], **{dtype: [] for dtype in models}}
    for _ in range(args.rounds):
        times["loop"].append(seconds(lambda: loop(plain, examples)))
        for dtype, loaded in models.items():
            times[dtype].append(seconds(lambda model=loaded: index(model, examples)))  # type: ignore[misc]
    base = statistics.median(clock for clock, _ in times["loop"])
    encoder = Encoder(plain.tokenizer)
    tokens = statistics.mean(len(item.ids) for item in encoder.encode_all(examples)[0])
    print(
        f"{args.task}, {len(examples)} rows of {tokens:.0f} tokens, {torch.get_num_threads()} threads, {args.rounds} "
        f"rounds: loop {base:.1f} s"
    )
    for dtype in models:
        clock, processor = ([a[k] / b[k] for a, b in zip(times["loop"], times[dtype], strict=True)] for k in range(2))
        print(
            f"index on disk in {dtype}: {statistics.median(each for each, _ in times[dtype]):.1f} s, {spread(clock)}; "
            f"in processor time {spread(processor)}"
        )


if __name__ == "__main__":
    main()
