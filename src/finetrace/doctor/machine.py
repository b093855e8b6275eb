"""Processor, memory, devices, disk and network settings of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from finetrace.doctor.finding import Finding
from finetrace.host_memory import container_limit
from finetrace.models import resolve_dtype

FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "bf16", "sve_bf16")
LITTLE_MEMORY = 4e9
LITTLE_DISK = 5e9


def machine() -> Iterator[Finding]:
    """Everything that needs no model."""
    yield processor()
    yield memory()
    yield from devices()
    yield from disks()
    yield hub()


def processor() -> Finding:
    """Model, cores, the instructions that matter, torch's threads."""
    name = _cpu_name()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    flags = [flag for flag in FLAGS if capabilities.get(flag)]
    threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    auto = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    facts = {"name": name, "cores": usable, "threads": threads, "flags": flags, "load": load, "auto_dtype": auto}
    what = f"{name}, {usable} cores, torch uses {threads}; {', '.join(flags) or 'no flag that matters'}; --dtype auto is {auto}"
    if threads > usable:
        return Finding(
            "processor", "note", what, f"set OMP_NUM_THREADS={usable}, the cores that this process has", facts
        )
    if load > 1.5 * usable:
        remedy = f"the load is {load:.1f}: others are using this machine, and times measured now are too long"
        return Finding("processor", "note", what, remedy, facts)
    return Finding("processor", "ok", what, "", facts)


def memory() -> Finding:
    """Main memory, and a limit of the container if it is lower."""
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    limit = container_limit()
    if not total:
        return Finding("memory", "note", "this system does not say how much memory it has")
    facts = {"total": total, "available": free, "limit": limit}
    what = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if limit is not None and limit < total:
        what += f"; the container may use {limit / 1e9:.1f} GB"
    if min(free, limit or free) < LITTLE_MEMORY:
        return Finding("memory", "note", what, "the embedded model wants 4 GB; use a smaller --batch-tokens", facts)
    return Finding("memory", "ok", what, "", facts)


def devices() -> Iterator[Finding]:
    """CUDA devices, each tried."""
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
        if driver:
            what = f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it"
            yield Finding("cuda", "note", what, "install a build of torch for CUDA: https://pytorch.org/get-started")
        else:
            yield Finding("cuda", "ok", "no device; everything runs on the CPU", "", {"devices": []})
        return
    for number in range(torch.cuda.device_count()):
        name = f"cuda:{number}"
        try:
            about = torch.cuda.get_device_properties(number)
            torch.empty(1, device=name).add_(1).cpu()
            free, total = torch.cuda.mem_get_info(number)
        except Exception as error:  # whatever the driver raises
            line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            yield Finding(
                name, "problem", f"torch cannot use this device ({line})", "use --device cpu, or mend the driver"
            )
            continue
        bf16 = torch.cuda.is_bf16_supported()
        facts = {
            "name": about.name,
            "total": total,
            "free": free,
            "capability": [about.major, about.minor],
            "bf16": bf16,
        }
        what = f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute capability {about.major}.{about.minor}"
        what += ", multiplies in bfloat16" if bf16 else ", does not multiply in bfloat16; --dtype auto is float32"
        if free < 0.5 * total:
            yield Finding(
                name, "note", what, "another process uses this device; choose one with --device cuda:N", facts
            )
        else:
            yield Finding(name, "ok", what, "", facts)


def disks() -> Iterator[Finding]:
    """Free space where finetrace and the Hub's client keep things, and here."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("FINETRACE_CACHE", Path.home() / ".cache" / "finetrace"))
    places = {"cache": cache, "hub cache": Path(constants.HF_HUB_CACHE), "working folder": Path.cwd()}
    for name, path in places.items():
        there = next((each for each in (path, *path.absolute().parents) if os.path.isdir(each)), Path("/"))
        free = shutil.disk_usage(there).free
        writable = _writable(there)
        facts = {"path": str(path), "free": free, "writable": writable}
        what = f"{path}: {free / 1e9:.1f} GB free" + ("" if writable else ", cannot be written")
        if not writable and name == "cache":
            yield Finding(name, "problem", what, "point FINETRACE_CACHE at a folder that you may write", facts)
        elif not writable:
            remedy = (
                "give --out elsewhere" if name == "working folder" else "point HF_HOME at a folder that you may write"
            )
            yield Finding(name, "note", what, remedy, facts)
        elif free < LITTLE_DISK:
            yield Finding(name, "note", what, "free some space; finetrace plan says what an index needs", facts)
        else:
            yield Finding(name, "ok", what, "", facts)


def hub() -> Finding:
    """Whether the Hub may be asked; it is not."""
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    facts = {"offline": offline, "endpoint": constants.ENDPOINT}
    if offline:
        what = "offline (HF_HUB_OFFLINE is set): models and data come from folders and from the cache alone"
        return Finding("hub", "ok", what, "", facts)
    return Finding("hub", "ok", f"online, {constants.ENDPOINT}; whether it can be reached was not tried", "", facts)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
