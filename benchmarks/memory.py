"""The peak memory of one contender's product: `python -m benchmarks.memory NAME FOLDER ...`.

A process of its own for each, because a peak never falls. On Linux it is VmHWM, the peak of
this process image, set back once the data are loaded; `ru_maxrss` would also hold the size of
the parent that started it. On a GPU it is what PyTorch's allocator gave out at most.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
from pathlib import Path

import torch

from benchmarks.contenders import by_name
from benchmarks.workload import HIDDEN, Problem, Size, read
from spectra.mlp import Mlp

_PRODUCTS = 2


def measure(name: str, folder: Path, device: torch.device, threads: int) -> dict[str, float]:
    """MB at the peak, and before the contender set up."""
    torch.set_num_threads(threads)
    digits = read(folder, device)
    mlp = Mlp((digits[0].inputs_ND.shape[1], *HIDDEN, 10))
    theta_P = mlp.initial(torch.Generator().manual_seed(0), torch.float32).to(device)
    # The weights do not matter here, so none have to be trained.
    problem = Problem("fresh", mlp, theta_P, 0.0, *digits, threads, Size())
    contender = by_name(name)
    with contextlib.suppress(OSError):  # without it the peak of the loading counts too
        Path("/proc/self/clear_refs").write_text("5")
    before = _now_mb(device)
    product = contender.operator(problem)
    for _ in range(_PRODUCTS):
        product(theta_P)
    return {"before_mb": before, "peak_mb": _peak_mb(device)}


def _now_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _status_mb("VmRSS") or 0.0


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status_mb("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mb(field: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else None


if __name__ == "__main__":
    _name, _folder, _device, _threads = sys.argv[1:]
    print(json.dumps(measure(_name, Path(_folder), torch.device(_device), int(_threads))))
