"""Workers: work is done beside the caller or in place, and stops when the sweep ends."""

from __future__ import annotations

import threading
import time

import pytest

from spectra.executors import Abandoned, Workers


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_and_errors_come_back_in_futures(count: int):
    def fails() -> int:
        raise ValueError("seven")

    with Workers(count) as workers:
        good, bad = workers.submit(lambda: 7), workers.submit(fails)

        assert good.result() == 7
        with pytest.raises(ValueError, match="seven"):
            bad.result()


def test_without_threads_work_is_done_where_it_is_given():
    with Workers(0) as workers:
        future = workers.submit(threading.get_ident)

        assert future.done()
        assert future.result() == threading.get_ident()


def test_threads_are_prepared_once_each_and_work_side_by_side():
    """Two pieces of work that wait for each other can only end together."""
    prepared: list[int] = []
    both = threading.Barrier(2, timeout=20)
    with Workers(2, lambda: prepared.append(threading.get_ident())) as workers:
        futures = [workers.submit(both.wait) for _ in range(2)]
        assert {future.result() for future in futures} == {0, 1}

    assert len(prepared) == len(set(prepared)) == 2
    assert threading.get_ident() not in prepared


def test_what_is_under_way_is_abandoned_when_the_sweep_ends():
    """At its next product; what has not begun never does."""
    began, later = threading.Event(), []

    def work() -> None:
        began.set()
        while True:
            workers.check()
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt), Workers(1) as workers:
        running, waiting = workers.submit(work), workers.submit(lambda: later.append(1))
        assert began.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(Abandoned):
        running.result(timeout=20)
    assert waiting.cancelled()
    assert later == []


def test_work_is_not_abandoned_before():
    with Workers(1) as workers:
        assert workers.submit(workers.check).result(timeout=20) is None
