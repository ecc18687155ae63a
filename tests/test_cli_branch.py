"""The command `branch`: one line for every misuse, JSON alone, files that a kill leaves whole."""

from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Command
from spectra import artifacts
from spectra.cli import app
from spectra.mlp import Mlp

Run = Callable[..., Any]
NAME = "model_weights-1-0.04000.pth"


@pytest.fixture
def weights(command: Command) -> Path:
    """Weights of 784-2-10 whose name tells a strength, and a copy whose name does not."""
    mlp = Mlp((784, 2, 10))
    theta_P = mlp.initial(torch.Generator().manual_seed(0), torch.float32)
    content = artifacts.state_dict_bytes(mlp.state_dict(theta_P))
    (command.folder / "plain.pth").write_bytes(content)
    path = command.folder / NAME
    path.write_bytes(content)
    return path


@pytest.fixture
def run(command: Command, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`spectra branch` in this process, in a folder with parameters and weights."""
    assert weights.exists()
    monkeypatch.chdir(command.folder)
    for name, value in command.tiny.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SPECTRA_MODEL_HIDDEN", "[2]")
    return lambda *words: CliRunner().invoke(app, ["branch", *map(str, words)])


BAD = [
    ([NAME, "--to", "0.04"], 2, "--to: must differ from the strength of the weights, 0.04"),
    (["plain.pth", "--l2", "0.05", "--to", "0.05"], 2, "--to: must differ from the strength"),
    ([NAME, "--to", "-0.1"], 2, "--to: input should be greater than or equal to 0, got '-0.1'"),
    ([NAME, "--to", "0.1", "--l2", "-1"], 2, "--l2: input should be greater than or equal to 0"),
    ([NAME, "--to", "nan"], 2, "--to: input should be greater than or equal to 0, got 'nan'"),
    ([NAME, "--to", "inf"], 2, "--to: a strength must be a finite number, got inf"),
    (["plain.pth", "--l2", "nan", "--to", "0.1"], 2, "--l2: input should be greater than"),
    ([NAME, "--to", "0.05", "--step", "0"], 2, "--step: must be above 0, got 0"),
    ([NAME, "--to", "0.05", "--step", "-1"], 2, "--step: must be above 0, got -1"),
    ([NAME, "--to", "0.05", "--step", "nan"], 2, "--step: must be a finite number, got nan"),
    ([NAME, "--to", "0.05", "--max-products", "nan"], 2, "--max-products: input should be"),
    ([NAME, "--to", "0.05", "--polish-products", "nan"], 2, "--polish-products: input should be"),
    (["plain.pth", "--to", "0.05"], 2, "--l2: plain.pth does not tell its strength; give it"),
    (["absent.pth", "--l2", "1", "--to", "0.05"], 2, "cannot read weights from absent.pth"),
    ([NAME, "--to", "0.05", "--polish-products", "2"], 4, "raise --polish-products or start"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "message"), BAD, ids=[" ".join(words) for words, _, _ in BAD]
)
def test_misuse_is_one_line(run: Run, words: list[str], code: int, message: str):
    shown = run(*words, "--quiet")

    assert shown.exit_code == code, shown.stderr
    assert shown.stdout == ""
    assert shown.stderr.startswith("spectra: ")
    assert shown.stderr.count("\n") == 1
    assert message in shown.stderr
    assert not Path("results").exists()


def test_json_is_all_there_is_and_files_are_those_named(run: Run):
    words = (NAME, "--to", "0.041", "--step", "0.001", "--json", "--out", "out")

    shown = run(*words)

    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("\n") == 1
    found = json.loads(shown.stdout, parse_constant=pytest.fail)
    assert found["ended"] == "target"
    assert found["l2"] == 0.04
    assert {Path(name).name for name in found["files"]} == {p.name for p in Path("out").iterdir()}
    rows = list(csv.DictReader(Path("out/branch-1-0.04000.csv").read_text().splitlines()))
    assert len(rows) == found["points"]
    assert float(rows[-1]["L2_strength"]) == pytest.approx(0.041, abs=1e-9)
    summary = json.loads(Path("out/branch-1-0.04000.json").read_text())
    assert summary["ended"] == "target"


def test_budget_of_the_branch_ends_it_with_what_there_is(run: Run):
    shown = run(NAME, "--to", "0.06", "--max-products", "1", "--out", "out")

    assert shown.exit_code == 0, shown.stderr
    assert "The products are used up" in shown.stdout
    summary = json.loads(Path("out/branch-1-0.04000.json").read_text())
    assert summary["ended"] == "budget"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_branch_that_reads_back(
    command: Command, weights: Path, number: signal.Signals, code: int
):
    running = command.start(
        "branch", weights, "--to", "0.2", "--step", "0.00001", "--out", "out",
        SPECTRA_MODEL_HIDDEN="[2]",
    )  # fmt: skip
    out = command.folder / "out"
    table = out / "branch-1-0.04000.csv"
    deadline = time.monotonic() + 100
    while not (table.exists() and table.read_text().count("\n") > 2):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)

    assert running.returncode == code
    assert "Traceback" not in err
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) >= 2
    assert json.loads((out / "branch-1-0.04000.json").read_text())["ended"] == "unfinished"
    for path in out.glob("*.pth"):
        assert torch.load(path, weights_only=True)["fc1.weight"].shape == (2, 784)
    assert not list(out.glob(".*"))
