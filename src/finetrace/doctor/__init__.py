"""Is this machine ready, and what can it do? Every line is measured or read here."""

from __future__ import annotations

from collections.abc import Iterator

from finetrace.doctor.finding import Finding, State

__all__ = ["Finding", "State", "examine"]


def examine(model: str, adapter: str | None, device: str, trust_remote_code: bool, quick: bool) -> Iterator[Finding]:
    """Findings one after another; `quick` leaves the model out."""
    from finetrace.doctor.invariance import model_checks
    from finetrace.doctor.machine import machine
    from finetrace.doctor.software import software
    from finetrace.doctor.speed import speed
    from finetrace.models import ModelSpec, resolve_device

    yield from software()
    yield from machine()
    yield from speed(resolve_device(device))
    if not quick:
        yield from model_checks(ModelSpec(model, adapter, "float32", device, trust_remote_code))
