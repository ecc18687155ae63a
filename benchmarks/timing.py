"""Time, fairly: contenders in turns, medians, ratios.

A machine is not equally fast from minute to minute. All contenders of a row therefore run in
every round, one after the other, and who begins changes from round to round; what is quoted is
the median, with the extremes kept beside it. A contender that has used up its budget sits out
the later rounds, so that the slowest does not decide how long a benchmark lasts.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

Action = Callable[[], Mapping[str, float]]
"""Does a contender's work once and returns the seconds of its parts."""

Times = dict[str, dict[str, list[float]]]
"""Contender -> part -> what every run took."""


def now(device: torch.device) -> float:
    """Seconds on a steady clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def once(work: Callable[[], object], device: torch.device) -> Action:
    """An action of one part, `total`."""

    def action() -> dict[str, float]:
        start = now(device)
        work()
        return {"total": now(device) - start}

    return action


@dataclass(frozen=True)
class Spread:
    """The median of some runs, their extremes and their number."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def as_dict(self) -> dict[str, float]:
        """For the results file."""
        return asdict(self)


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in order, beginning one further on every turn."""
    at = turn % len(names) if names else 0
    return [*names[at:], *names[:at]]


def interleave(
    actions: Mapping[str, Action],
    *,
    rounds: int,
    budget_s: float,
    failed: Callable[[str, Exception], None],
) -> Times:
    """Run all actions in rounds, rotating who begins.

    Args:
        actions: One a contender.
        rounds: At most so many runs each.
        budget_s: A contender whose next run would probably exceed it sits out; every one
            runs at least once.
        failed: Told of an action that raised; it is not called again.
    """
    times: dict[str, dict[str, list[float]]] = {}
    spent: dict[str, list[float]] = defaultdict(list)
    out: set[str] = set()
    for turn in range(rounds):
        for name in rotated(list(actions), turn):
            runs = spent[name]
            if name in out or (runs and sum(runs) + statistics.mean(runs) > budget_s):
                continue
            start = time.perf_counter()
            try:
                parts = actions[name]()
            except Exception as error:  # a peer may fail in any way
                out.add(name)
                failed(name, error)
                continue
            runs.append(time.perf_counter() - start)
            for part, seconds in parts.items():
                times.setdefault(name, {}).setdefault(part, []).append(seconds)
    return times


def ratios(medians: Mapping[str, float], to: str) -> dict[str, float]:
    """Every median as a multiple of one; empty where that one is not there."""
    base = medians.get(to)
    return {name: value / base for name, value in medians.items()} if base else {}
