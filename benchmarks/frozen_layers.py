"""Retraining the last layers, hidden states below them kept: python benchmarks/frozen_layers.py [--layers 4].

The same fine-tuning of the embedded model on rows of `grammars`: once all layers are run in every step, once those below the
lowest trained one in the first epoch alone, and once more with what that epoch left, as every further retraining on such rows
has it. CPU seconds of the process, which leave out what other processes do, and the losses of ten queries afterwards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from finetrace import training
from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoder
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import new_adapter
from finetrace.models import ModelSpec, load
from finetrace.prefix import forget, frozen_prefix
from finetrace.tasks import build


def main() -> None:
    """Print both times, their ratio, and the largest difference of a query's loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    loaded = load(ModelSpec(dtype=args.dtype))
    depth = int(loaded.model.config.num_hidden_layers)
    config = FinetuneConfig(epochs=args.epochs, batch_size=8, layers=tuple(range(depth - args.layers, depth)))
    task = build("grammars")
    encoder = Encoder(loaded.tokenizer)
    rows = encoder.encode_all(task.train[:: len(task.train) // args.rows][: args.rows])[0]
    queries = encoder.encode_all(task.queries[:10])[0]
    kept = frozen_prefix
    ways: dict[str, Any] = {"every layer": lambda *_, **__: None, "kept": kept, "kept before": kept}
    ratios: dict[str, list[float]] = {"kept": [], "kept before": []}
    losses = {}
    for _ in range(args.rounds):
        forget()
        seconds = {}
        for name, prefix in ways.items():
            training.frozen_prefix = prefix  # type: ignore[attr-defined]
            model = new_adapter(loaded, config)
            started = time.process_time()
            training.fit(model, rows, config)
            seconds[name] = time.process_time() - started
            losses[name] = mean_losses(model, queries)
            loaded.model = model.unload()
        for name, found in ratios.items():
            found.append(seconds["every layer"] / seconds[name])
        print(", ".join(f"{name} {each:.1f} s" for name, each in seconds.items()), flush=True)
    apart = float((losses["every layer"] - losses["kept"]).abs().max())
    print(
        f"{args.rows} rows x {args.epochs} epochs, the last {args.layers} of {depth} layers trained, {loaded.spec.dtype}, "
        f"{torch.get_num_threads()} threads: {statistics.median(ratios['kept']):.2f} times faster, "
        f"{statistics.median(ratios['kept before']):.2f} the next time; losses of queries differ by at most {apart:.1e} nats"
    )


if __name__ == "__main__":
    main()
