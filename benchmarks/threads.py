"""How many threads a training step does best with on this machine, found by short trials in turns.

At batch 64 a second thread gains or loses, depending on the machine and on the loop. Loops over
data in memory run with whichever is faster, each with its own.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from benchmarks.workload import BATCH, Problem

_TRIAL_STEPS = 100
_TRIALS = 7
"""Of each number; one alone was decided by what else the machine did at that moment."""


class StepThreads:
    """One thread or all of a problem's, by number of threads and device.

    Args:
        seconds: What the steps of an epoch take with so many threads.
    """

    def __init__(self, seconds: Callable[[Problem, int], float]) -> None:
        self._seconds = seconds
        self._best: dict[tuple[int, str], int] = {}

    def tune(self, problem: Problem) -> None:
        """Find the faster number, once."""
        if _key(problem) in self._best:
            return
        short = problem.of_size(min(_TRIAL_STEPS * BATCH, len(problem.train.labels_N)))
        times: dict[int, list[float]] = {n: [] for n in sorted({1, problem.threads})}
        for _ in range(_TRIALS):
            for n, seconds in times.items():
                seconds.append(self._seconds(short, n))
        self._best[_key(problem)] = min(times, key=lambda n: median(times[n]))

    def of(self, problem: Problem) -> int:
        """The faster number."""
        self.tune(problem)
        return self._best[_key(problem)]

    def note(self, problem: Problem) -> str:
        """What a reader must know of it; nothing where it was not tried or does not matter."""
        threads = self._best.get(_key(problem))
        if threads is None or problem.device.type != "cpu":
            return ""
        return f"{threads} thread(s) in a training step"


def _key(problem: Problem) -> tuple[int, str]:
    return problem.threads, problem.device.type
