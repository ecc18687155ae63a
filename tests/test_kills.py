"""Kills at random moments: nothing is lost, no byte is wrong, no run is orphaned.

A process with everything imported forks a child for every kill; the child sweeps, with a strength
that diverges among the others, and is killed after a random while. What finishes before enough
kills were made is compared and begun anew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

root, scratch, migrated, tests, kills, seed = sys.argv[1:]
sys.path.insert(0, tests)

import mlflow.store.tracking.sqlalchemy_store  # what the first call to a store imports
from mlflow.tracking import MlflowClient
from conftest import tiny_params
from spectra import pipeline
from spectra.errors import DivergedError
from spectra.progress import Silent
from spectra.tracking import ENTRY, FAILURE, KIND, MlflowTracker, NoTracker

STRENGTHS = [i / 1000 for i in range(8)]
DIVERGES = 0.003
usual = pipeline.solve.optimise


def optimise(bench, starts, **named):
    outcomes = usual(bench, starts, **named)
    return [DivergedError("planted") if l2 == DIVERGES else outcome
            for (_, l2, _), outcome in zip(starts, outcomes)]


pipeline.solve.optimise = optimise


def forked(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def sweep(folder, database=None):
    params = tiny_params(
        Path(root), artifacts__out=str(folder), artifacts__eigenvectors="npy", sweep__ids=[1, 2],
        sweep__strengths=STRENGTHS, runtime__threads=2, tracking__enabled=database is not None,
    )
    tracker = NoTracker() if database is None else MlflowTracker(f"sqlite:///{database}", "k")
    pipeline.sweep(params, replace=False, draw=False, progress=Silent(), tracker=tracker)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def finished(files):
    return {name for name in files if name.startswith(("manifest-", "failed-"))}


def check_between(before, now, expected):
    lost = finished(before) - finished(now)
    assert not lost, f"lost: {lost}"
    for name in finished(now):
        assert now[name] == expected[name], f"wrong bytes: {name}"
        for file in json.loads(now[name])["files"]:
            assert now[file] == expected[file], f"wrong bytes: {file}"
    leftovers = {name for name in now if name not in expected}
    assert all(name.endswith(".partial") for name in leftovers), f"strays: {leftovers}"


def check_runs(database):
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("k").experiment_id
    found = client.search_runs([experiment], max_results=1000)
    (parent,) = (run for run in found if run.data.tags[KIND] == "sweep")
    children = [run for run in found if run is not parent]
    assert parent.info.status == "FINISHED", parent.info.status
    assert len(children) == 2 * len(STRENGTHS), len(children)
    assert len({run.data.tags[ENTRY] for run in children}) == len(children)
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        planted = run.data.metrics["l2"] == DIVERGES
        assert run.info.status == ("FAILED" if planted else "FINISHED"), run.info.status
        assert (run.data.tags.get(FAILURE) == "planted") == planted
        assert planted or len(client.list_artifacts(run.info.run_id)) >= 3


scratch = Path(scratch)
began = time.monotonic()
child = forked(lambda: sweep(scratch / "undisturbed"))
assert os.waitpid(child, 0)[1] == 0
whole = time.monotonic() - began
expected = contents(scratch / "undisturbed")
assert len(finished(expected)) == 2 * len(STRENGTHS)

moments, made, rounds = random.Random(int(seed)), 0, 0
while made < int(kills):
    folder, database = scratch / f"r{rounds}", scratch / f"{rounds}" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(migrated, database)
    files, ended = {}, False
    while not ended:
        child = forked(lambda: sweep(folder, database))
        if made < int(kills):
            time.sleep(moments.uniform(0, min(3.0, whole / 2)))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        ended = status == 0
        if not ended:
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            made += 1
        before, files = files, contents(folder)
        check_between(before, files, expected)
    assert files == expected
    check = forked(lambda: check_runs(database))
    assert os.waitpid(check, 0)[1] == 0, "runs"
    shutil.rmtree(folder)
    rounds += 1
print(json.dumps({"kills": made, "rounds": rounds, "seconds": time.monotonic() - began}))
"""


@pytest.mark.parametrize(
    ("kills", "seed"),
    [
        pytest.param(6, 1, marks=pytest.mark.timeout(240)),
        pytest.param(200, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_nothing_is_lost_and_no_byte_is_wrong(
    sample_root: Path, tmp_path: Path, migrated: Path, kills: int, seed: int
):
    words = (sample_root, tmp_path, migrated, Path(__file__).parent, kills, seed)

    done = subprocess.run(
        [sys.executable, "-c", _KILLS, *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    assert f'"kills": {kills}' in done.stdout
