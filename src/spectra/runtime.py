"""Device, dtype, threads and seeds: what can change the last bits of a result.

Every random draw comes from a generator made here from the seed and a key that says what the
draw is for: the replicate, the purpose, the strength. A draw therefore depends on nothing that
ran before it, which is what makes a resumed sweep equal to an undisturbed one and a replicate
independent of the others. The global generators are seeded too, for what others may call.

Thread counts are a parameter: summation order, and with it the last bit, depends on them.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from spectra.errors import ParameterError

S = TypeVar("S")
T = TypeVar("T")

_PURPOSES = {"weights": 0, "batches": 1, "lanczos": 2, "certificate": 3, "polish": 4}


@dataclass(frozen=True)
class Runtime:
    """Where tensors live and what they are made of."""

    device: torch.device
    dtype: torch.dtype


def prepare(*, seed: int, device: str, dtype: str, threads: int) -> Runtime:
    """Set up this process: threads, determinism, denormals, global seeds.

    Args:
        seed: Of the global generators of Python, NumPy, PyTorch and CUDA.
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        dtype: "float32" or "float64".
        threads: Of the linear algebra on the CPU.

    Raises:
        ParameterError: CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ParameterError(
            "runtime.device: 'cuda' was asked for but PyTorch sees no CUDA device here; "
            "use cpu or auto"
        )
    # Weights of dead inputs decay into denormals under L2 and slow a CPU several times over.
    # Threads of the pool inherit the mode, so it is set before the pool exists.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy global one is what is meant
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN finds bugs of the framework, at a third of a step's time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    chosen = "cuda" if device == "cuda" or (device == "auto" and available) else "cpu"
    return Runtime(torch.device(chosen), getattr(torch, dtype))


def alone() -> None:
    """Set up a thread that does its linear algebra by itself, beside others that do the same.

    PyTorch gives a thread, when that first computes, the number that any thread has set last. It is
    asked for before it is set, so that this is over: whoever sets another in between would give
    this thread two for good, which sum in another order.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@cache
def own_threads(count: int) -> ThreadPoolExecutor:
    """Threads each of which does its linear algebra alone; those of a count are made once."""
    return ThreadPoolExecutor(count, thread_name_prefix="alone", initializer=alone)


def shares(items: Sequence[S], count: int) -> list[Sequence[S]]:
    """Things divided among so many, in their order; fewer shares where there are fewer things."""
    size = max(1, -(-len(items) // count))
    return [items[i : i + size] for i in range(0, len(items), size)]


def of_each(work: Callable[[S], T], members: Sequence[S], *, alone: bool) -> list[T]:
    """Some work on every member, by a thread of its own that works alone, or one after the other.

    Threads that meet at the end of every small operation would stand still whenever another
    program took one core for a moment; those that work alone do not wait for each other.
    """
    return list(own_threads(len(members)).map(work, members) if alone else map(work, members))


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=alone)


def ahead(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Some work on each, the next being done by another thread while a result is used."""
    following: Future[T] | None = None
    for item in items:
        ready, following = following, _helper().submit(work, item)
        if ready is not None:
            yield ready.result()
    if following is not None:
        yield following.result()


def prepare_thread(machine: Runtime) -> None:
    """Set up a thread that computes beside others: alone, and on a GPU in a stream of its own."""
    alone()
    if machine.device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it for later.

    glibc keeps what a thread has freed for that thread; what spectra need for a moment would add up
    to a third of a sweep's memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Linear algebra with so many threads, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generator(seed: int, replicate: int, purpose: str, l2: float = 0.0) -> torch.Generator:
    """The generator for one purpose ("weights", "batches", "lanczos") of one replicate.

    The strength enters by its bits, not by its place in a grid, so that the same strength
    draws the same numbers in every grid.
    """
    (bits,) = struct.unpack(">Q", struct.pack(">d", l2))
    sequence = np.random.SeedSequence(seed, spawn_key=(replicate, _PURPOSES[purpose], bits))
    (state,) = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
