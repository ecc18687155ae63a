"""What writing a strength's files takes, beside the same bytes handed to the disk as they are.

Ours formats, sums (SHA-256), writes, flushes to the disk and renames; the disk's own time is that
of one write of the finished bytes, one flush and a rename. `numpy.savetxt` writes what it writes,
and flushes nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.contender import MissingError
from benchmarks.result import Result
from benchmarks.timing import Spread, interleave, once
from benchmarks.workload import Problem

_CPU = torch.device("cpu")


def files(result: Result, problem: Problem, scratch: Path) -> None:
    """Time every kind of file of one strength, on the disk of `scratch`."""
    try:
        contents = _contents(problem)
    except MissingError as reason:
        result.skip(str(reason))
        return
    from spectra.artifacts import Store

    vectors_KP = _vectors(problem)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="files-", dir=scratch) as folder:
        store = Store(Path(folder))
        for name, chunks in contents.items():
            whole = b"".join(chunks())
            actions = {
                "ours": once(lambda c=chunks: store.write("ours", c()), _CPU),
                "disk": once(lambda b=whole: _handed_over(Path(folder), b), _CPU),
            }
            if name == "eigenvectors, csv":
                actions["savetxt"] = once(
                    lambda: np.savetxt(Path(folder) / "theirs", vectors_KP, delimiter=","), _CPU
                )
            times = interleave(
                actions, rounds=problem.size.rounds, budget_s=problem.size.budget_s / 2,
                failed=result.failed,
            )  # fmt: skip
            spreads = {who: Spread.of(parts["total"]) for who, parts in times.items()}
            result.files.append(
                {"file": name, "bytes": len(whole)}
                | {who: spread.as_dict() for who, spread in spreads.items()}
            )
            shown = "  ".join(f"{who} {spread.median:.4g} s" for who, spread in spreads.items())
            result.say(f"  {name}, {len(whole) / 1e6:.3g} MB: {shown}")


def _vectors(problem: Problem) -> np.ndarray:
    draw = torch.Generator().manual_seed(0)
    vectors_KP = torch.randn(problem.size.k, problem.mlp.dim, generator=draw)
    return (vectors_KP / vectors_KP.norm(dim=1, keepdim=True)).numpy()


def _contents(problem: Problem) -> dict[str, Callable[[], Iterable[bytes]]]:
    """What a sweep writes, as a sweep makes it, anew at every call.

    Raises:
        MissingError: A package that writes is not installed.
    """
    try:
        from spectra import artifacts
    except ModuleNotFoundError as error:
        raise MissingError(f"files: '{error.name}' is not installed") from None
    vectors_KP = _vectors(problem)
    state = problem.mlp.state_dict(problem.theta_P.cpu())
    parts = {name: values.numpy() for name, values in state.items()}
    return {
        "eigenvectors, csv": lambda: artifacts.lines_of_numbers(vectors_KP),
        "eigenvectors, npy": lambda: [artifacts.array_bytes(vectors_KP)],
        "gradient, csv": lambda: artifacts.gradient_lines(parts),
        "weights, pth": lambda: [artifacts.state_dict_bytes(state)],
    }


def _handed_over(folder: Path, whole: bytes) -> None:
    partial = folder / "handed.partial"
    with partial.open("wb") as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / "handed")
