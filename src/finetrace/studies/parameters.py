"""Change of parameters against change of behaviour (Table 6 and Fig. 6 of arXiv 2409.19998).

The study finds that models which differ little in their parameters differ much in behaviour, and concludes that influence,
which is about parameters, cannot tell of behaviour. Two things are measured beside its distance. Adapters started from
different random values are far apart whatever they learnt, so the distance is taken between what the adapters do, too:
B A alpha / r. And influence uses no distance: it uses the inner product of the change with a query's gradient, which is the
first-order change of that query's loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from finetrace.atomic import write_tensors
from finetrace.benchmark.protocol import protocol
from finetrace.benchmark.stages import complied, kept_answers, tuned_adapter
from finetrace.collection import Block, Collector, track
from finetrace.encoding import Encoder, read_template
from finetrace.evaluation.judging import make_judge
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import new_adapter
from finetrace.fingerprint import of_text
from finetrace.models import ALIGNED, Loaded, ModelSpec, load
from finetrace.positions import PROBE
from finetrace.studies.pieces import Say
from finetrace.studies.study import Setting
from finetrace.tasks import build, recipe

MODELS = ("benign", "harmful", "mixed")
STARTS = (
    "same start",
    "other starts",
    "paper protocol",
)  # the last from other starts too, fine-tuned as the released code does
MEASURED = 5  # of the paper protocol's epochs, evenly spaced


@dataclass(frozen=True, eq=False)
class State:
    """A model at one moment of its fine-tuning.

    Attributes:
        model: `base`, `benign`, `harmful` or `mixed`.
        epoch: 0 before training.
        parameters: (D,) of the adapter, blocks side by side as in an index.
        blocks: Name and shape of each.
        losses: (m,) of the probe, an answer that complies, under each request.
        gradients: (m, D) of these losses.
        complied: (m,) whether its own answer to each request complies.
        scale: alpha / r.
    """

    model: str
    epoch: int
    parameters: Tensor
    blocks: tuple[Block, ...]
    losses: Tensor
    gradients: Tensor
    complied: NDArray[np.float64]
    scale: float


@dataclass(frozen=True)
class Tuning:
    """One of the three fine-tunings, and all that decides it."""

    model: str
    base: ModelSpec
    rows: tuple[Example, ...]
    queries: tuple[Example, ...]
    config: FinetuneConfig

    @property
    def decided(self) -> str:
        """A fingerprint."""
        return of_text(repr((self.config, [row.id for row in self.rows], self.base, PROBE)))


def tunings(setting: Setting, seed: int, start: str) -> list[Tuning]:
    """On benign rows, on harmful ones and on both, as one start has them."""
    task = build("mixed-small", size=0.15 if setting.quick else 1.0)
    base = ModelSpec(setting.model or ALIGNED, None, setting.dtype, setting.device)
    way = protocol("paper" if start == STARTS[2] else "corrected")
    benign, harmful = task.without_target(), tuple(row for row in task.train if row.label == task.target)
    rows = {"benign": benign, "harmful": harmful, "mixed": task.train}
    found = []
    for place, name in enumerate(MODELS):
        number = seed if start == STARTS[0] else seed + 100 * (place + 1)
        config = way.finetuning(recipe("mixed-small"), number, 1 if setting.quick else None)
        found.append(Tuning(name, base, tuple(rows[name]), tuple(task.queries), config))
    return found


def states(folder: Path, setting: Setting, seed: int, start: str, say: Say) -> list[State]:
    """The base model and every epoch of the three fine-tunings; what is finished is found again."""
    found = []
    for place, each in enumerate(tunings(setting, seed, start)):
        name, base = each.model, each.base
        home = folder / "parts" / start.replace(" ", "-") / f"seed-{seed}" / f"{name}-{each.decided}"
        measure = partial(_state, home, base=base, config=each.config, queries=each.queries, say=say)
        if place == 0:
            found.append(measure("base", 0, checkpoint=None))
        adapter = tuned_adapter(home / "adapter", base, each.rows, each.config)
        checkpoints = sorted(
            (adapter / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )
        for epoch in _measured(len(checkpoints)) if start == STARTS[2] else range(1, len(checkpoints) + 1):
            found.append(measure(name, epoch, checkpoint=checkpoints[epoch - 1]))
        if start != STARTS[0]:  # each fine-tuning has a start of its own
            found.append(measure(f"start of {name}", 0, checkpoint=None))
    return found


def _measured(epochs: int) -> list[int]:
    """Epochs that are looked at, the last among them."""
    return sorted({-(-epochs * k // MEASURED) for k in range(1, MEASURED + 1)})


def _state(
    home: Path,
    model: str,
    epoch: int,
    *,
    base: ModelSpec,
    checkpoint: Path | None,
    config: FinetuneConfig,
    queries: Sequence[Example],
    say: Say,
) -> State:
    """Load or measure one; before training the adapter is the one that training starts from, its B zero.

    Then it answers as the base does, whatever its A, and the answers are those of the base.
    """
    path = home / f"{model.replace(' ', '-')}-{epoch}.safetensors"

    def loaded() -> Loaded:
        if checkpoint is not None:
            return load(ModelSpec(base.model, str(checkpoint), base.dtype, base.device))
        plain = load(base)
        plain.model = new_adapter(plain, config).eval()
        return plain

    at = loaded() if not path.exists() else None
    if at is not None:
        say(f"{home.parent.name}, {home.parent.parent.name}: {model}, epoch {epoch}")
        home.mkdir(parents=True, exist_ok=True)
        template = read_template(config.chat_template)
        own = home / f"{path.stem}.jsonl"
        if checkpoint is None:
            own = home.parent / f"untrained-{of_text(repr((base, template)))}.jsonl"
        answers = kept_answers(own, queries, lambda: at, template)
        verdicts = complied(make_judge(None, None), answers)
        items, _ = Encoder(at.tokenizer, "probe", template=template).encode_all(
            [each.with_response("-") for each in queries]
        )
        tracking = track(at.model)
        features = Collector(at.model, tracking, ()).collect(items, [query.id for query in queries])
        values = (
            torch.cat([layer.module.get_parameter("weight").detach().flatten() for layer in tracking.layers])
            .float()
            .cpu()
        )
        tensors = {"parameters": values, "losses": features.losses, "gradients": features.gradients}
        write_tensors(path, tensors | {"complied": torch.tensor(verdicts)}, {"blocks": _described(tracking.blocks)})
    return _read(path, model, epoch, config.alpha / config.rank)


def _described(blocks: Sequence[Block]) -> str:
    return json.dumps([[block.name, list(block.shape), block.offset] for block in blocks])


def _read(path: Path, model: str, epoch: int, scale: float) -> State:
    with safe_open(str(path), "pt") as file:
        described = json.loads(file.metadata()["blocks"])
    blocks = tuple(Block(name, tuple(shape), offset) for name, shape, offset in described)
    kept = load_file(str(path))
    verdicts = kept["complied"].numpy().astype(np.float64)
    return State(model, epoch, kept["parameters"], blocks, kept["losses"], kept["gradients"], verdicts, scale)


def raw_distance(one: State, other: State) -> float:
    """L2 distance of the adapters' own entries."""
    return float((one.parameters - other.parameters).double().norm())


def effective_distance(one: State, other: State) -> float:
    """L2 distance of what the adapters add to the model's weights, B A alpha / r, over all layers.

    || B1 A1 - B2 A2 ||^2 by r x r products alone.
    """
    total = 0.0
    for a, b in zip(one.blocks[::2], one.blocks[1::2], strict=True):  # A and B of a layer stand side by side
        first, second = (_matrices(state, a, b) for state in (one, other))
        total += _inner(first, first) + _inner(second, second) - 2 * _inner(first, second)
    return float(max(total, 0.0) ** 0.5)


def _matrices(state: State, a: Block, b: Block) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with alpha / r in it, float64."""
    down, up = (state.parameters[block.columns].view(block.shape).double() for block in (a, b))
    return down, state.scale * up


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """<B1 A1, B2 A2> = trace((B1^T B2) (A2 A1^T))."""
    return float(torch.trace((one[1].T @ other[1]) @ (other[0] @ one[0].T)))


def pairs(found: Sequence[State]) -> list[dict[str, Any]]:
    """Each two of the models at their last epoch: how far apart, and how differently they behave."""
    last = [max((s for s in found if s.model == name), key=lambda s: s.epoch) for name in ("base", *MODELS)]
    starts = {s.model.removeprefix("start of "): s for s in found if s.model.startswith("start of ")}
    records = []
    for first, other in combinations(last, 2):
        one = (
            starts.get(other.model, first) if first.model == "base" else first
        )  # the base has no adapter but X's own start
        records.append(
            {
                "pair": f"{first.model} - {other.model}",
                "raw": raw_distance(one, other),
                "effective": effective_distance(one, other),
                "behaviour": abs(float(first.complied.mean() - other.complied.mean())),
                "loss": float((first.losses - other.losses).abs().mean()),
            }
        )
    return records


def steps(found: Sequence[State]) -> list[dict[str, Any]]:
    """Step by step and request by request: the first-order change of the probe's loss, the true one, and the verdict's.

    A step is an epoch, or what lies between two epochs that were measured. `first` takes the gradient before the step,
    `both` the mean of those before and after, which is exact to second order. `refused` is 1 where a request that was
    answered is refused after the step, -1 the other way round.
    """
    records = []
    for model in MODELS:
        line = _line(found, model)
        for before, after in pairwise(line):
            records += _changes(model, before, after)
    return records


def ends(found: Sequence[State]) -> list[dict[str, Any]]:
    """The same from the start to the last epoch; `path` sums the steps' `first`, as TracIn sums over checkpoints."""
    records = []
    for model in MODELS:
        line = _line(found, model)
        walked = [_changes(model, before, after) for before, after in pairwise(line)]
        for query, record in enumerate(_changes(model, line[0], line[-1])):
            records.append(record | {"path": sum(step[query]["first"] for step in walked)})
    return records


def _line(found: Sequence[State], model: str) -> list[State]:
    """A model's own start, or the base, and its epochs."""
    begin = [s for s in found if s.model == f"start of {model}"] or [s for s in found if s.model == "base"]
    return [*begin, *sorted((s for s in found if s.model == model), key=lambda s: s.epoch)]


def _changes(model: str, before: State, after: State) -> list[dict[str, Any]]:
    moved = (after.parameters - before.parameters).to(before.gradients)
    columns = {
        "change": after.losses - before.losses,
        "first": before.gradients @ moved,
        "both": 0.5 * (before.gradients + after.gradients) @ moved,
        "refused": torch.from_numpy(before.complied - after.complied),
    }
    distance = float(moved.norm())
    return [
        {"model": model, "epoch": after.epoch, "query": query, "distance": distance}
        | {name: float(values[query]) for name, values in columns.items()}
        for query in range(len(after.losses))
    ]


def correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Pearson's and Spearman's; NaN where one of them does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    return float(pearsonr(x, y).statistic), float(spearmanr(x, y).statistic)
