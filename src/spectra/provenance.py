"""Where a run came from: the commit and its dirtiness, the data, the parameters, the machine."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from typing import Any

from spectra import __version__


def tags(data_digest: str, params_digest: str) -> dict[str, str]:
    """Tags for a tracker; those of git only where there is a repository."""
    return {
        "spectra.version": __version__,
        "spectra.data.sha256": data_digest,
        "spectra.params.digest": params_digest,
        **_git(),
    }


@cache
def _git() -> dict[str, str]:
    commit = _run("rev-parse", "HEAD")
    if commit is None:
        return {}
    dirty = _run("status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit, "spectra.git.dirty": str(bool(dirty)).lower()}


def environment(*, device: str, dtype: str, threads: int) -> dict[str, Any]:
    """What numbers were computed with: nothing that differs between two runs on one machine.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the weights and the vectors.
        threads: Shares of the work on a CPU.
    """
    import numpy as np
    import scipy
    import torch

    return {
        "spectra": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": dtype,
        "threads": threads,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
    }


def _run(*arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments, no shell
            [git, *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
