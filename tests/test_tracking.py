"""Tracking against a real SQLite store: what is logged, and what a kill can leave."""

from __future__ import annotations

import signal
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from spectra.errors import StorageError
from spectra.tracking import ENTRY, KIND, SWEEP, Logged, MlflowTracker, NoTracker


class Book:
    """A tracker on a database, and what stands in it."""

    def __init__(self, database: Path) -> None:
        self.uri = f"sqlite:///{database}"
        self.client = MlflowClient(self.uri)

    def tracker(self) -> MlflowTracker:
        """A tracker as a new process makes it."""
        return MlflowTracker(self.uri, "curves")

    def runs(self, kind: str | None = None) -> list[Run]:
        """The runs that are not deleted, in order of their start."""
        experiment = self.client.get_experiment_by_name("curves")
        assert experiment is not None
        query = "" if kind is None else f"tags.`{KIND}` = '{kind}'"
        found = self.client.search_runs([experiment.experiment_id], query, max_results=1000)
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_name))

    def statuses(self) -> list[str]:
        """Of all runs."""
        return [run.info.status for run in self.runs()]


@pytest.fixture
def book(database: Path) -> Book:
    return Book(database)


def begin(
    tracker: MlflowTracker, *, key: str = "k", fresh: bool = False, folder: str = "/f"
) -> set[str]:
    return tracker.begin(
        key=key, name="sweep", params={"train.lr": 0.5}, fresh=fresh,
        tags={"spectra.folder": folder},
    )  # fmt: skip


def strength(digest: str, **more: object) -> Logged:
    given = {"params": {"l2": 0.1}, "metrics": {"l2": 0.1, "loss": 0.5}} | more
    return Logged(name=f"strength {digest}", digest=digest, **given)


def test_a_sweep_is_a_parent_with_a_child_a_strength(book: Book, tmp_path: Path):
    (tmp_path / "values.csv").write_text("1.0\n")
    (tmp_path / "page.md").write_text("# page\n")
    tracker = book.tracker()

    assert begin(tracker) == set()
    for step, digest in enumerate("ab"):
        tracker.log(
            strength(
                digest, series={"epoch/loss": [3.0, 2.0, 1.0]}, files=[tmp_path / "values.csv"],
                tags={"mine": "yes"}, seconds=2.0,
                metrics={"l2": step / 10, "loss": 0.5 - step / 10, "eigenvalue_01": 7.0},
            ), step=step,
        )  # fmt: skip
    tracker.end("FINISHED", metrics={"strengths": 2}, files=[tmp_path / "page.md"])

    (parent,) = book.runs("sweep")
    a, b = book.runs("strength")
    assert book.statuses() == ["FINISHED"] * 3
    assert parent.info.run_name == "sweep"
    assert parent.data.params == {"train.lr": "0.5"}
    assert parent.data.tags[SWEEP] == "k"
    assert parent.data.metrics["strengths"] == 2
    assert "eigenvalue_01" not in parent.data.metrics
    shown = book.client.get_metric_history(parent.info.run_id, "loss")
    assert [(m.step, m.value) for m in shown] == [(0, 0.5), (1, 0.4)]
    files = book.client.list_artifacts(parent.info.run_id, "report")
    assert [file.path for file in files] == ["report/page.md"]
    for run, digest, l2 in ((a, "a", 0.0), (b, "b", 0.1)):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags[ENTRY] == digest
        assert run.data.tags["mine"] == "yes"
        assert run.data.params == {"l2": "0.1"}
        assert run.data.metrics["l2"] == l2
        assert run.data.metrics["eigenvalue_01"] == 7.0
        assert run.data.metrics["seconds"] == 2.0
        assert run.info.end_time - run.info.start_time >= 2000
        history = book.client.get_metric_history(run.info.run_id, "epoch/loss")
        assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
        assert [f.path for f in book.client.list_artifacts(run.info.run_id)] == ["values.csv"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("statement", [1, 5, 8, 9, 12])
def test_a_signal_within_a_transaction_leaves_no_lock(book: Book, statement: int):
    """Raised there, it left the database locked: the sweep stood there as running for good."""
    tracker = book.tracker()
    begin(tracker)
    seen = 0

    def interrupt(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            signal.raise_signal(signal.SIGINT)

    event.listen(Engine, "after_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            tracker.log(strength("a"), step=0)
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    tracker.end("KILLED", metrics={}, files=[])

    assert seen >= statement
    assert sorted(book.statuses()) == ["FINISHED", "KILLED"]


def test_numbers_that_are_not_finite_are_left_out(book: Book):
    tracker = book.tracker()
    nan, inf = float("nan"), float("inf")

    tracker.log(strength("a", metrics={"a": nan, "b": inf, "c": -inf, "d": 1}))

    (run,) = book.runs()
    assert run.data.metrics == {"d": 1.0}


def test_more_than_a_batch_of_numbers_is_logged_whole(book: Book):
    tracker = book.tracker()

    tracker.log(strength("a", series={"x": list(range(1500)), "y": [2.0]}))

    (run,) = book.runs()
    history = book.client.get_metric_history(run.info.run_id, "x")
    assert sorted(m.value for m in history) == list(range(1500))
    assert run.data.metrics["y"] == 2.0


def test_work_outside_a_sweep_is_a_run_of_its_own(book: Book):
    book.tracker().log(strength("a"), step=3)

    (run,) = book.runs()
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run.data.tags
    assert KIND not in run.data.tags


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_stopped_sweep_goes_on_in_the_same_parent(book: Book, status: str):
    first = book.tracker()
    begin(first, fresh=True)
    first.log(strength("a"), step=0)
    first.end(status, metrics={}, files=[])
    (parent,) = book.runs("sweep")
    assert parent.info.status == status

    second = book.tracker()
    assert begin(second) == {"a"}
    assert book.runs("sweep")[0].info.status == "RUNNING"
    second.log(strength("b"), step=1)
    second.end("FINISHED", metrics={}, files=[])

    (again,) = book.runs("sweep")
    assert again.info.run_id == parent.info.run_id
    assert book.statuses() == ["FINISHED"] * 3


def test_what_a_kill_left_is_put_right(book: Book):
    """The parent RUNNING, a child half-logged, and a child logged twice."""
    killed = book.tracker()
    begin(killed)
    killed.log(strength("a"), step=0)
    killed.log(strength("a"), step=0)
    parent = book.runs("sweep")[0].info
    tags = {"mlflow.parentRunId": parent.run_id, ENTRY: "b", KIND: "strength"}
    half = book.client.create_run(parent.experiment_id, run_name="half", tags=tags).info.run_id

    tracker = book.tracker()
    assert begin(tracker) == {"a"}

    assert [run.data.tags[ENTRY] for run in book.runs("strength")] == ["a"]
    assert book.client.get_run(half).info.lifecycle_stage == "deleted"
    tracker.log(strength("b"), step=1)
    tracker.end("FINISHED", metrics={}, files=[])
    assert book.statuses() == ["FINISHED"] * 3


def test_of_two_unfinished_parents_one_goes_on_and_none_keeps_running(book: Book):
    for _ in range(2):
        tracker = book.tracker()
        tracker._parent = tracker._create("sweep", {SWEEP: "k", KIND: "sweep"})

    tracker = book.tracker()
    begin(tracker)
    tracker.end("FINISHED", metrics={}, files=[])

    assert sorted(book.statuses()) == ["FINISHED", "KILLED"]


def test_a_finished_sweep_is_found_again_unless_its_results_are_gone(book: Book):
    for fresh, parents, known in ((True, 1, set()), (False, 1, {"a"}), (True, 2, set())):
        tracker = book.tracker()
        assert begin(tracker, fresh=fresh) == known
        if "a" not in known:
            tracker.log(strength("a"), step=0)
        tracker.end("FINISHED", metrics={}, files=[])
        assert len(book.runs("sweep")) == parents
    assert book.statuses() == ["FINISHED"] * 4


def test_sweeps_of_other_keys_are_apart(book: Book):
    first = book.tracker()
    begin(first, key="k")
    first.log(strength("a"), step=0)
    first.end("FINISHED", metrics={}, files=[])

    second = book.tracker()
    assert begin(second, key="other") == set()
    second.end("FINISHED", metrics={}, files=[])

    assert len(book.runs("sweep")) == 2


def test_a_sweep_killed_in_this_folder_with_other_parameters_stops_running(book: Book):
    """Its folder is held by this one now, so nothing of it is alive; another folder's may be."""
    begin(book.tracker(), key="before", folder="/f")
    begin(book.tracker(), key="elsewhere", folder="/g")

    tracker = book.tracker()
    begin(tracker, key="after", folder="/f")
    tracker.end("FINISHED", metrics={}, files=[])

    statuses = {run.data.tags[SWEEP]: run.info.status for run in book.runs("sweep")}
    assert statuses == {"before": "KILLED", "elsewhere": "RUNNING", "after": "FINISHED"}


# ---------------------------------------------------------------------------------- the store


def test_artifacts_go_beside_the_database(book: Book, tmp_path: Path):
    book.tracker()

    experiment = book.client.get_experiment_by_name("curves")
    assert experiment is not None
    assert experiment.artifact_location == (tmp_path / "mlruns" / "curves").as_uri()


def test_an_experiment_that_is_there_is_used(book: Book, tmp_path: Path):
    location = (tmp_path / "elsewhere").as_uri()
    made = book.client.create_experiment("curves", artifact_location=location)

    book.tracker().log(strength("a", files=[Path(__file__)]))

    assert book.runs()[0].info.experiment_id == made
    assert list((tmp_path / "elsewhere").rglob(Path(__file__).name))


def test_the_store_is_that_of_the_environment_or_of_the_folder(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert MlflowTracker(None, "x").where == "mlflow ui, experiment 'x'"

    other = database.rename(tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    tracker = MlflowTracker(None, "y")
    assert str(other) in tracker.where
    assert MlflowClient(f"sqlite:///{other}").get_experiment_by_name("y") is not None

    given = f"sqlite:///{other.rename(tmp_path / 'given.db')}"
    assert "given.db" in MlflowTracker(given, "z").where


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:////proc/nowhere/x.db", ""),
        ("sqlite:///{tmp}", "unable to open database file"),
        ("sqlite:///{tmp}/text.db", "file is not a database"),
        ("sqlite:///{tmp}/text.db/below.db", ""),
        ("magic://host", "unsupported URI"),
        ("{tmp}/mlruns", "maintenance mode"),
        ("mysql://user@localhost/x", "MySQLdb"),
    ],
)
@pytest.mark.timeout(30)
def test_a_store_that_cannot_be_opened_is_named_at_once(tmp_path: Path, uri: str, words: str):
    (tmp_path / "text.db").write_text("not a database, only text " * 99)
    uri = uri.format(tmp=tmp_path)

    with pytest.raises(StorageError) as caught:
        MlflowTracker(uri, "x")

    text = str(caught.value)
    assert text.startswith(f"the MLflow store {uri} cannot be opened: ")
    assert text.endswith("correct tracking.uri or switch tracking off with --no-track")
    assert words in text
    assert "\n" not in text


def test_a_store_of_another_version_is_named(database: Path, capfd: pytest.CaptureFixture[str]):
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("UPDATE alembic_version SET version_num = 'of-tomorrow'")
        opened.commit()

    with pytest.raises(StorageError, match="cannot be opened: "):
        MlflowTracker(f"sqlite:///{database}", "x")

    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_store_that_breaks_in_the_middle_is_said_in_one_line(
    book: Book, database: Path, capfd: pytest.CaptureFixture[str]
):
    tracker = book.tracker()
    begin(tracker)
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("DROP TABLE metrics")

        with pytest.raises(StorageError) as caught:
            tracker.log(strength("a"), step=0)

    text = str(caught.value)
    assert text.startswith("MLflow did not take a run: ")
    assert "the next run logs them, or switch tracking off with --no-track" in text
    assert "\n" not in text
    assert "Traceback" not in "".join(capfd.readouterr())


def test_no_tracker_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tracker = NoTracker()

    assert tracker.begin(key="k", fresh=True) == set()
    tracker.log(strength("a"))
    tracker.end("FINISHED", metrics={}, files=[])

    assert list(tmp_path.iterdir()) == []


def test_warnings_are_errors_here():
    """The filters of pyproject.toml let pass what third parties emit, and nothing else."""
    with pytest.raises(DeprecationWarning):
        warnings.warn("this is old", DeprecationWarning, stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("this is odd", UserWarning, stacklevel=1)
