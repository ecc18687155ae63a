"""The machine and the versions that a run belongs to; no date, no name of a host."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spectra

_PACKAGES = (
    "torch", "torchvision", "numpy", "scipy",
    "curvlinops-for-pytorch", "hessian-eigenthings", "pyhessian",
)  # fmt: skip


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, cores, memory, GPU, threads, and the load that others put on it."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "cpu": _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor(),
        "cores": cores(),
        "ram_gib": _ram_gib(),
        "gpu": gpu,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None where it is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "spectra": spectra.__version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first(pattern: str, path: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _ram_gib() -> float | None:
    total = _first(r"^MemTotal:\s+(\d+) kB$", "/proc/meminfo")
    return round(int(total) / 2**20, 1) if total else None
