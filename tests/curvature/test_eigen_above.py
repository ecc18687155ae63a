"""Pairs above a magnitude only: those are right, and the rest costs nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from oracles import bulk
from solvers import (
    Solve,
    check_certificate,
    ours,
)
from spectra.curvature.eigen import EigenPairs

cat = np.concatenate
ABOVE = cat([[10, 8, -7, 6, 5], bulk(295, 0.5, 1.0)])


def solve_above(solve: Solve, values: np.ndarray, above: float, **how: int) -> EigenPairs:
    asked = {"k": 20, "seed": 1} | how
    return solve(
        lambda v: v @ oracles.planted(values), dim=300, k=asked["k"], rtol=1e-6,
        max_products=1000, above=above, generator=torch.Generator().manual_seed(asked["seed"]),
        dtype=torch.float64,
    )  # fmt: skip


@ours
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pairs_below_what_is_asked_for_cost_nothing(solve: Solve, seed: int):
    """Five above 2 and fifteen in a crowd below: the five are right for a part of the products."""
    all_of_them, only = (solve_above(solve, ABOVE, above, seed=seed) for above in (0.0, 2.0))

    assert all_of_them.converged_K.all()
    np.testing.assert_allclose(only.values_K[:5], [10, 8, -7, 6, 5], rtol=1e-9)
    assert only.converged_K[:5].all()
    assert only.products < all_of_them.products / 2
    # The rest come back as they are and say so.
    assert len(all_of_them.values_K) == 20
    assert 5 < len(only.values_K) <= 20
    assert not only.converged_K[5:].all()
    check_certificate(only, oracles.planted(ABOVE), 2.0**-52)


@ours
@pytest.mark.parametrize("above", [0.4, 5.5, 7.5, 20.0])
def test_a_magnitude_that_is_asked_for_divides_right_from_unsure(solve: Solve, above: float):
    """Every pair above it is there, wherever it cuts the spectrum; signs do not matter."""
    pairs = solve_above(solve, ABOVE, above, k=8)
    values = np.sort(np.abs(ABOVE))[::-1][:8]
    wanted = values >= above

    assert len(pairs.values_K) >= wanted.sum()
    wanted = wanted[: len(pairs.values_K)]
    values = values[: len(pairs.values_K)]
    assert pairs.converged_K[wanted].all()
    np.testing.assert_allclose(np.abs(pairs.values_K[wanted]), values[wanted], rtol=1e-9)
    assert np.all(np.abs(pairs.values_K[~wanted]) < above)
    assert pairs.smallest.converged
    assert pairs.largest.converged


@ours
@pytest.mark.parametrize("k", [20, 200])
def test_fewer_pairs_than_asked_for_take_no_more_products(solve: Solve, k: int):
    """Five above 2: what is asked for beyond them is not built up first."""
    only, more = (solve_above(solve, ABOVE, 2.0, k=asked) for asked in (6, k))

    assert more.products == only.products < 200
    np.testing.assert_allclose(more.values_K[:5], [10, 8, -7, 6, 5], rtol=1e-9)


@ours
def test_copies_above_what_is_asked_for_are_found(solve: Solve):
    """The second look counts what it finds above, and does not wait for what goes on below."""
    values = cat([[10, 10, 10, -8], bulk(296, 0.5, 1.0)])

    pairs = solve_above(solve, values, 2.0)

    np.testing.assert_allclose(pairs.values_K[:4], [10, 10, 10, -8], rtol=1e-9)
    assert pairs.products < 200
