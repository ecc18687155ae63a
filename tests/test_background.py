"""Logging beside the work: in order, by one thread, and who closes the sweep waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from spectra.background import BackgroundTracker
from spectra.errors import StorageError
from spectra.patience import PatientTracker
from spectra.tracking import KIND, Logged, MlflowTracker


class Slow:
    """A tracker that logs when it is let."""

    where = "here"

    def __init__(self) -> None:
        self.may, self.at_work = threading.Event(), threading.Event()
        self.logged: list[tuple[str, int | None]] = []
        self.threads: set[int] = set()
        self.ended = ""

    def begin(self, **_: object) -> set[str]:
        """See `Tracker`."""
        return {"known"}

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """See `Tracker`."""
        self.at_work.set()
        assert self.may.wait(60)
        if work.digest == "bad":
            raise StorageError("disk full")
        self.threads.add(threading.get_ident())
        self.logged.append((work.digest, step))

    def end(self, status: str, **_: object) -> int:
        """See `Tracker`."""
        self.ended = status
        return len(self.logged)


def work(digest: str) -> Logged:
    return Logged(name=digest, digest=digest, params={"p": 1}, metrics={"m": 1.0})


def begin(tracker: BackgroundTracker) -> set[str]:
    return tracker.begin(key="k", name="n", params={}, tags={}, fresh=True)


def test_logging_is_not_waited_for_and_keeps_its_order():
    store = Slow()
    tracker = BackgroundTracker(store)
    assert begin(tracker) == {"known"}
    assert tracker.where == "here"

    for step, digest in enumerate("abcde"):
        tracker.log(work(digest), step=step)  # would wait for ever, were it waited for
    assert store.logged == []
    store.may.set()

    assert tracker.end("FINISHED", metrics={}, files=[]) == 5
    assert store.logged == [("a", 0), ("b", 1), ("c", 2), ("d", 3), ("e", 4)]
    assert len(store.threads) == 1
    assert threading.get_ident() not in store.threads


def test_who_is_stopped_waits_for_the_run_that_is_being_logged_and_no_other():
    store = Slow()
    tracker = BackgroundTracker(store)
    for digest in "abc":
        tracker.log(work(digest))
    assert store.at_work.wait(60)
    threading.Timer(0.2, store.may.set).start()

    tracker.end("KILLED", metrics={}, files=[])

    assert store.logged == [("a", None)]
    assert store.ended == "KILLED"


@pytest.mark.parametrize("then", ["log", "end"])
def test_what_goes_wrong_there_is_raised_by_the_next_call(then: str):
    store = Slow()
    store.may.set()
    tracker = BackgroundTracker(store)
    tracker.log(work("bad"))
    tracker._handed[0].exception(60)

    with pytest.raises(StorageError, match="disk full"):
        if then == "log":
            tracker.log(work("a"))
        else:
            tracker.end("FINISHED", metrics={}, files=[])


def test_a_sweep_that_fails_for_what_went_wrong_there_is_closed():
    store = Slow()
    store.may.set()
    tracker = BackgroundTracker(store)
    tracker.log(work("bad"))

    tracker.end("FAILED", metrics={}, files=[])

    assert store.ended == "FAILED"


def test_mlflow_takes_runs_from_a_thread_of_its_own(database: Path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{database}"
    tracker = BackgroundTracker(PatientTracker(lambda: MlflowTracker(uri, "e"), lambda _: None))
    begin(tracker)
    for step, digest in enumerate("abc"):
        tracker.log(work(digest), step=step)
    assert tracker.end("FINISHED", metrics={"strengths": 3}, files=[]) == 0

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    children = [run for run in runs if run.data.tags[KIND] == "strength"]
    assert sorted(run.info.run_name for run in children) == ["a", "b", "c"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = (run for run in runs if run.data.tags[KIND] == "sweep")
    steps = [entry.step for entry in client.get_metric_history(parent.info.run_id, "m")]
    assert steps == [0, 1, 2]
