"""A tracker that works in a thread of its own, so that training does not wait for it.

To log a run takes MLflow a tenth of a second, most of it in its database: as long as several epochs
take on a GPU. A run is handed over and logged in the order in which runs are handed over; only who
closes the sweep waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spectra.tracking import Logged, Tracker


class BackgroundTracker:
    """Logs to another tracker, one run after the other, beside what the caller does.

    What goes wrong there is raised by the next call.

    Args:
        tracker: The other one. It is called by one thread at a time.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracker")
        self._handed: deque[Future[None]] = deque()

    @property
    def where(self) -> str:
        """See `Tracker.where`."""
        return self._tracker.where

    def begin(self, **sweep: Any) -> set[str]:  # noqa: ANN401 - handed on as it is
        """See `Tracker.begin`."""
        return self._tracker.begin(**sweep)

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """See `Tracker.log`; returns at once."""
        while self._handed and self._handed[0].done():
            self._handed.popleft().result()
        self._handed.append(self._thread.submit(self._tracker.log, work, step=step))

    def end(self, status: str, *, metrics: Mapping[str, float], files: Sequence[Path]) -> int:
        """See `Tracker.end`; who is stopped waits only for the run that is being logged."""
        finished = status == "FINISHED"
        self._thread.shutdown(wait=True, cancel_futures=not finished)
        if finished:
            for handed in self._handed:
                handed.result()
        return self._tracker.end(status, metrics=metrics, files=files)
