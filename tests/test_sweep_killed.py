"""A sweep that is killed, however often and whenever, ends as one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from conftest import Command, tiny_params
from snapshots import contents
from spectra import pipeline
from spectra.progress import Silent
from spectra.tracking import ENTRY, KIND, NoTracker

STRENGTHS = [i / 1000 for i in range(10)]


def undisturbed(root: Path, folder: Path, strengths: list[float]) -> dict[str, bytes]:
    """The files of the same sweep, done in one go by this process."""
    params = tiny_params(
        root, artifacts__out=str(folder), artifacts__eigenvectors="npy", sweep__strengths=strengths
    )
    pipeline.sweep(params, replace=False, draw=False, progress=Silent(), tracker=NoTracker())
    return contents(folder)


def check_runs(database: Path, folder: Path, count: int) -> None:
    """One parent, every strength once, all of them finished."""
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("spectra")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in found} == {"FINISHED"}
    (parent,) = (run for run in found if run.data.tags[KIND] == "sweep")
    children = [run for run in found if run is not parent]
    assert len(found) == count + 1
    assert len({run.data.tags[ENTRY] for run in children}) == count
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert all("lambda_min" in run.data.metrics for run in children)
    for run in children:
        assert len(client.list_artifacts(run.info.run_id)) == 4
    assert parent.data.tags["spectra.folder"] == str(folder)


@pytest.mark.timeout(240)
def test_killed_at_random_moments_it_ends_the_same(
    command: Command, sample_root: Path, tmp_path: Path
):
    words = ("sweep", "--no-report", "--strengths", ",".join(map(str, STRENGTHS)))
    moments, kills = random.Random(20), 0  # noqa: S311 - not for secrets
    expected = undisturbed(sample_root, tmp_path / "undisturbed", STRENGTHS)

    while kills < 5:
        running = command.start(*words)
        assert running.stderr is not None
        lines = moments.choice([1, 2])  # the announcement after its imports, and a strength
        while lines and running.stderr.readline():
            lines -= 1
        time.sleep(moments.uniform(0, 0.2))
        running.kill()
        _, rest = running.communicate(timeout=30)
        if running.returncode == 0:
            break
        assert running.returncode == -9, rest
        kills += 1
    last = command(*words)

    assert kills == 5
    assert last.returncode == 0, last.stderr
    assert contents(tmp_path / "test_data") == expected
    check_runs(tmp_path / "mlflow.db", tmp_path / "test_data", len(STRENGTHS))


# Forks a child for every moment, which kills itself there: before or after a file gets its name,
# or a call to the store. The parent's imports are shared, so a kill costs half a second.
_EVERY_MOMENT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from conftest import tiny_params
from mlflow.tracking import MlflowClient
from spectra import pipeline
from spectra.progress import Silent
from spectra.tracking import MlflowTracker

root, folder, database, _, step = sys.argv[1:]
count, fatal = 0, 0

def moment():
    global count
    count += 1
    if count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(owner, name):
    usual = getattr(owner, name)
    def call(*given, **named):
        moment()
        result = usual(*given, **named)
        moment()
        return result
    setattr(owner, name, call)

watched(Path, "replace")
for name in ("create_run", "log_batch", "log_artifact", "set_terminated", "update_run",
             "delete_run"):
    watched(MlflowClient, name)
params = tiny_params(Path(root), artifacts__out=folder, artifacts__eigenvectors="npy",
                     sweep__strengths=[0.0, 0.01], tracking__enabled=True)
kills = 0
while True:
    # The moment moves on while nothing gets finished, so that the sweep cannot stand still.
    fatal = 1 + kills * int(step) % 41
    child = os.fork()
    if child == 0:
        pipeline.sweep(params, replace=False, draw=False, progress=Silent(),
                       tracker=MlflowTracker("sqlite:///" + database, "spectra"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
    assert kills < 200
print(kills)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", [1, 3, 7, 12])
def test_killed_between_any_two_steps_it_ends_the_same(
    sample_root: Path, tmp_path: Path, database: Path, step: int
):
    strengths = [0.0, 0.01]
    expected = undisturbed(sample_root, tmp_path / "undisturbed", strengths)
    here = Path(__file__).parent

    done = subprocess.run(
        [sys.executable, "-c", _EVERY_MOMENT, str(sample_root), str(tmp_path / "r"),
         str(database), str(here), str(step)], capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    assert contents(tmp_path / "r") == expected
    check_runs(database, tmp_path / "r", len(strengths))
