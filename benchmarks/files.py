"""What writing a strength's files takes, beside the same bytes handed to the disk as they are.

Ours formats, sums (SHA-256), writes, flushes to the disk and renames; the disk's own time is that
of one write of the finished bytes, one flush and a rename. `numpy.savetxt` writes what it writes,
and flushes nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.result import Result
from benchmarks.timing import Spread, interleave, once
from benchmarks.workload import Problem

_CPU = torch.device("cpu")


def files(result: Result, problem: Problem, scratch: Path) -> None:
    """Time every kind of file of one strength, on the disk of `scratch`."""
    try:
        from spectra import artifacts
    except ModuleNotFoundError as error:
        result.skip(f"files: '{error.name}' is not installed")
        return
    vectors_KP = _vectors(problem)
    state = problem.mlp.state_dict(problem.theta_P.cpu())
    parts = {name: values.numpy() for name, values in state.items()}
    # What a sweep writes, made anew at every call as a sweep makes it.
    contents: dict[str, Callable[[], Iterable[bytes]]] = {
        "eigenvectors, csv": lambda: artifacts.lines_of_numbers(vectors_KP),
        "eigenvectors, npy": lambda: [artifacts.array_bytes(vectors_KP)],
        "gradient, csv": lambda: artifacts.gradient_lines(parts),
        "weights, pth": lambda: [artifacts.state_dict_bytes(state)],
    }
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="files-", dir=scratch) as name:
        folder = Path(name)
        store = artifacts.Store(folder)
        by_numpy = partial(np.savetxt, folder / "theirs", vectors_KP, delimiter=",")
        for kind, chunks in contents.items():
            whole = b"".join(chunks())
            actions = {
                "ours": once(lambda c=chunks: store.write("ours", c()), _CPU),
                "disk": once(partial(_handed_over, folder, whole), _CPU),
            }
            if kind == "eigenvectors, csv":
                actions["savetxt"] = once(by_numpy, _CPU)
            times = interleave(
                actions, rounds=problem.size.rounds, budget_s=problem.size.budget_s / 2,
                failed=result.failed,
            )  # fmt: skip
            spreads = {who: Spread.of(took["total"]) for who, took in times.items()}
            result.files.append(
                {"file": kind, "bytes": len(whole)}
                | {who: spread.as_dict() for who, spread in spreads.items()}
            )
            shown = "  ".join(f"{who} {spread.median:.4g} s" for who, spread in spreads.items())
            result.say(f"  {kind}, {len(whole) / 1e6:.3g} MB: {shown}")


def _vectors(problem: Problem) -> np.ndarray:
    draw = torch.Generator().manual_seed(0)
    vectors_KP = torch.randn(problem.size.k, problem.mlp.dim, generator=draw)
    return (vectors_KP / vectors_KP.norm(dim=1, keepdim=True)).numpy()


def _handed_over(folder: Path, whole: bytes) -> None:
    partial = folder / "handed.partial"
    with partial.open("wb") as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "handed")
