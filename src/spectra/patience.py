"""A tracker that bears with its store: what cannot be logged now is logged later.

Results are on the disk before they are logged, so a store that is locked, full or away costs a
sweep nothing but its runs, and those only until it is back. What it did not take is kept in order
and offered again, at first with every strength, after a refusal not before a minute has passed: a
server that does not answer takes its time to say so. What is left at the end the next sweep logs,
which finds the results on the disk and no run of theirs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra.errors import StorageError, UnreachableError
from spectra.tracking import Logged, Tracker

_PAUSE = 60.0
"""Seconds between attempts at a store that refused."""


class PatientTracker:
    """Logs to another tracker when that can be had.

    Args:
        opened: Opens the other tracker.
        say: Told once that something is not logged, and once that all is.
        pause: Seconds between attempts after a refusal.

    Raises:
        StorageError: The other tracker cannot be opened, now or later.
    """

    def __init__(
        self, opened: Callable[[], Tracker], say: Callable[[str], None], pause: float = _PAUSE
    ) -> None:
        self._opened, self._say, self._pause = opened, say, pause
        self._tracker: Tracker | None = None
        self._sweep: dict[str, Any] | None = None
        self._begun = False
        self._known: set[str] = set()
        self._waiting: deque[tuple[Logged, int | None]] = deque()
        self._again = 0.0
        self.where = "MLflow could not be reached"
        self._attempt(lambda: None)

    def begin(self, **sweep: Any) -> set[str]:  # noqa: ANN401 - handed on as it is
        """See `Tracker.begin`; where the store cannot be had, nothing of the sweep is known yet."""
        self._sweep = sweep
        self._attempt(lambda: None)
        return self._known

    def log(self, work: Logged, *, step: int | None = None) -> None:
        """See `Tracker.log`."""
        self._waiting.append((work, step))
        if time.monotonic() >= self._again:
            self._attempt(self._drain)

    def end(self, status: str, *, metrics: Mapping[str, float], files: Sequence[Path]) -> int:
        """See `Tracker.end`."""

        def close() -> None:
            if status == "FINISHED":  # who is stopped does not wait
                self._drain()
            assert self._tracker is not None
            if self._sweep is not None:
                self._tracker.end(status, metrics=metrics, files=files)

        self._attempt(close)
        return len(self._waiting) or int(self._again > 0)

    def _drain(self) -> None:
        """Log what waits, in order."""
        assert self._tracker is not None
        while self._waiting:
            work, step = self._waiting[0]
            if work.digest not in self._known:
                self._tracker.log(work, step=step)
            self._waiting.popleft()

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do something with the other tracker, opening it and the sweep first where need be."""
        try:
            if self._tracker is None:
                self._tracker = self._opened()
                self.where = self._tracker.where
            if self._sweep is not None and not self._begun:
                self._known = self._tracker.begin(**self._sweep)
                self._begun = True
            work()
        except StorageError as error:
            if self._tracker is None and not isinstance(error, UnreachableError):
                raise
            if not self._again:
                self._say(f"not logged for now: {error}")
            self._again = time.monotonic() + self._pause
        else:
            if self._again and not self._waiting:
                self._say("MLflow is back, everything is logged")
            self._again = 0.0
