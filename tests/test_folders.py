"""Who may write into a folder, and what an interrupted removal leaves in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Command
from snapshots import contents
from spectra import pipeline, verify
from spectra.artifacts import Store
from spectra.errors import StorageError, UsageError
from spectra.params import Params
from spectra.progress import Silent
from spectra.tracking import NoTracker
from sweeps import sweep

Tiny = Callable[..., Params]


def train(params: Params, out: Path) -> object:
    return pipeline.train(
        params, l2=0.002, replicate=1, out=out, progress=Silent(), tracker=NoTracker()
    )


def spectrum(params: Params, weights: Path, out: Path) -> object:
    return pipeline.spectrum(params, weights=weights, l2=None, out=out, progress=Silent())


# ----------------------------------------------------------------------------------- who may write


def test_several_may_write_beside_one_another_but_not_beside_a_sweep(tmp_path: Path):
    one, two, whole = Store(tmp_path), Store(tmp_path), Store(tmp_path)

    with one.held(alone=False), two.held(alone=False):
        with pytest.raises(StorageError, match="in use"), whole.held():
            pass
        one.write("a", [b"1"])
        two.write("b", [b"2"])
    with whole.held():
        for store in (one, two):
            with pytest.raises(StorageError, match="in use"), store.held(alone=False):
                pass

    assert contents(tmp_path) == {"a": b"1", "b": b"2"}


def test_two_processes_that_write_one_name_leave_one_whole_file(tmp_path: Path):
    """Their temporary files differ: neither writes on in what the other has put in place."""
    code = (
        "import sys, os; from pathlib import Path; from spectra.artifacts import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.held(alone=False):\n"
        "    for _ in range(40):\n"
        "        store.write('a', (str(os.getpid()).encode() + b'\\n' for _ in range(5000)))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]

    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert set(contents(tmp_path)) == {"a"}
    lines = (tmp_path / "a").read_text().splitlines()
    assert len(lines) == 5000
    assert len(set(lines)) == 1


def test_a_lone_command_leaves_a_sweeps_folder_as_it_is(tiny: Tiny, tmp_path: Path):
    """Whether the sweep is at work there, or has been."""
    folder, params = tmp_path / "r", tiny(artifacts__out=str(tmp_path / "r"))
    sweep(params)
    before, weights = contents(folder), folder / "model_weights-1-0.00200.pth"

    with Store(folder).held():
        with pytest.raises(StorageError, match="in use by another sweep"):
            train(params, folder)
        with pytest.raises(StorageError, match="in use by another sweep"):
            spectrum(params, weights, folder)
    for other in (tiny(spectrum__k=2), tiny(train__lr=0.1)):
        with pytest.raises(UsageError, match=r"holds a sweep's result 1-0\.00200, .* --out"):
            spectrum(other, weights, folder)
        with pytest.raises(UsageError, match=r"holds a sweep's result 1-0\.00200, .* --out"):
            train(other, folder)

    assert contents(folder) == before
    spectrum(params, weights, tmp_path / "s")
    assert "Hessian-eigenvalues-1-0.00200.csv" in contents(tmp_path / "s")


def test_a_repair_does_not_interfere_with_a_sweep(tiny: Tiny, tmp_path: Path):
    params = tiny(artifacts__out=str(tmp_path))
    sweep(params)
    (tmp_path / "history-1-0.00200.csv").write_bytes(b"")
    before = contents(tmp_path)

    with Store(tmp_path).held(), pytest.raises(StorageError, match="in use"):
        verify.verify(params, Store(tmp_path), sample=0, repair=True, progress=Silent())

    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------ removal, leftovers


@pytest.mark.parametrize("after", range(1, 12))
def test_a_replacement_that_is_interrupted_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
):
    """Files are deleted one by one, the manifest first: what is left over is taken for nothing."""
    folder, fresh = tmp_path / "r", tmp_path / "fresh"
    two = {"sweep__strengths": [0.0, 0.01], "artifacts__eigenvectors": "none"}
    new = tiny(artifacts__out=str(folder), train__lr=0.002, **two)
    sweep(tiny(artifacts__out=str(folder), **two))
    usual, count = Path.unlink, 0

    def stops(self: Path, missing_ok: bool = False) -> None:
        nonlocal count
        if self.parent == folder:
            count += 1
            if count > after:
                raise KeyboardInterrupt
        usual(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(new, replace=True)
    monkeypatch.setattr(Path, "unlink", usual)
    for record in Store(folder).records():
        assert Store(folder).intact(record)

    sweep(new, replace=True)
    sweep(tiny(artifacts__out=str(fresh), train__lr=0.002, **two))

    assert contents(folder) == contents(fresh)


def test_what_a_kill_left_half_written_is_cleared_in_every_replicate(tiny: Tiny, tmp_path: Path):
    params = tiny(artifacts__out=str(tmp_path), sweep__ids=[1, 2], sweep__strengths=[0.0, 0.01])
    sweep(params)
    before = contents(tmp_path)
    for name in (
        ".model_weights-1-0.01000.pth.partial", ".Hessian-eigenvectors-2-0.00000.csv.partial",
        ".manifest-2-0.01000.json.partial", ".Model-2.csv.partial",
        ".gradients-1-0.00000.csv.4711.partial",
    ):  # fmt: skip
        (tmp_path / name).write_bytes(b"half")
    for name in ("manifest-2-0.00000.json", "manifest-1-0.01000.json"):
        (tmp_path / name).unlink()

    assert sweep(params).reused == 2
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------------------- signals


def test_a_hangup_that_was_to_be_ignored_is_ignored(command: Command):
    """As under `nohup`: the terminal goes, the sweep stays."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(command.executable), "sweep", "--no-report", "--no-track"],
        cwd=command.folder, env=os.environ | command.tiny, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stderr is not None
    assert "strengths to do" in running.stderr.readline()
    running.send_signal(signal.SIGHUP)
    _, said = running.communicate(timeout=60)

    assert running.returncode == 0, said
    assert len(Store(command.folder / "test_data").records()) == 3
