"""The stage on which bad input is tried: a folder with a finished sweep, one command, one line.

A row is a command line with what it meets; it is played in a copy of the folder, through the
real command line. Whatever is wrong, the complaint is one line, the exit code says of which
kind it is, standard output is empty, and every earlier result has the bytes and the times it
had before.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectra.cli import app

PARAMETERS = """\
data: {{name: sample, root: {root}, source: folder, folder: {folder}}}
model: {{hidden: [4]}}
train: {{max_epochs: 1, threads: 1}}
sweep: {{strengths: [0.0, 0.01]}}
spectrum: {{k: 2}}
certificate: {{pairs: 1, probe: 2}}
runtime: {{threads: 1}}
artifacts: {{eigenvectors: none}}
tracking: {{enabled: false}}
"""
"""Of a sweep that takes a second: 3,190 parameters, two strengths, two pairs."""

QUIET = ("data", "train", "spectrum", "sweep", "branch", "verify")
"""Commands that tell their progress, on standard error, unless they are asked not to."""

WEIGHTS = "test_data/model_weights-1-0.01000.pth"


@dataclass(frozen=True)
class Row:
    """A tried input.

    Attributes:
        name: What is wrong.
        words: The command line; text is divided at its spaces.
        message: The complaint; `…` stands for any text.
        code: What the process ends with.
        prepare: Puts into the folder, where the command runs, what it is to meet.
        env: Variables that are set.
    """

    name: str
    words: str | tuple[str, ...]
    message: str
    code: int = 2
    prepare: Callable[[Path], object] | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def rows(*table: Row) -> pytest.MarkDecorator:
    """A test of every row."""
    assert len({row.name for row in table}) == len(table)
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


def params(text: str) -> Callable[[Path], object]:
    """A `params.yaml` of this text in the place of the good one."""
    return lambda here: (here / "params.yaml").write_text(text, encoding="utf-8")


def results(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every earlier result."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted((folder / "test_data").iterdir())
    }


def is_as_told(message: str, line: str) -> bool:
    """Whether a line is the message, of which `…` is any text."""
    return bool(re.fullmatch(".*".join(map(re.escape, message.split("…"))), line))


class Stage:
    """A folder with a finished sweep, copied for every row."""

    def __init__(self, folder: Path, finished: Path) -> None:
        self.folder = folder
        shutil.copytree(finished, folder, dirs_exist_ok=True, copy_function=shutil.copy2)
        self.before = results(folder)

    def play(self, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the row's command and hold its outcome against everything it must be."""
        words = self._prepared(row)
        monkeypatch.chdir(self.folder)
        for name, value in row.env.items():
            monkeypatch.setenv(name, value)
        ended = CliRunner().invoke(app, words)

        assert isinstance(ended.exception, SystemExit), repr(ended.exception)
        self._check(row, ended.exit_code, ended.stdout, ended.stderr)

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        ended = CliRunner().invoke(app, words)
        return ended.exit_code, ended.stdout, ended.stderr

    def play_apart(
        self, row: Row, environment: Mapping[str, str], memory: int = resource.RLIM_INFINITY
    ) -> None:
        """The same in a process of its own, which may address so many bytes."""

        def bounded() -> None:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (memory, hard))

        executable = Path(sys.executable).with_name("spectra")
        ended = subprocess.run(
            [executable, *self._prepared(row)], cwd=self.folder, capture_output=True, text=True,
            env={**os.environ, **row.env, **environment}, timeout=120, check=False,
            preexec_fn=bounded,
        )  # fmt: skip

        self._check(row, ended.returncode, ended.stdout, ended.stderr)

    def _prepared(self, row: Row) -> list[str]:
        if row.prepare is not None:
            row.prepare(self.folder)
        words = row.words.split(" ") if isinstance(row.words, str) else [*row.words]
        return [words[0], "--quiet", *words[1:]] if words[0] in QUIET else words

    def _check(self, row: Row, code: int, out: str, err: str) -> None:
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert is_as_told(f"spectra: {row.message}", err[:-1]), err
        assert code == row.code
        assert out == ""
        assert "\x1b" not in err
        assert results(self.folder) == self.before


def finished_sweep(folder: Path, root: Path, digits: Path) -> Path:
    """A folder with `params.yaml` and the results of a sweep of those parameters."""
    text = PARAMETERS.format(root=root, folder=digits)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        ended = CliRunner().invoke(app, ["sweep", "--no-report", "--quiet"])
    finally:
        os.chdir(before)
    assert ended.exit_code == 0, ended.output
    return folder
