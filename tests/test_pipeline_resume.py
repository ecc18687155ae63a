"""A sweep repeats to the byte, goes on where it stopped and spares results of something else."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from snapshots import contents, copy, touched
from spectra import artifacts, estimate, polishing, solve
from spectra.artifacts import Store
from spectra.errors import (
    ParameterError,
    StorageError,
    UsageError,
)
from spectra.executors import Workers
from spectra.tracking import MlflowTracker, NoTracker
from sweeps import Tiny, strengths, sweep

# --------------------------------------------------------------------------- repeating and resuming


def test_another_folder_gets_the_same_bytes(tiny: Tiny, tmp_path: Path, done: Path):
    sweep(tiny(artifacts__out=str(tmp_path / "elsewhere")))

    assert contents(tmp_path / "elsewhere") == contents(done)


def test_nothing_in_the_folder_tells_a_time_or_a_place(done: Path):
    for name, content in contents(done).items():
        text = content.decode("latin1")
        assert str(done.parent) not in text, name
        assert not re.search(r"20\d\d-[01]\d-[0-3]\d", text), name
        if name.endswith((".json", "Model-1.csv")):
            assert not re.search("seconds|duration|timestamp|run_id", text), name


def test_a_second_run_does_nothing(tiny: Tiny, tmp_path: Path, database: Path):
    params = tiny(artifacts__out=str(tmp_path / "r"), tracking__enabled=True)
    tracker = MlflowTracker(f"sqlite:///{database}", "x")
    sweep(params, tracker=tracker)
    before, runs = touched(tmp_path / "r"), [run.to_dictionary() for run in strengths(database)]

    swept = sweep(params, tracker=MlflowTracker(f"sqlite:///{database}", "x"))

    assert swept.reused == 3
    after = touched(tmp_path / "r")
    assert {n for n in before if before[n] != after[n]} <= {"Model-1.csv"}
    assert [run.to_dictionary() for run in strengths(database)] == runs
    assert len(strengths(database, "sweep")) == 1


@pytest.mark.parametrize(
    "lost",
    ["manifest-1-0.00200.json", "model_weights-1-0.00200.pth", "Hessian-eigenvalues-1-0.01000.csv",
     "manifest-1-0.00000.json", "Model-1.csv"],
)  # fmt: skip
def test_what_is_lost_comes_back_as_it_was(tiny: Tiny, tmp_path: Path, done: Path, lost: str):
    folder = tmp_path / "r"
    copy(done, folder)
    (folder / lost).unlink()

    swept = sweep(tiny(artifacts__out=str(folder)))

    assert swept.reused == (3 if lost == "Model-1.csv" else 2)
    assert contents(folder) == contents(done)


def test_a_damaged_weights_file_is_noticed_and_replaced(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    copy(done, folder)
    weights = folder / "model_weights-1-0.00200.pth"
    damaged = bytearray(weights.read_bytes())
    damaged[2000] ^= 1
    weights.write_bytes(damaged)

    assert sweep(tiny(artifacts__out=str(folder))).reused == 2
    assert contents(folder) == contents(done)


def test_a_grid_that_goes_on_reuses_its_beginning(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0, 0.002]))
    before = touched(folder)

    assert sweep(tiny(artifacts__out=str(folder))).reused == 2

    after = touched(folder)
    assert {n for n in before if before[n] != after[n]} == {"Model-1.csv"}
    assert contents(folder) == contents(done)


def test_a_finer_grid_with_longer_labels_does_not_lose_its_way(tiny: Tiny, tmp_path: Path):
    """With 1e-6 in the grid, 0 is 0.000000: what 0.00000 holds is of another grid."""
    folder, fresh = tmp_path / "r", tmp_path / "fresh"
    sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0]))
    finer = {"sweep__strengths": [0.0, 1e-6]}

    with pytest.raises(UsageError, match="another grid of strengths"):
        sweep(tiny(artifacts__out=str(folder), **finer))
    sweep(tiny(artifacts__out=str(folder), **finer), replace=True)

    sweep(tiny(artifacts__out=str(fresh), **finer))
    assert contents(folder) == contents(fresh)


def test_how_many_spectra_are_under_way_changes_no_byte(
    tiny: Tiny, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
):
    for count in (0, 3):
        monkeypatch.setattr("spectra.workbench.Workbench.workers", count)
        sweep(tiny(artifacts__out=str(tmp_path / str(count))))
        assert contents(tmp_path / str(count)) == contents(done)


def test_a_chain_trains_on_while_a_spectrum_is_computed(
    tiny: Tiny, tmp_path: Path, done: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first strength's spectrum waits for the second's training, which must not wait for it."""
    trained, optimise, finish = threading.Event(), solve.optimise, polishing.finish
    groups: list[int] = []

    def optimised(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        outcome = optimise(*given, **named)
        groups.append(threading.get_ident())
        if len(groups) == 2:
            trained.set()
        return outcome

    def finished(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        assert trained.wait(60)
        assert threading.get_ident() not in groups
        return finish(*given, **named)

    monkeypatch.setattr("spectra.workbench.Workbench.workers", 1)
    monkeypatch.setattr(solve, "optimise", optimised)
    monkeypatch.setattr(polishing, "finish", finished)

    sweep(tiny(artifacts__out=str(tmp_path)))

    assert contents(tmp_path) == contents(done)


def test_a_finished_strength_is_told_of_before_the_next_is_trained(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Although more might be under way: who is killed meanwhile finds it in the table."""
    optimise, submit = solve.optimise, Workers.submit
    handed: list[Future[Any]] = []
    lines: list[int] = []

    def submitted(*given: Any) -> Future[Any]:  # noqa: ANN401
        handed.append(submit(*given))
        return handed[-1]

    def optimised(*given: Any, **named: Any) -> Any:  # noqa: ANN401
        table = tmp_path / "Model-1.csv"
        lines.append(len(table.read_text().splitlines()) if table.exists() else 0)
        wait(handed, timeout=60)
        return optimise(*given, **named)

    monkeypatch.setattr("spectra.workbench.Workbench.workers", 2)
    monkeypatch.setattr(Workers, "submit", submitted)
    monkeypatch.setattr(solve, "optimise", optimised)

    sweep(tiny(artifacts__out=str(tmp_path)))

    assert lines[0] == 0
    assert lines[2] >= 2


@pytest.mark.parametrize("protocol", ["independent", "continuation"])
def test_a_stack_resumes_to_the_same_bytes(tiny: Tiny, tmp_path: Path, protocol: str):
    """One member of a group is lost; the group is trained whole, the others stay untouched."""
    params = tiny(
        artifacts__out=str(tmp_path), train__stack=3, sweep__protocol=protocol, sweep__ids=[1, 2],
        sweep__strengths=[0.0, 0.002, 0.01],
    )  # fmt: skip
    sweep(params)
    before, untouched = contents(tmp_path), touched(tmp_path)
    (tmp_path / "manifest-2-0.00200.json").unlink()

    assert sweep(params).reused == 5

    assert contents(tmp_path) == before
    kept = {name for name in untouched if "2-0.00200" not in name and "Model" not in name}
    assert {n: t for n, t in touched(tmp_path).items() if n in kept} == {
        name: untouched[name] for name in kept
    }


# ------------------------------------------------------------------------ results of something else


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train__lr": 0.5}, "train.lr is 0.5, theirs 0.0015"),
        ({"objective__penalty": "half"}, "objective.penalty is half, theirs full"),
        ({"sweep__strengths": [0.0, 0.002]}, "another grid of strengths"),
        ({"train__lr": 0.5, "train__patience": 1, "spectrum__k": 2, "spectrum__rtol": 0.5},
         " and 1 more"),
        ({"runtime__seed": 5}, "runtime.seed is 5, theirs 0"),
    ],
)  # fmt: skip
def test_other_parameters_are_refused_and_nothing_is_touched(
    tiny: Tiny, done: Path, change: Mapping[str, object], words: str
):
    before = contents(done), touched(done)

    with pytest.raises(UsageError) as caught:
        sweep(tiny(artifacts__out=str(done), **change))

    text = str(caught.value)
    assert words in text
    assert "choose another folder with --out, or delete them with --replace" in text
    assert "\n" not in text
    assert (contents(done), touched(done)) == before


def test_replace_puts_new_results_in_their_place(tiny: Tiny, tmp_path: Path, done: Path):
    folder, fresh = tmp_path / "r", tmp_path / "fresh"
    copy(done, folder)
    (folder / "notes.txt").write_text("mine")
    other = {"train__lr": 0.01, "sweep__strengths": [0.0, 0.5], "artifacts__eigenvectors": "npy"}

    sweep(tiny(artifacts__out=str(folder), **other), replace=True)

    sweep(tiny(artifacts__out=str(fresh), **other))
    assert contents(folder) == contents(fresh) | {"notes.txt": b"mine"}


def test_replace_prunes_a_grid_that_shrank(tiny: Tiny, tmp_path: Path, done: Path):
    folder = tmp_path / "r"
    copy(done, folder)

    swept = sweep(tiny(artifacts__out=str(folder), sweep__strengths=[0.0, 0.002]), replace=True)

    assert swept.reused == 2
    assert len((folder / "Model-1.csv").read_text().splitlines()) == 3
    assert not list(folder.glob("*0.01000*"))


def test_a_table_of_another_program_is_refused(tiny: Tiny, tmp_path: Path):
    (tmp_path / "Model-1.csv").write_text("L2_strength\n0.5\n")
    params = tiny(artifacts__out=str(tmp_path), sweep__strengths=[0.0])

    with pytest.raises(UsageError, match=r"holds Model-1\.csv of another program"):
        sweep(params)
    assert contents(tmp_path) == {"Model-1.csv": b"L2_strength\n0.5\n"}

    sweep(params, replace=True)
    assert (tmp_path / "Model-1.csv").read_text().startswith("L2_strength,Train_Loss")


# ----------------------------------------------------------------------------------------- failures


class Remembers(NoTracker):
    """Remembers how a sweep ended."""

    status = "never begun"

    def begin(self, **_: object) -> set[str]:
        """See `Tracker`."""
        self.status = "RUNNING"
        return set()

    def end(self, status: str, **_: object) -> int:
        """See `Tracker`."""
        self.status = status
        return 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_sweep_is_killed_and_goes_on(
    tiny: Tiny, tmp_path: Path, done: Path, stop: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    folder, tracker = tmp_path / "r", Remembers()
    usual = Store.commit

    def stops_after_the_first(self: Store, record: artifacts.Record) -> None:
        usual(self, record)
        if record.l2 == 0.002:
            raise stop

    monkeypatch.setattr(Store, "commit", stops_after_the_first)
    with pytest.raises(stop):
        sweep(tiny(artifacts__out=str(folder)), tracker=tracker)
    monkeypatch.undo()

    assert tracker.status == "KILLED"
    assert sweep(tiny(artifacts__out=str(folder))).reused == 2
    assert contents(folder) == contents(done)


def test_too_many_pairs_are_refused_before_any_training(tiny: Tiny, tmp_path: Path):
    with pytest.raises(ParameterError, match="below the number of parameters, 6370, got 6370"):
        sweep(tiny(artifacts__out=str(tmp_path / "r"), spectrum__k=6370))

    assert not (tmp_path / "r").exists()


def test_a_disk_too_small_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tracker = Remembers()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: full)

    with pytest.raises(StorageError, match=r"3 strengths need .* 1 kB are free"):
        sweep(tiny(artifacts__out=str(tmp_path / "r")), tracker=tracker)

    assert tracker.status == "never begun"
    assert contents(tmp_path / "r") == {}
