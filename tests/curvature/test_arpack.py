"""ARPACK's side of the bargain: agreement with Lanczos, and honesty when a budget ends.

Its values, vectors and certificates are tested in `test_eigen.py`, where both solvers meet the
same spectra.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import oracles
from oracles import bulk
from spectra.curvature.arpack import leading_eigenpairs_arpack
from spectra.curvature.eigen import EigenPairs, leading_eigenpairs

HARD = np.concatenate([[10.0, 9.0, 8.0], np.linspace(-0.05, 2.0, 297)])


def run(values: np.ndarray, *, k: int, max_products: int, rtol: float = 1e-6) -> EigenPairs:
    matrix_PP = oracles.planted(values)
    return leading_eigenpairs_arpack(
        matrix_PP.mv,
        dim=len(values),
        k=k,
        rtol=rtol,
        max_products=max_products,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )


def test_it_agrees_with_lanczos_pair_by_pair():
    """Two solvers that share no search: eigenvalues and eigenvectors, signs included."""
    values = np.concatenate([[10.0, -9.0, 8.0, -7.0, 6.0], bulk(295, -0.1, 0.1)])
    ours = leading_eigenpairs(
        oracles.planted(values).mv, dim=300, k=5, rtol=1e-10, max_products=500,
        generator=torch.Generator().manual_seed(2), dtype=torch.float64,
    )  # fmt: skip

    theirs = run(values, k=5, max_products=500, rtol=1e-10)

    np.testing.assert_allclose(theirs.values_K, ours.values_K, rtol=1e-12)
    np.testing.assert_allclose(theirs.vectors_KP, ours.vectors_KP, atol=1e-9)


@pytest.mark.parametrize(("k", "budget"), [(30, 80), (10, 40), (5, 30)])
def test_a_spent_budget_leaves_the_pairs_that_converged(k: int, budget: int):
    """Fewer than asked for, and every one of them an eigenvalue."""
    pairs = run(HARD, k=k, max_products=budget)

    assert 3 <= len(pairs.values_K) < k
    np.testing.assert_allclose(pairs.values_K[:3], [10, 9, 8], rtol=1e-10)
    assert len(pairs.vectors_KP) == len(pairs.converged_K) == len(pairs.values_K)
    nearest = np.abs(pairs.values_K[:, None] - HARD[None, :]).min(axis=1)
    assert nearest.max() < 1e-6


@pytest.mark.parametrize(("k", "budget"), [(30, 80), (10, 40), (5, 30)])
def test_a_spent_budget_certifies_no_smallest_eigenvalue_that_is_not(k: int, budget: int):
    """The smallest is −0.05. What is returned says otherwise only when it says so."""
    smallest = run(HARD, k=k, max_products=budget).smallest

    assert not smallest.converged or smallest.value == pytest.approx(-0.05, abs=1e-4)


def test_nothing_found_is_nothing_claimed():
    """A spectrum without a gap and a budget of one basis: no pair, and no smallest either."""
    pairs = run(np.linspace(1, 2, 300), k=5, max_products=30, rtol=1e-8)

    assert pairs.values_K.shape == (0,)
    assert pairs.vectors_KP.shape == (0, 300)
    assert math.isnan(pairs.smallest.value)
    assert not pairs.smallest.converged
    assert pairs.products >= 30


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_end_outside_the_pairs_is_searched_for(sign: float):
    """The smallest of a positive set, the largest of a negative one; inside a mixed set, neither.

    In the mixed set every end is a leading pair, and no second search is paid for.
    """
    values = sign * np.concatenate([[10.0, 9.0, 8.0], bulk(297, -0.05, 2.0)])
    mixed = np.concatenate([[10.0, -9.0, 8.0], bulk(297, -0.05, 2.0)])

    pairs, among = (run(v, k=3, max_products=500) for v in (values, sign * mixed))

    far, near = (pairs.smallest, pairs.largest) if sign > 0 else (pairs.largest, pairs.smallest)
    assert far.converged
    assert far.value == pytest.approx(sign * -0.05, abs=1e-6)
    assert near.value == pytest.approx(sign * 10, rel=1e-10)
    assert sorted([sign * among.smallest.value, sign * among.largest.value]) == pytest.approx(
        [-9, 10], rel=1e-10
    )
    assert among.products < pairs.products - 20


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_end_that_the_budget_hid_is_not_claimed(sign: float):
    """All pairs converged, the second search did not: the end in the set is not the end."""
    pairs = run(sign * HARD, k=3, max_products=22)

    far, near = (pairs.smallest, pairs.largest) if sign > 0 else (pairs.largest, pairs.smallest)
    assert pairs.converged_K.tolist() == [True] * 3
    assert not far.converged
    assert near.converged


@pytest.mark.parametrize(("k", "budget"), [(30, 80), (10, 40), (5, 30)])
def test_a_spent_budget_certifies_no_largest_eigenvalue_that_is_not(k: int, budget: int):
    """Of the mirror image, whose largest is 0.05."""
    largest = run(-HARD, k=k, max_products=budget).largest

    assert not largest.converged or largest.value == pytest.approx(0.05, abs=1e-4)
