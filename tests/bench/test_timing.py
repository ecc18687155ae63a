"""Turns, medians and ratios."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.timing import Spread, interleave, paced_ratios, ratios, rotated


def refuse(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


def test_who_begins_changes_from_round_to_round():
    names = ["a", "b", "c"]

    assert [rotated(names, turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(rotated(names, turn)) == names for turn in range(4))


def test_a_round_runs_everyone_and_the_next_begins_one_further():
    order: list[str] = []

    def action(name: str) -> dict[str, float]:
        order.append(name)
        return {"total": float(len(order))}

    times = interleave(
        {name: (lambda n=name: action(n)) for name in "abc"},
        rounds=2, budget_s=60, failed=refuse,
    )  # fmt: skip

    assert "".join(order) == "abcbca"
    assert times["a"] == {"total": [1.0, 6.0]}


def test_who_has_used_up_the_budget_sits_out(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.accumulate(itertools.chain([0.0], itertools.cycle([10.0, 0.0, 1.0, 0.0])))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    actions = {"slow": lambda: {"total": 10.0}, "fast": lambda: {"total": 1.0}}

    times = interleave(actions, rounds=2, budget_s=15.0, failed=refuse)

    assert len(times["slow"]["total"]) == 1
    assert len(times["fast"]["total"]) == 2


def test_one_that_fails_is_told_of_and_does_not_stop_the_others():
    told: list[str] = []

    def fails() -> dict[str, float]:
        raise RuntimeError("no")

    times = interleave(
        {"broken": fails, "well": lambda: {"total": 1.0}},
        rounds=3, budget_s=60, failed=lambda name, error: told.append(f"{name}: {error}"),
    )  # fmt: skip

    assert told == ["broken: no"]
    assert times == {"well": {"total": [1.0, 1.0, 1.0]}}


def test_one_sets_the_pace():
    """It runs between all others, and they are compared with what it took beside them."""
    order: list[str] = []
    speed = iter(range(1, 100))

    def action(name: str) -> dict[str, float]:
        order.append(name)
        return {"total": (10.0 if name == "b" else 1.0) * next(speed)}

    times = interleave(
        {name: (lambda n=name: action(n)) for name in "abp"},
        rounds=2, budget_s=60, failed=refuse, pace="p",
    )  # fmt: skip

    assert "".join(order) == "papbpbpap"
    assert times["p"]["total"] == [1, 3, 5, 7, 9]
    assert paced_ratios(times, "total") == {"a": 1.0, "b": 10.0}


def test_whoever_fails_the_others_have_their_times():
    def fails() -> dict[str, float]:
        raise RuntimeError("no")

    def well() -> dict[str, float]:
        return {"total": 1.0}

    how = {"rounds": 2, "budget_s": 60, "failed": lambda *_: None, "pace": "p"}

    assert interleave({"a": well, "p": fails}, **how) == {"a": {"total": [1.0, 1.0]}}
    assert "total" in interleave({"a": fails, "p": well}, **how)["p"]
    assert interleave({"p": well}, **how)["p"] == {"total": [1.0]}


def test_median_extremes_and_ratios():
    assert Spread.of([3.0, 1.0, 100.0]) == Spread(3.0, 1.0, 100.0, 3)
    assert ratios({"ours": 2.0, "plain": 5.0}, "ours") == {"ours": 1.0, "plain": 2.5}
    assert ratios({"plain": 5.0}, "ours") == {}
