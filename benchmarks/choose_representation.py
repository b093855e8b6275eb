"""Search RepSim as widely as gradients were: python benchmarks/choose_representation.py [--out choose] [--show 15].

Every layer x pooling x moment (the fine-tuned model, or before its fine-tuning) x plain cosine, or cosine after the training
rows' mean is taken off, on the development tasks of `choose_method.py` and on the models that it left in --out, ordered as
there: only the tasks that an order without the query does not solve count. With --bench FOLDER the models that `finetrace
bench` left there instead: what was chosen beside each pooling of the last layer and the best of all afterwards, means over
seeds and queries. What a model gave is kept in its folder.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from choose_method import mean_of, not_solved
from development_tasks import BEHAVIOUR, CLASSES
from finetrace.atomic import write_atomically
from finetrace.attribution.similarity import cosines
from finetrace.batching import batches
from finetrace.collection.representations import POOLINGS, UPPER, pool
from finetrace.encoding import Encoder
from finetrace.evaluation.metrics import METRICS, relevance
from finetrace.examples import Example
from finetrace.finetune_config import SAVED, saved_model
from finetrace.forward import Batch, token_logits
from finetrace.models import Loaded, ModelSpec, load
from finetrace.moments import Moment, at_moment
from finetrace.reading import read_examples

KEPT = "representations.json"
MOMENTS: tuple[Moment, ...] = ("end", "start")
SHOWN = ("accuracy", "coverage", "auroc", "auprc")
LAYERS = 30  # of the embedded model
PLAIN = f"layer={int(UPPER * LAYERS)},pooling=mean-response,at=end"
CHOSEN = f"{PLAIN},centred"
FINAL = tuple(f"layer={LAYERS},pooling={pooling},at=end" for pooling in POOLINGS)


def pooled(loaded: Loaded, rows: list[Example]) -> dict[tuple[int, str], Tensor]:
    """(n, d) by layer, counted from 0 the embedding, and pooling."""
    items, _ = Encoder(loaded.tokenizer).encode_all(rows, None)
    found: dict[tuple[int, str], list[Any]] = {}
    for chosen in batches(items, 2048):
        batch = Batch.of([items[i] for i in chosen])
        with torch.inference_mode():
            _, hidden = token_logits(loaded.model, batch, hidden_states=True)
        for (layer, states), pooling in product(hidden.items(), POOLINGS):
            key = (layer + len(hidden), pooling)
            found.setdefault(key, []).append((chosen, pool(states, batch, pooling).double()))
    order = {key: np.argsort(np.concatenate([chosen for chosen, _ in each])) for key, each in found.items()}
    return {key: torch.cat([value for _, value in each])[order[key]] for key, each in found.items()}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Means over the queries of four metrics by method, of the fine-tuning in `folder`."""
    settings = json.loads((folder / "cell.json").read_text())
    train, queries = (read_examples(folder / f"{name}.jsonl") for name in ("train", "queries"))
    relevant = relevance([row.label for row in train], [query.label for query in queries])
    base = saved_model(folder / "adapter" / SAVED)
    loaded = load(ModelSpec(base, str(folder / "adapter"), settings["dtype"], "cpu"))
    found = {}
    for moment in MOMENTS:
        with at_moment(loaded.model, moment):
            states = [pooled(loaded, rows) for rows in (queries, train)]
        for (layer, pooling), asked in states[0].items():
            rows = states[1][layer, pooling]
            for centred in (False, True):
                scores = cosines(asked, partial(iter, [rows]), len(rows), centred=centred)
                name = f"layer={layer},pooling={pooling},at={moment}{',centred' * centred}"
                found[name] = {key: float(np.nanmean(METRICS[key](scores, relevant))) for key in SHOWN}
    return found


def kept(folder: Path) -> dict[str, dict[str, float]]:
    """What `measure` gives of `folder`, measured once."""
    if not (folder / KEPT).exists():
        write_atomically(folder / KEPT, json.dumps(measure(folder)).encode())
        print(f"{folder}: done", flush=True)
    found: dict[str, dict[str, float]] = json.loads((folder / KEPT).read_text())
    return found


def main() -> None:
    """Measure what is missing and print the order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("choose"))
    parser.add_argument("--show", type=int, default=15)
    parser.add_argument("--bench", type=Path, help="a folder of finetrace bench, in place of the development tasks")
    args = parser.parse_args()
    if args.bench:
        reported(args.bench)
    else:
        search(args.out, args.show)


def search(out: Path, show: int) -> None:
    """The order of all on the development tasks."""
    names = [*BEHAVIOUR, *CLASSES]
    table: dict[str, dict[str, float]] = {}
    for name in names:
        for spec, values in kept(out / name).items():
            table.setdefault(spec, {})[name] = values["auprc"]
    counted = not_solved(out, names)
    order = sorted(((mean_of(values, counted), spec) for spec, values in table.items()), reverse=True)
    best = {
        choice: next(each for each in order if choice in each[1])
        for choice in (*POOLINGS, *(f"at={moment}" for moment in MOMENTS))
    }
    last = [each for each in order if each[1] in FINAL or each[1] == PLAIN]
    listed = dict.fromkeys((*order[:show], *best.values(), *last))
    width = max(len(spec) for _, spec in listed)
    print(f" mean {'RepSim':<{width}} " + " ".join(f"{name:>10}" for name in names))
    for mean, spec in listed:
        print(f"{mean:.3f} {spec:<{width}} " + " ".join(f"{table[spec][name]:10.3f}" for name in names))


def reported(bench: Path) -> None:
    """The choice on the tasks of a benchmark, beside the final layer and the best afterwards."""
    for place in sorted(bench.glob("*/corrected")):
        found = [kept(folder) for folder in sorted(place.glob("seed-*")) if (folder / "queries.jsonl").exists()]
        if not found:  # mislabelled rows have no queries
            continue
        means = {spec: {key: float(np.mean([each[spec][key] for each in found])) for key in SHOWN} for spec in found[0]}
        afterwards = max(means, key=lambda spec: means[spec]["auprc"])
        print(f"{place.parent.name}, {len(found)} seed{'s' * (len(found) != 1)}: {', '.join(SHOWN)}")
        for spec in dict.fromkeys((CHOSEN, PLAIN, *FINAL, afterwards)):
            mark = " (best AUPRC afterwards)" if spec == afterwards else ""
            print("  " + " ".join(f"{means[spec][key]:.3f}" for key in SHOWN) + f"  {spec}{mark}")


if __name__ == "__main__":
    main()
