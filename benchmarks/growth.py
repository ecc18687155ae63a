"""How cost grows: with images, width, pairs, networks and threads.

Ours against plain PyTorch, one quantity changed at a time. Widths have fresh weights, for a
product costs the same at any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks import ours, plain
from benchmarks.result import Result
from benchmarks.timing import Action, Spread, interleave, once
from benchmarks.workload import Problem

_WIDTHS = (32, 128, 512)
_PAIRS = (10, 30, 60)
_STACKS = {"cpu": (1, 4, 16), "cuda": (1, 4, 16, 64)}
_ROUNDS, _BUDGET_S = 3, 6.0


def growth(result: Result, problem: Problem, *, quick: bool) -> None:
    """All the tables of growth."""
    examples = len(problem.train.labels_N)
    some = problem.of_size(max(examples // 6, 1))
    _products(result, "images N", [problem.of_size(examples // d) for d in (8, 4, 2, 1)], _images)
    quarter = problem.of_size(examples // 4)
    widths = [quarter.of_width(width) for width in (_WIDTHS[:2] if quick else _WIDTHS)]
    _products(result, f"parameters P ({_images(quarter):,} images)", widths, _parameters)
    if problem.device.type == "cpu" and problem.threads > 1:
        half = problem.of_size(examples // 2)
        threads = _doubling(problem.threads)
        _products(
            result,
            f"threads ({_images(half):,} images)",
            [replace(half, threads=t) for t in threads],
            lambda p: p.threads,
        )
    pairs = _PAIRS[:1] if quick else _PAIRS
    _table(
        result, f"pairs k ({_images(some):,} images)", "top pairs",
        ((k, {"ours": _leading(ours.leading, some, k), "plain": _leading(_plain_leading, some, k)})
         for k in pairs),
    )  # fmt: skip
    stacks = _STACKS[problem.device.type]
    if quick:
        stacks = stacks[:2]
    _table(
        result, f"networks M ({_images(some):,} images)", "epoch of all M",
        ((m, {"ours": lambda m=m: {"total": ours.stack_epoch(some, m)},
              "plain": lambda m=m: {"total": sum(plain.epoch(some)["epoch"] for _ in range(m))}})
         for m in stacks),
    )  # fmt: skip


def _products(
    result: Result, of: str, problems: Iterable[Problem], at: Callable[[Problem], int]
) -> None:
    """A table of products, one line a problem."""

    def lines() -> Iterable[tuple[int, Mapping[str, Action]]]:
        for problem in problems:
            torch.set_num_threads(problem.threads)
            v_P = torch.ones_like(problem.theta_P)
            actions = {}
            for name, operator in (("ours", ours.operator), ("plain", plain.operator)):
                product = operator(problem)
                product(v_P)
                actions[name] = once(lambda f=product, v=v_P: f(v), problem.device)
            yield at(problem), actions

    threads = torch.get_num_threads()
    _table(result, of, "product", lines())
    torch.set_num_threads(threads)


def _table(
    result: Result, of: str, work: str, lines: Iterable[tuple[int, Mapping[str, Action]]]
) -> None:
    points: list[dict[str, Any]] = []
    for at, actions in lines:
        times = interleave(actions, rounds=_ROUNDS, budget_s=_BUDGET_S, failed=result.failed)
        spreads = {name: Spread.of(t["total"]) for name, t in times.items()}
        points.append({"at": at} | {name: s.as_dict() for name, s in spreads.items()})
        shown = "  ".join(f"{name} {s.median:.4g} s" for name, s in spreads.items())
        result.say(f"  {work} at {of.split(' (', maxsplit=1)[0]} = {at}: {shown}")
    result.growth.append({"of": of, "work": work, "points": points})


def _leading(solve: Callable[..., object], problem: Problem, k: int) -> Action:
    return once(lambda: solve(problem, k, problem.size.rtol), problem.device)


def _plain_leading(problem: Problem, k: int, rtol: float) -> object:
    assert plain.CONTENDER.leading is not None
    return plain.CONTENDER.leading(problem, k, rtol)


def _images(problem: Problem) -> int:
    return len(problem.train.labels_N)


def _parameters(problem: Problem) -> int:
    return problem.mlp.dim


def _doubling(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]
