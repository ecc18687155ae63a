"""Tracking: what a sweep tells MLflow, or nobody.

A sweep is a parent run; every finished strength is a child run. A child is created when its
strength is done and its files are on the disk, logged in one batch and ended, within a fraction
of a second: while a strength is being computed there is no child that a kill could orphan.
What a kill can leave is the parent RUNNING and at most one half-logged child. The next sweep
on the same folder finds its parent by a tag, deletes the half-logged child, logs whatever
finished without being logged, and goes on in the same parent. So each strength stands there
once, finished.

This file takes plain dictionaries and paths; it knows nothing of training or curvature.

Facts about MLflow that shaped it: a file store raises since 3.13, so the default is SQLite in
the working folder, where `mlflow ui` looks; the experiment is created here with an explicit
artifact location, because one that `mlflow ui` created first may refuse direct logging; single
metrics cost 24 ms each, a batch of two hundred 0.1 s.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spectra.errors import StorageError, UnreachableError
from spectra.interruption import held_back

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

SWEEP, ENTRY, KIND, FOLDER, FAILURE = (
    "spectra.sweep", "spectra.digest", "spectra.kind", "spectra.folder", "spectra.failure"
)  # fmt: skip
_PARENT = "mlflow.parentRunId"
_NOTE = (
    "One child run a strength. Here every metric has the strength's place in the sweep as its "
    "step. To plot against `l2` or to see more than ten strengths, select the children, choose "
    "*Show all runs* in the chart view, and compare."
)
_AWAY = ("database is locked", "connection refused", "timed out", "max retries", "unreachable")
"""What is said of a store that is right but cannot be had now."""
_TAG = 5000  # characters that a tag may have at least, whatever the store
_BATCH = 1000  # MLflow takes at most a thousand metrics a call


@dataclass(frozen=True)
class Logged:
    """A finished piece of work as a tracker sees it.

    Attributes:
        name: Shown for the run.
        digest: What the result is bound to; the run is recognised by it.
        params: `section.key -> value`.
        metrics: Final numbers; those that are not finite are left out.
        series: `name -> values`, one an epoch, steps from 1.
        files: Copied as artifacts.
        tags: Further tags.
        seconds: How long it took; None when it was computed by an earlier process.
        failure: Why it has no result; empty where it has one.
    """

    name: str
    digest: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    files: Sequence[Path] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""


class Tracker(Protocol):
    """Where runs are logged."""

    @property
    def where(self) -> str:
        """What to tell the user about where to look."""
        ...

    def begin(
        self,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        fresh: bool,
    ) -> set[str]:
        """Open or reopen a sweep; returns the digests of the strengths it already has.

        Args:
            key: Identifies the sweep: its parameters and its folder.
            name: Shown for the parent run.
            params: Of the sweep.
            tags: Of the parent run.
            fresh: Nothing of the sweep is on the disk, so an earlier, finished one is another.
        """
        ...

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """Log one finished piece of work: a child of the open sweep, or a run of its own.

        Args:
            work: What is logged.
            step: Its place in the sweep, under which the parent shows its progress.
        """
        ...

    def end(self, status: str, *, metrics: Mapping[str, float], files: Sequence[Path]) -> int:
        """Close the sweep as FINISHED, FAILED or KILLED.

        Returns:
            How many pieces of work could not be logged.
        """
        ...


class NoTracker:
    """Logs nothing."""

    where = "tracking is off"

    def begin(self, **_: object) -> set[str]:
        """Nothing is known of the sweep."""
        return set()

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """Nothing is logged."""

    def end(self, status: str, *, metrics: Mapping[str, float], files: Sequence[Path]) -> int:
        """Nothing is closed."""
        return 0


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what the store trips over in the middle of a sweep into one line with a remedy.

    A signal waits until the store has done what it was asked, or has said that it cannot: for a
    fraction of a second, longer where a server does not answer. A second signal does not wait.
    """
    try:
        with held_back():
            yield
    except Exception as error:
        from mlflow.exceptions import MlflowException

        if not isinstance(error, MlflowException | OSError):
            raise
        raise StorageError(
            f"MLflow did not take a run: {_first_line(error)}; finished strengths are kept, the "
            "next run logs them, or switch tracking off with --no-track"
        ) from None


class MlflowTracker:
    """Logs to MLflow.

    Args:
        uri: Tracking URI; None means `MLFLOW_TRACKING_URI`, else SQLite in the working folder.
        experiment: Its name; created if it is not there.

    Raises:
        StorageError: The store cannot be opened.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # A server that does not answer is to be told of in seconds, not after minutes of retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        _quiet_migrations()
        from mlflow.tracking import MlflowClient

        chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        try:
            _probe(chosen)
            self._client: MlflowClient = MlflowClient(tracking_uri=chosen)
            self._experiment = self._find_or_create(experiment, chosen)
        except Exception as error:  # of MLflow, SQLAlchemy, a driver that is missing
            said = _first_line(error)
            away = any(words in said.lower() for words in _AWAY)
            raise (UnreachableError if away else StorageError)(
                f"the MLflow store {chosen} cannot be opened: {said}; correct "
                "tracking.uri or switch tracking off with --no-track"
            ) from None
        local = chosen.startswith("sqlite:///")
        look = (
            "mlflow ui"
            if chosen == "sqlite:///mlflow.db"
            else f"mlflow ui --backend-store-uri {chosen}"
            if local
            else chosen
        )
        self.where = f"{look}, experiment '{experiment}'"
        self._parent: str | None = None
        self._half: str | None = None  # a run that was begun and not ended

    @_explained()
    def begin(
        self,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        fresh: bool,
    ) -> set[str]:
        """See `Tracker.begin`."""
        parents = self._search(f"tags.`{SWEEP}` = '{key}' AND tags.`{KIND}` = 'sweep'")
        # The caller holds the folder: what still runs there with other parameters was killed.
        for run in self._search(f"tags.`{KIND}` = 'sweep' AND attributes.status = 'RUNNING'"):
            same = FOLDER in tags and run.data.tags.get(FOLDER) == tags[FOLDER]
            if same and run.data.tags.get(SWEEP) != key:
                self._client.set_terminated(run.info.run_id, "KILLED")
        unfinished = [run for run in parents if run.info.status != "FINISHED"]
        candidates = unfinished or ([] if fresh else parents)
        if not candidates:
            marks = {SWEEP: key, KIND: "sweep", "mlflow.note.content": _NOTE}
            self._parent = self._create(name, {**tags, **marks})
            self._log_params(self._parent, params)
            return set()
        parent, *others = candidates
        for other in others:
            if other.info.status == "RUNNING":
                self._client.set_terminated(other.info.run_id, "KILLED")
        self._parent = parent.info.run_id
        self._client.update_run(self._parent, status="RUNNING")
        done: set[str] = set()
        for child in self._search(f"tags.`{_PARENT}` = '{self._parent}'"):
            digest = child.data.tags.get(ENTRY, "")
            whole = child.info.status == "FINISHED" or (
                child.info.status == "FAILED" and FAILURE in child.data.tags
            )
            if whole and digest not in done:
                done.add(digest)
            else:
                self._client.delete_run(child.info.run_id)
        return done

    @_explained()
    def log(self, work: Logged, *, step: int | None = None) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        start = now - int(1000 * (work.seconds or 0))
        tags = {**work.tags, ENTRY: work.digest}
        if work.failure:
            tags |= {FAILURE: work.failure[:_TAG], "mlflow.note.content": work.failure[:_TAG]}
        if self._parent is not None:
            tags |= {_PARENT: self._parent, KIND: "strength"}
        if self._half is not None:
            self._client.delete_run(self._half)
        run = self._half = self._create(work.name, tags, start=start)
        final = {k: float(v) for k, v in work.metrics.items() if abs(float(v)) < float("inf")}
        if work.seconds is not None:
            final["seconds"] = work.seconds
        metrics = [Metric(k, v, now, 0) for k, v in final.items()]
        metrics += [
            Metric(name, float(value), now, epoch)
            for name, values in work.series.items()
            for epoch, value in enumerate(values, start=1)
        ]
        self._log_params(run, work.params)
        for i in range(0, len(metrics), _BATCH):
            self._client.log_batch(run, metrics=metrics[i : i + _BATCH])
        for path in work.files:
            self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, "FAILED" if work.failure else "FINISHED")
        self._half = None
        if self._parent is not None and step is not None:
            shown = [Metric(k, v, now, step) for k, v in final.items() if "eigenvalue" not in k]
            self._client.log_batch(self._parent, metrics=shown)

    @_explained()
    def end(self, status: str, *, metrics: Mapping[str, float], files: Sequence[Path]) -> int:
        """See `Tracker.end`."""
        from mlflow.entities import Metric

        assert self._parent is not None
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._parent, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()]
        )
        for path in files:
            self._client.log_artifact(self._parent, str(path), "report")
        self._client.set_terminated(self._parent, status)
        self._parent = None
        return 0

    def _find_or_create(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            location = (database.parent / "mlruns" / name.replace("/", "_")).as_uri()
        # The kind makes the interface open on runs and charts, not on language-model traces.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(name, artifact_location=location, tags=tags))

    def _create(self, name: str, tags: Mapping[str, str], start: int | None = None) -> str:
        run = self._client.create_run(
            self._experiment,
            run_name=name,
            tags={"mlflow.source.name": "spectra", "mlflow.source.type": "LOCAL", **tags},
            start_time=start,
        )
        return str(run.info.run_id)

    def _log_params(self, run: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)) for key, value in params.items()]
        self._client.log_batch(run, params=entries)

    def _search(self, query: str) -> list[Run]:
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment], query, max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _probe(uri: str) -> None:
    """Fail at once where SQLite cannot be opened: MLflow tries for a hundred seconds, loudly."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    if uri.startswith("sqlite:///") and name:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(name)) as database:
            database.execute("PRAGMA schema_version")


def _quiet_migrations() -> None:
    """Keep the store's schema migrations from writing forty lines at the first run.

    Nor shall the store write the traceback of an error that it then raises.
    """
    import logging

    for name in ("alembic", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
