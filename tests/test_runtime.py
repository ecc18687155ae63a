"""Seeds that depend on what a draw is for and nothing else; a process set up as asked."""

from __future__ import annotations

import ctypes
import math
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from spectra.errors import ParameterError
from spectra.runtime import (
    ahead,
    alone,
    generator,
    of_each,
    prepare,
    return_memory,
    shares,
    threads,
)


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `prepare` sets is the process's; put back what other tests rely on."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads, fill = (
        torch.get_num_threads(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def numbers(*key: object) -> tuple[int, ...]:
    draws = torch.randint(0, 2**62, (4,), generator=generator(*key))
    return tuple(draws.tolist())


def test_a_draw_depends_on_its_key_alone():
    """Neither global seeds nor draws made before change it."""
    first = numbers(3, 2, "batches", 0.045)
    torch.manual_seed(1)
    numbers(3, 2, "weights", 0.1)
    np.random.default_rng(0).random(7)

    assert numbers(3, 2, "batches", 0.045) == first


def test_the_streams_are_those_of_every_version():
    """Pinned: a change here changes every result that was ever written."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", 0.045))
    (state,) = np.random.SeedSequence(3, spawn_key=(2, 1, bits)).generate_state(1, np.uint64)

    assert generator(3, 2, "batches", 0.045).initial_seed() == int(state) // 2
    assert generator(0, 1, "weights").initial_seed() == 2333092236187763913


def test_every_part_of_the_key_makes_another_stream():
    """Seeds, replicates, purposes and strengths, down to the last bit of one."""
    strengths = (0.0, 0.3, math.nextafter(0.3, 1), 1e-9)
    keys = list(product((0, 1, 2**31), (0, 1, 2), ("weights", "batches", "lanczos"), strengths))

    assert len({numbers(*key) for key in keys}) == len(keys) == 108


def test_the_default_strength_is_zero():
    assert numbers(0, 1, "weights") == numbers(0, 1, "weights", 0.0)


def test_an_unknown_purpose_is_an_error():
    with pytest.raises(KeyError):
        generator(0, 1, "lottery")


@pytest.mark.usefixtures("restored")
def test_prepare_sets_up_the_process():
    """Threads, determinism, no TF32, and denormals that really become zero."""
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-30])
    assert (tiny * 1e-10).item() > 0

    runtime = prepare(seed=4, device="cpu", dtype="float64", threads=2)

    assert runtime.device == torch.device("cpu")
    assert runtime.dtype == torch.float64
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert (tiny * 1e-10).item() == 0


def test_denormals_vanish_on_every_thread_of_a_fresh_process():
    """A product too large for one thread: the pool's threads flush too."""
    code = (
        "import torch\n"
        "from spectra.runtime import prepare\n"
        "prepare(seed=0, device='cpu', dtype='float32', threads=2)\n"
        "print(int((torch.full((4_000_000,), 1e-30) * 1e-10).count_nonzero()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "0"


@pytest.mark.usefixtures("restored")
def test_prepare_seeds_what_others_may_call():
    draws = []
    for seed in (4, 4, 5, 2**40):
        prepare(seed=seed, device="cpu", dtype="float32", threads=1)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002, S311

    assert draws[0] == draws[1]
    for other in draws[2:]:
        assert all(a != b for a, b in zip(draws[0], other, strict=True))


@pytest.mark.usefixtures("restored")
def test_cuda_without_cuda_is_a_parameter_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ParameterError, match=r"runtime\.device.*use cpu or auto"):
        prepare(seed=0, device="cuda", dtype="float32", threads=1)
    assert prepare(seed=0, device="auto", dtype="float32", threads=1).device.type == "cpu"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("device", "chosen"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_auto_takes_cuda_where_there_is_one(
    device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: None)

    runtime = prepare(seed=0, device=device, dtype="float32", threads=1)

    assert runtime.device.type == chosen
    assert runtime.dtype == torch.float32


def test_threads_are_given_back_even_after_a_failure():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError

    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, ["abcde"]), (2, ["abc", "de"]), (4, ["ab", "cd", "e"]), (9, list("abcde"))],
)
def test_shares_are_even_and_in_order(count: int, expected: list[str]):
    assert shares("abcde", count) == expected
    assert shares("", count) == []


def test_work_is_done_on_each_in_order_by_threads_of_their_own_or_by_this_one():
    def name(_: int) -> str:
        together.wait(timeout=10)
        return threading.current_thread().name

    together = threading.Barrier(2)
    names = of_each(name, [1, 2], alone=True)
    together = threading.Barrier(1)

    assert len(set(names)) == 2
    assert threading.current_thread().name not in names
    assert of_each(name, [1, 2], alone=False) == [threading.current_thread().name] * 2
    assert of_each(str, [3, 1, 2], alone=True) == ["3", "1", "2"]


def test_work_ahead_is_one_further_and_in_order():
    begun: list[int] = []

    def work(item: int) -> tuple[int, str]:
        begun.append(item)
        return item, threading.current_thread().name

    results = ahead(work, [4, 2, 3])
    first = next(results)
    rest = list(results)

    assert [item for item, _ in [first, *rest]] == begun == [4, 2, 3]
    assert threading.current_thread().name not in {name for _, name in rest}
    assert list(ahead(work, [])) == []


def test_what_fails_ahead_fails_where_it_is_used():
    results = ahead(lambda item: 1 / item, [1, 0])

    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.usefixtures("restored")
def test_a_thread_alone_stays_so_whatever_others_set_before_it_computes():
    """It would take up their number, and sum in another order than in the next process."""
    with ThreadPoolExecutor(1, initializer=alone) as pool:
        pool.submit(int).result()  # begun, and nothing computed
        torch.set_num_threads(2)

        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.usefixtures("restored")
def test_a_thread_alone_has_no_others_and_no_denormals():
    torch.set_flush_denormal(False)
    torch.set_num_threads(2)

    alone()

    assert torch.get_num_threads() == 1
    assert (torch.tensor([1e-30]) * 1e-10).item() == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_goes_back_to_the_system():
    """Blocks below what glibc maps one by one, between small ones that stay."""
    blocks = [bytearray(100_000) for _ in range(1000)]
    kept = blocks[::100]
    held = _resident()
    del blocks
    between = _resident()

    return_memory()

    assert len(kept) == 10
    assert held - _resident() > 50e6
    assert between - _resident() > 0


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
