"""The command `branch`: one line for every misuse, JSON alone, files that a kill leaves whole."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Command
from spectra import artifacts, branches
from spectra.artifacts import Store
from spectra.cli import app
from spectra.errors import StorageError
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


HOLDS = (
    "import pathlib, sys; from spectra.artifacts import Store\n"
    "with Store(pathlib.Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()\n"
)


def test_folder_of_a_sweep_at_work_is_refused_before_any_work(run: Run, tmp_path: Path):
    """The lock is really held, by another process, and is free again when that ends."""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as sweep:
        assert sweep.stdout is not None
        assert sweep.stdout.readline() == b"held\n"
        # A polishing that would fail with 4 is not begun.
        refused = run(NAME, "--to", "0.041", "--out", "out", "--polish-products", "2", "--quiet")
        assert sweep.poll() is None

    assert refused.exit_code == 5, refused.stderr
    assert refused.stderr == (
        "spectra: out is in use by another sweep; wait for it or choose another folder with --out\n"
    )
    assert list(out.iterdir()) == []
    assert run(NAME, "--to", "0.041", "--out", "out", "--quiet").exit_code == 0


def test_branch_holds_its_folder_against_sweeps_and_not_against_branches(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []
    usual = branches._write

    def write(out: Store, *given: Any) -> None:  # noqa: ANN401
        with Store(out.root).held(alone=False):
            tried.append("beside")
        with pytest.raises(StorageError, match="in use"), Store(out.root).held():
            tried.append("alone")
        usual(out, *given)

    monkeypatch.setattr(branches, "_write", write)

    done = run(NAME, "--to", "0.041", "--step", "0.001", "--out", "out", "--quiet")

    assert done.exit_code == 0, done.stderr
    assert set(tried) == {"beside"}
    with Store(Path("out")).held():
        pass


def test_weights_that_an_earlier_branch_has_left_go(run: Run):
    """Its own names alone: others of the same beginning stay."""
    Path("out").mkdir()
    stale = ("fold", "fold-2", "crossing-12", "breaking", "last", "target", "start")
    alike = (
        "1-0.04000-mine", "1-0.04000-fold-copy", "1-0.04000-fold-0", "1-0.04000-step", "1-0.04000",
        "1-0.040001-fold", "1-0x04000-fold", "11-0.04000-fold", "2-0.04000-fold",
    )  # fmt: skip
    kept = [*(f"branch_weights-{rest}.pth" for rest in alike), NAME, "notes.txt"]
    for name in (*(f"branch_weights-1-0.04000-{kind}.pth" for kind in stale), *kept):
        (Path("out") / name).write_text("old")

    refused = run(NAME, "--to", "0.05", "--out", "out", "--polish-products", "2", "--quiet")
    assert refused.exit_code == 4
    assert len(list(Path("out").iterdir())) == len(stale) + len(kept), "nothing was written"
    shown = run(NAME, "--to", "0.041", "--step", "0.001", "--json", "--out", "out")

    assert shown.exit_code == 0, shown.stderr
    written = {Path(name).name for name in json.loads(shown.stdout)["files"]}
    assert {path.name for path in Path("out").iterdir()} == written | set(kept)
    assert {path.name for path in Path("out").iterdir() if path.read_bytes() == b"old"} == set(kept)


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
