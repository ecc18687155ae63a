"""A store of runs that refuses: nothing of a sweep waits for it, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectra.errors import StorageError, UnreachableError
from spectra.patience import PatientTracker
from spectra.tracking import Logged


class Moody:
    """A tracker that refuses while it is told to."""

    where = "here"

    def __init__(self) -> None:
        self.refuses = False
        self.logged: list[tuple[str, int | None]] = []
        self.begun = self.attempts = 0
        self.ended = ""

    def _may(self) -> None:
        self.attempts += 1
        if self.refuses:
            raise StorageError("database is locked")

    def begin(self, **_: object) -> set[str]:
        """See `Tracker`."""
        self._may()
        self.begun += 1
        return {"known"}

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """See `Tracker`."""
        self._may()
        self.logged.append((work.digest, step))

    def end(self, status: str, **_: object) -> int:
        """See `Tracker`."""
        self._may()
        self.ended = status
        return 0


def work(digest: str) -> Logged:
    return Logged(name=digest, digest=digest, params={}, metrics={})


def begin(tracker: PatientTracker) -> set[str]:
    return tracker.begin(key="k", name="n", params={}, tags={}, fresh=True)


def end(tracker: PatientTracker, status: str = "FINISHED") -> int:
    return tracker.end(status, metrics={}, files=[])


def test_a_willing_store_is_told_at_once():
    store, said = Moody(), []
    tracker = PatientTracker(lambda: store, said.append)

    assert begin(tracker) == {"known"}
    tracker.log(work("a"), step=3)

    assert store.logged == [("a", 3)]
    assert end(tracker) == 0
    assert store.ended == "FINISHED"
    assert said == []
    assert tracker.where == "here"


def test_what_was_refused_is_logged_in_order_when_the_store_is_back():
    store, said = Moody(), []
    tracker = PatientTracker(lambda: store, said.append, pause=0)
    begin(tracker)
    store.refuses = True
    for i, digest in enumerate("abc"):
        tracker.log(work(digest), step=i)
    assert store.logged == []

    store.refuses = False
    tracker.log(work("d"), step=3)

    assert store.logged == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert said == [
        "not logged for now: database is locked",
        "MLflow is back, everything is logged",
    ]
    assert end(tracker) == 0


def test_a_store_that_refuses_to_the_end_is_counted():
    store, said = Moody(), []
    tracker = PatientTracker(lambda: store, said.append)
    begin(tracker)
    store.refuses = True
    tracker.log(work("a"))
    tracker.log(work("b"))

    assert end(tracker) == 2
    assert len(said) == 1


def test_a_store_that_refuses_only_the_end_is_counted_too():
    """The parent run would stay running; the next sweep puts it right."""
    store = Moody()
    tracker = PatientTracker(lambda: store, lambda _: None)
    begin(tracker)
    tracker.log(work("a"))
    store.refuses = True

    assert end(tracker) == 1


def test_a_refusal_is_not_asked_again_before_the_pause():
    store = Moody()
    tracker = PatientTracker(lambda: store, lambda _: None, pause=1000)
    begin(tracker)
    store.refuses = True
    for digest in "abcdef":
        tracker.log(work(digest))

    assert store.attempts == 2  # the beginning, and the first refusal


def test_a_store_that_cannot_be_reached_at_first_is_opened_later():
    store, away, said = Moody(), [True], []

    def opened() -> Moody:
        if away[0]:
            raise UnreachableError("connection refused")
        return store

    tracker = PatientTracker(opened, said.append, pause=0)
    assert begin(tracker) == set()
    tracker.log(work("known"))
    tracker.log(work("a"), step=1)
    away[0] = False
    tracker.log(work("b"), step=2)

    assert store.begun == 1
    assert store.logged == [("a", 1), ("b", 2)]  # what the store has already is not logged twice
    assert end(tracker) == 0
    assert said[0] == "not logged for now: connection refused"


def test_a_store_that_is_wrong_is_refused_at_once():
    def opened() -> Moody:
        raise StorageError("no such scheme")

    with pytest.raises(StorageError, match="no such scheme"):
        PatientTracker(opened, lambda _: None)


def test_who_is_stopped_does_not_wait_for_the_store():
    store = Moody()
    tracker = PatientTracker(lambda: store, lambda _: None, pause=1000)
    begin(tracker)
    store.refuses = True
    tracker.log(work("a"))
    store.refuses = False

    end(tracker, "KILLED")

    assert store.logged == []
    assert store.ended == "KILLED"


@pytest.mark.parametrize("fails_at", ["log_batch", "log_artifact", "set_terminated"])
def test_a_run_that_is_half_logged_is_not_left_beside_the_whole_one(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
):
    from mlflow.tracking import MlflowClient

    from spectra.tracking import ENTRY, MlflowTracker

    uri, file = f"sqlite:///{database}", tmp_path / "file"
    file.write_text("content")
    inner = MlflowTracker(uri, "e")
    tracker = PatientTracker(lambda: inner, lambda _: None, pause=0)
    begin(tracker)
    usual: Callable[..., Any] = getattr(MlflowClient, fails_at)

    def once(self: MlflowClient, *given: object, **named: object) -> object:
        monkeypatch.setattr(MlflowClient, fails_at, usual)
        raise OSError("no space left")

    monkeypatch.setattr(MlflowClient, fails_at, once)
    tracker.log(Logged(name="a", digest="a", params={"p": 1}, metrics={"m": 1.0}, files=[file]))
    tracker.log(Logged(name="b", digest="b", params={"p": 1}, metrics={"m": 1.0}, files=[file]))
    assert end(tracker) == 0

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    children = [r for r in client.search_runs([experiment]) if ENTRY in r.data.tags]
    assert sorted(run.data.tags[ENTRY] for run in children) == ["a", "b"]
    assert {run.info.status for run in children} == {"FINISHED"}
