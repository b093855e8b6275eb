"""How fast this machine multiplies, in which dtypes, and which attention kernels it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from finetrace.attention import LONGEST, attend
from finetrace.doctor.finding import Finding
from finetrace.models import resolve_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDE = {"cpu": 768, "cuda": 4096}
SLICE = 128  # rows of a product on the CPU: a few milliseconds, so that one in several is not interrupted
AT_MOST = 0.4  # seconds for one dtype
TRIES = 30
HEADS, WIDTH, TOKENS = 8, 64, 128


def speed(device: torch.device) -> Iterator[Finding]:
    """Matrix products by dtype, then attention."""
    rates: dict[str, float | None] = {}
    for dtype in DTYPES:
        rates[_name(dtype)] = rate(dtype, device)
    yield judged(rates, _name(resolve_dtype("auto", device)), device)
    yield attention(device)


def rate(dtype: torch.dtype, device: torch.device) -> float | None:
    """Operations a second of a matrix product, `None` where the device has none in this dtype.

    The best of several: other work on the machine makes a product slower, never faster.
    """
    side = SIDE.get(device.type, 1024)
    rows = side if device.type == "cuda" else SLICE
    try:
        left = torch.randn(rows, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
        began, best = time.perf_counter(), _seconds(lambda: left @ right, device)
        for _ in range(TRIES):
            if time.perf_counter() - began > AT_MOST:
                break
            best = min(best, _seconds(lambda: left @ right, device))
        return 2.0 * rows * side**2 / best
    except RuntimeError:
        return None


def judged(rates: dict[str, float | None], auto: str, device: torch.device) -> Finding:
    """The line on dtypes: whether what `auto` takes is also the fastest."""
    words = [f"{name} {value / 1e9:,.3g}" if value else f"{name} not usable" for name, value in rates.items()]
    what = f"{', '.join(words)} GFLOP/s on {device}; --dtype auto is {auto}"
    facts = {"device": str(device), "operations_per_second": rates, "auto": auto}
    if not any(rates.values()):
        return Finding("matrix rate", "problem", f"{device} multiplies in no dtype", "use another --device", facts)
    chosen = rates.get(auto) or 0.0
    best = max(rates, key=lambda name: rates[name] or 0.0)
    if auto != best and (rates[best] or 0.0) > 1.5 * chosen:
        # where auto is float32, a faster half precision costs digits: a choice, no fault
        return Finding(
            "matrix rate", "note", what, f"--dtype {best} is the faster one here, at the digits it has", facts
        )
    return Finding("matrix rate", "ok", what, "", facts)


def attention(device: torch.device) -> Finding:
    """Which kernels there are, and that finetrace's own agrees with torch's."""
    if device.type == "cuda":
        kernels = {
            "flash": torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available(),
            "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        named = ", ".join(name for name, there in kernels.items() if there)
        return Finding("attention", "ok", f"torch's kernels: {named}", "", {"kernels": kernels})
    dtype = torch.bfloat16
    try:
        difference, own, fused = _compare(dtype, device)
    except RuntimeError as error:
        line = str(error).splitlines()[0][:160]
        return Finding("attention", "note", f"none in bfloat16 ({line})", "use --dtype float32")
    facts = {"difference": difference, "own_seconds": own, "torch_seconds": fused, "tokens": TOKENS}
    what = (
        f"torch's fused kernel, and with gradients in bfloat16 up to {LONGEST} tokens finetrace's own: {fused / own:.1f} "
        f"times as fast here at {TOKENS} tokens, apart by {difference:.1g}"
    )
    if not difference < 0.03:
        remedy = "the two kernels should differ by rounding alone; please report it, and use --dtype float32"
        return Finding("attention", "problem", what, remedy, facts)
    return Finding("attention", "ok", what, "", facts)


def _compare(dtype: torch.dtype, device: torch.device) -> tuple[float, float, float]:
    """(largest relative difference of outputs and gradients, seconds of finetrace's kernel, of torch's)."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(4, HEADS, TOKENS, WIDTH, generator=draw).to(device, dtype).requires_grad_() for _ in range(3)]

    def passed(kernel: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        out = kernel(*made)
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out.float().square().sum(), made))]

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, None, WIDTH**-0.5)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    pairs = zip(passed(own), passed(fused), strict=True)
    apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    times = [min(_seconds(lambda kernel=kernel: passed(kernel), device) for _ in range(5)) for kernel in (own, fused)]  # type: ignore[misc]
    return apart, times[0], times[1]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(1e-9, time.perf_counter() - started)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
