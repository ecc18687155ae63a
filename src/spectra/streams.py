"""What a GPU does at once and in which order: streams, and graphs of many small operations.

The networks here are small: the GPU takes a few microseconds for most of their operations, the host
more to launch one. So what is done over and over is captured as a graph, what need not be waited
for goes into a second stream, and training goes before what others have waiting.

On a CPU there are no streams, and everything happens in its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def urgent_stream() -> torch.cuda.Stream:
    """A stream of a GPU whose small operations go before what others have waiting."""
    return torch.cuda.Stream(priority=-1)


def may_capture() -> bool:
    """Whether this thread may make a graph beside what others compute: the main one, which trains.

    To begin a capture is to wait for the whole GPU, and nobody may do that while another is under
    way. Threads that compute beside the training launch their operations one by one.
    """
    return threading.current_thread() is threading.main_thread()


class Graph(Generic[T]):
    """A function of a tensor on a GPU, captured once and replayed: nothing is launched one by one.

    It reads and writes the same memory every time and asks the host nothing meanwhile. See
    `may_capture`.

    Args:
        work: The function, of which only what it did is kept. First of all it is called once as
            it is, for libraries set themselves up in their first call.
        given: What it is called with while it is captured; all that follow are of its shape.
        urgent: Whether it goes before what others have waiting.
        unchanged: Tensors that have the same values afterwards as before.
    """

    def __init__(
        self,
        work: Callable[[Tensor], T],
        given: Tensor,
        *,
        urgent: bool = False,
        unchanged: Sequence[Tensor] = (),
    ) -> None:
        self._given = given.clone()
        before = [tensor.clone() for tensor in unchanged]
        current = torch.cuda.current_stream()
        stream = urgent_stream() if urgent else torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work(self._given)
        current.wait_stream(stream)
        for tensor, value in zip(unchanged, before, strict=True):
            tensor.copy_(value)
        self._graph = torch.cuda.CUDAGraph()
        # Others may use the GPU meanwhile: only this thread is held to what a graph allows.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._result = work(self._given)

    def replay(self, given: Tensor) -> T:
        """The function of another tensor, in the current stream; the next call writes it anew."""
        self._given.copy_(given)
        self._graph.replay()
        return self._result


class Aside:
    """A stream of a GPU beside the current one, for work whose results are needed later.

    On a CPU there is none, and work is done when it is given.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = urgent_stream() if device.type == "cuda" else None
        self._given: list[object] = []

    def do(self, work: Callable[[], T]) -> T:
        """Do some work beside what follows, and keep what it holds until `join`.

        Memory that it let go of before would be given to what follows, while it still reads it.
        """
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        self._given += [work, result]
        return result

    def join(self) -> None:
        """Let what follows wait for all that was given."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._given.clear()
