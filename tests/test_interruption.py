"""Signals that come in the middle: they wait for the end of it, and are not lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from signal import raise_signal
from types import FrameType

import pytest

from spectra.interruption import held_back


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals that reach handlers of SIGINT and SIGTERM that end nothing."""
    heard: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_for_the_end(told: list[int]):
    with held_back():
        raise_signal(signal.SIGTERM)
        assert told == []

    assert told == [signal.SIGTERM]
    raise_signal(signal.SIGINT)
    assert told == [signal.SIGTERM, signal.SIGINT]


def test_a_second_signal_does_not_wait(told: list[int]):
    with held_back():
        raise_signal(signal.SIGINT)
        raise_signal(signal.SIGINT)
        assert told == [signal.SIGINT]


@pytest.mark.usefixtures("interruptible")
def test_what_a_handler_raises_comes_out_of_the_block():
    with pytest.raises(KeyboardInterrupt), held_back():
        raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_is_not_lost_where_the_block_fails():
    with pytest.raises(KeyboardInterrupt), held_back():
        raise_signal(signal.SIGINT)
        raise ValueError


def test_a_signal_that_is_ignored_stays_so(told: list[int]):
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back():
        raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, handler)

    assert told == []


def test_other_threads_leave_signals_alone():
    done: list[str] = []

    def work() -> None:
        with held_back():
            done.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert done == ["done"]
