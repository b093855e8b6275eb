"""Collection against its floor: python benchmarks/collection.py [--rows 96] [--rounds 5] [--dtype bfloat16] [--kronecker].

The floor is one plain forward and backward pass of the same batches with only the adapters trainable and logits at
response positions alone. Floor and collection run in turn; the ratio is taken within each round. `--kronecker` times the
index with the factors of EK-FAC in it too: everything that `ekfac` needs but the queries.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from finetrace.batching import length_batches
from finetrace.collection import Collector, track
from finetrace.encoding import Encoded, Encoder
from finetrace.examples import Example
from finetrace.forward import Batch, example_losses, token_losses
from finetrace.index import build_index
from finetrace.models import Loaded, ModelSpec, load
from finetrace.tasks import mixed


def with_adapter(dtype: str) -> Loaded:
    """The embedded model with a fresh LoRA adapter (q and v, r = 4) whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    loaded = load(ModelSpec(dtype=dtype))  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    loaded.model = model.eval()
    return loaded


def floor(loaded: Loaded, items: list[Encoded], batch_tokens: int) -> None:
    """Plain training passes of the same batches; the optimizer's step is left out."""
    device = next(loaded.model.parameters()).device
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for chosen in length_batches([len(item.ids) for item in items], batch_tokens):
        batch = Batch.of([items[i] for i in chosen]).to(device)
        example_losses(batch, token_losses(loaded.model, batch)[0]).sum().backward()
        loaded.model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print one line a dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kronecker", action="store_true")
    args = parser.parse_args()
    examples = list(mixed().train[: args.rows])
    for dtype in args.dtype:
        print(measure(dtype, examples, args.rounds, args.batch_tokens, args.kronecker), flush=True)


def measure(dtype: str, examples: list[Example], rounds: int, batch_tokens: int, kronecker: bool) -> str:
    """Floor, collection in memory and index on disk in turn; the ratios of each round."""
    loaded = with_adapter(dtype)
    encoder = Encoder(loaded.tokenizer)
    items, _ = encoder.encode_all(examples)
    lengths = [len(item.ids) for item in items]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in length_batches(lengths, batch_tokens))
    collector = Collector(loaded.model, track(loaded.model), batch_tokens=batch_tokens)
    ids = [example.id for example in examples]

    def index(labels: Literal["model"] | None = None) -> None:
        with tempfile.TemporaryDirectory() as work:
            build_index(loaded, examples, Path(work) / "index", encoder, batch_tokens=batch_tokens, kronecker=labels)

    contenders: list[Callable[[], object]] = [
        lambda: floor(loaded, items, batch_tokens),
        lambda: collector.collect(items, ids),
        index,
        *([lambda: index("model")] if kronecker else []),
    ]
    floor(loaded, items[:8], batch_tokens)  # warm up
    times = [[seconds(work) for work in contenders] for _ in range(rounds)]
    base = statistics.median(each[0] for each in times)
    ratio, disk, *factors = ([each[i] / each[0] for each in times] for i in range(1, len(contenders)))
    fitted = "".join(f"; with EK-FAC's factors {_spread(each)}" for each in factors)
    return (
        f"{dtype}: floor {base:.2f} s ({sum(lengths) / base:.0f} tokens/s, {len(items)} rows, padding "
        f"{padded / sum(lengths) - 1:.1%}); collection / floor median {_spread(ratio)}; "
        f"index on disk / floor median {_spread(disk)}{fitted}; "
        f"{rounds} rounds, {torch.get_num_threads()} threads"
    )


def _spread(ratios: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


if __name__ == "__main__":
    main()
