"""Where the spectra of finished strengths are computed while the chain trains on.

A strength's training needs the weights of the one before it; its spectrum and files need nothing
but its own weights. So the chain is trained in the calling thread, and the rest of a strength is
handed to worker threads: PyTorch lets go of the interpreter while it computes, and the data set
lies in memory once. How the work is divided changes no number, only when it is done.

Workers stop when the sweep does: at every Hessian product they ask whether they should.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Abandoned(Exception):  # noqa: N818 - nothing went wrong
    """The sweep that wanted this work has ended."""


class Workers:
    """Threads for work that nothing waits for yet; with none, work is done where it is given.

    Args:
        count: How many pieces of work are under way at a time.
        prepare: Called once in every thread.
    """

    def __init__(self, count: int, prepare: Callable[[], None] = lambda: None) -> None:
        self.count = count
        self._ended = threading.Event()
        self._pool = (
            ThreadPoolExecutor(count, thread_name_prefix="spectrum", initializer=prepare)
            if count
            else None
        )

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have a piece of work done; its result or its exception is in what is returned."""
        if self._pool:
            return self._pool.submit(work)
        done: Future[T] = Future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    def check(self) -> None:
        """Called by work in progress.

        Raises:
            Abandoned: The sweep has ended.
        """
        if self._ended.is_set():
            raise Abandoned

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
