"""Signals held back while something must not be left halfway.

Python lets a signal's exception out between any two instructions. Inside a database's transaction
that leaves the database locked, by a connection that nobody can reach any more, for as long as the
process lives: not even that it was interrupted can be written down then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler: TypeAlias = Callable[[int, FrameType | None], Any]


@contextmanager
def held_back() -> Iterator[None]:
    """Handle a signal that ends the process after the block; a second one at once.

    In a thread other than the main one nothing is done, for Python handles no signals there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    own: dict[int, _Handler] = {n: handler for n, handler in handlers.items() if callable(handler)}
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if waiting:
            own[number](number, frame)
        waiting.append(number)

    for number in own:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
        if waiting:
            own[waiting[0]](waiting[0], None)
