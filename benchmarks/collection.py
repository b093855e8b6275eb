"""Collection against its floor: python benchmarks/collection.py [--rows 96] [--rounds 5] [--dtype bfloat16] [--kronecker].

The floor is one plain forward and backward pass of the same batches with only the adapters trainable and logits at
response positions alone, whatever is collected. `--modules REGEX` collects plain linear layers in place of the
adapters, as `finetrace index --modules` does; `--at start` builds the indexes where a fine-tuning begins. Floor and
collection run in turn; the ratio is taken within each round. `--kronecker` times the index with the factors of EK-FAC
in it too: everything that `ekfac` needs but the queries. `--task NAME --size S` takes a task's rows; with `--kronecker`
its queries too, if they have responses: the index with factors, the queries' gradients and their scores by `ekfac`
together, over the floor of rows and queries. Shares of the matrix rate are what the plain pass multiplies for unpadded
tokens, a second, over the fastest of three products timed in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from finetrace.attribution import Problem, make
from finetrace.batching import length_batches
from finetrace.collection import Collector, track
from finetrace.encoding import Encoded, Encoder
from finetrace.examples import Example
from finetrace.forward import Batch, example_losses, token_losses
from finetrace.index import build_index
from finetrace.models import EMBEDDED, Loaded, ModelSpec, load
from finetrace.moments import Moment
from finetrace.tasks import TASKS, build


def with_adapter(dtype: str, model: str = EMBEDDED) -> Loaded:
    """A model, by default the embedded one, with a fresh LoRA adapter (q and v, r = 4) whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    loaded = load(ModelSpec(model, dtype=dtype))  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(loaded.model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    loaded.model = tuned.eval()
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


def operations(loaded: Loaded, items: list[Encoded]) -> float:
    """Multiplications and additions of one plain pass over unpadded tokens, weights frozen: forward, and gradients of inputs.

    Linear layers see every token, the head those that predict a response, attention half of all pairs. The backward pass of
    a linear map is one product, that of attention's two products are four. LoRA's own products are left out.
    """
    config = loaded.model.config
    linear = sum(
        module.weight.numel()
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name
    )
    tokens, losses = sum(len(item.ids) for item in items), sum(int((item.weights > 0).sum()) for item in items)
    pairs = sum(len(item.ids) ** 2 for item in items) / 2
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    head = config.vocab_size * config.hidden_size
    return 4.0 * (linear * tokens + head * losses) + 2.0 * (2 + 4) * width * pairs * config.num_hidden_layers


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of the fastest of three products: one as large as caches like, and two of the model's own."""
    rates = []
    for rows, inner, columns in ((2048, 2048, 2048), (2048, 576, 1536), (2048, 1536, 576)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        torch.mm(a, b.T)
        spent = min(seconds(lambda a=a, b=b: torch.mm(a, b.T)) for _ in range(10))  # type: ignore[misc]
        rates.append(2.0 * rows * inner * columns / spent)
    return max(rates)


def main() -> None:
    """Print one line a dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="mixed-large")
    parser.add_argument("--size", type=float, help="of the task; the whole if not given")
    parser.add_argument("--rows", type=int, help="the first of the task's; 96, or all where a size is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kronecker", action="store_true")
    parser.add_argument("--modules", nargs="+")
    parser.add_argument("--at", choices=get_args(Moment), default="end")
    args = parser.parse_args()
    task = build(args.task, size=args.size or 1.0)
    examples = list(task.train[: args.rows or (96 if args.size is None else None)])
    asked = [query for query in task.queries if query.has_response]
    for dtype in args.dtype:
        print(
            measure(dtype, examples, asked, args.rounds, args.batch_tokens, args.kronecker, args.modules, args.at),
            flush=True,
        )


def measure(
    dtype: str,
    examples: list[Example],
    asked: list[Example],
    rounds: int,
    batch_tokens: int,
    kronecker: bool,
    modules: list[str] | None = None,
    at: Moment = "end",
) -> str:
    """Floor, collection in memory and index on disk in turn; the ratios of each round."""
    loaded = with_adapter(dtype)
    encoder = Encoder(loaded.tokenizer)
    items, _ = encoder.encode_all(examples)
    lengths = [len(item.ids) for item in items]
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in length_batches(lengths, batch_tokens))
    collector = Collector(loaded.model, track(loaded.model, modules), batch_tokens=batch_tokens)
    ids = [example.id for example in examples]

    def index(labels: Literal["model"] | None = None, queries: Sequence[Example] = ()) -> None:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "index"
            made, _ = build_index(
                loaded, examples, folder, encoder, batch_tokens=batch_tokens, kronecker=labels, modules=modules, at=at
            )
            if queries:
                make("ekfac").score(Problem(made, queries))

    contenders: list[Callable[[], object]] = [
        lambda: floor(loaded, items, batch_tokens),
        lambda: collector.collect(items, ids),
        index,
        *([lambda: index("model")] if kronecker else []),
        *([lambda: index("model", asked)] if kronecker and asked else []),
    ]
    floor(loaded, items[:8], batch_tokens)  # warm up
    peak, times = [], []
    for _ in range(rounds):
        peak.append(matrix_rate(loaded.model.dtype))
        times.append([seconds(work) for work in contenders])
    needed = operations(loaded, items)
    shares = [[needed / each[i] / rate for each, rate in zip(times, peak, strict=True)] for i in (0, 1)]
    base = statistics.median(each[0] for each in times)
    ratio, disk, *factors = ([each[i] / each[0] for each in times] for i in range(1, len(contenders)))
    fitted = f"; with EK-FAC's factors {_spread(factors[0])}" if factors else ""
    if len(factors) > 1:
        more = 1 + sum(len(item.ids) for item in encoder.encode_all(asked)[0]) / sum(lengths)
        whole = _spread([each / more for each in factors[1]])
        fitted += f"; EK-FAC of {len(asked)} queries, end to end, over the floor of rows and queries {whole}"
    return (
        f"{dtype}: floor {base:.2f} s ({sum(lengths) / base:.0f} tokens/s, {len(items)} rows, padding "
        f"{padded / sum(lengths) - 1:.1%}); collection / floor median {_spread(ratio)}; "
        f"index on disk / floor median {_spread(disk)}{fitted}; share of the matrix rate "
        f"({statistics.median(peak) / 1e9:.0f} GFLOP/s): floor {_spread(shares[0])}, collection {_spread(shares[1])}; "
        f"{rounds} rounds, {torch.get_num_threads()} threads"
    )


def _spread(ratios: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


if __name__ == "__main__":
    main()
