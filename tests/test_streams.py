"""Work beside other work, and work replayed, is the work itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from spectra.streams import Aside, Graph, may_capture

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_work_given_aside_is_done_at_once_on_a_cpu():
    done: list[int] = []
    aside = Aside(torch.device("cpu"))

    assert aside.do(lambda: done.append(1) or 7) == 7
    assert done == [1]
    aside.join()
    assert done == [1]


def test_graphs_are_made_by_the_main_thread_alone():
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(may_capture).result()
    assert may_capture()


@needs_gpu
def test_work_given_aside_is_there_after_joining():
    """And its memory is not used anew before, though nobody holds what it read."""
    aside = Aside(torch.device("cuda"))
    ones = torch.ones(1 << 22, device="cuda")

    sums = [aside.do(partial(torch.sum, ones * i)) for i in range(8)]
    aside.join()

    assert [float(total) for total in sums] == [float(i << 22) for i in range(8)]


@needs_gpu
def test_a_replayed_graph_is_the_function_of_what_it_is_given():
    """What it changes is as before once it is captured."""
    given = torch.ones(3, device="cuda")
    total = torch.zeros(3, device="cuda")

    graph = Graph(total.add_, given, unchanged=[total])

    assert total.tolist() == [0, 0, 0]
    graph.replay(given)
    assert graph.replay(5 * given).tolist() == [6, 6, 6]
