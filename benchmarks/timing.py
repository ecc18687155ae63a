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


BESIDE = "beside"
"""What the contender that sets the pace took right before and after, see `interleave`."""


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
    pace: str | None = None,
) -> Times:
    """Run all actions in rounds, rotating who begins.

    Args:
        actions: One a contender.
        rounds: At most so many runs each.
        budget_s: A contender whose next run would probably exceed it sits out; every one
            runs at least once.
        failed: Told of an action that raised; it is not called again.
        pace: A contender that runs right before and after each of the others, whatever its
            budget, for work so long that the machine's speed changes meanwhile. The mean of the
            two is the part `BESIDE` of the others' times.
    """
    times: dict[str, dict[str, list[float]]] = {}
    spent: dict[str, list[float]] = defaultdict(list)
    out: set[str] = set()

    def run(name: str) -> float | None:
        """Seconds, all parts together, or None where it raised."""
        start = time.perf_counter()
        try:
            parts = actions[name]()
        except Exception as error:  # a peer may fail in any way
            out.add(name)
            failed(name, error)
            return None
        spent[name].append(time.perf_counter() - start)
        for part, seconds in parts.items():
            times.setdefault(name, {}).setdefault(part, []).append(seconds)
        return sum(parts.values())

    others = [name for name in actions if name != pace]
    before = run(pace) if pace else None
    for turn in range(rounds):
        for name in rotated(others, turn):
            runs = spent[name]
            if name in out or (runs and sum(runs) + statistics.mean(runs) > budget_s):
                continue
            run(name)
            if pace and pace not in out:
                after = run(pace)
                if before and after and name not in out:
                    times[name].setdefault(BESIDE, []).append((before + after) / 2)
                before = after
    return times


def paced_ratios(times: Times, part: str) -> dict[str, float]:
    """The median of every contender's runs over those of the pace beside them."""
    return {
        name: statistics.median(
            own / beside for own, beside in zip(parts[part], parts[BESIDE], strict=True)
        )
        for name, parts in times.items()
        if BESIDE in parts
    }


def ratios(medians: Mapping[str, float], to: str) -> dict[str, float]:
    """Every median as a multiple of one; empty where that one is not there."""
    base = medians.get(to)
    return {name: value / base for name, value in medians.items()} if base else {}
