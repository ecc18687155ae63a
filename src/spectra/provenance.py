"""Where a run came from: the commit and its dirtiness, the data, the parameters."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

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
