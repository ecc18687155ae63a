"""Repeated eigenvalues: what a search from a few start vectors can promise, and keeps.

In exact arithmetic a Krylov method sees one copy of an eigenvalue for every start vector. The
others enter by round-off and grow like any converging pair, so they come out late; a search that
ends before has missed them, and no residual shows it. The tests say where that happens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from oracles import bulk
from solvers import (
    Planted,
    Solve,
    dense,
    either,
    lanczos,
    several,
    solve_planted,
)

cat = np.concatenate
MISSED = {
    "thrice, ended by a fast indefinite tail": Planted(cat([[10, 10, 10, -8], bulk(296)]), 3),
    "thrice, the smallest among the leading": Planted(cat([[10, 10, 10, -8, 7, 6], bulk(294)]), 4),
    "two values": Planted(cat([np.full(150, 2.0), np.full(150, 1.0)]), 30),
    "a projector": Planted(cat([np.ones(40), np.zeros(260)]), 30),
    "three values": Planted(cat([np.full(10, 5.0), np.full(20, 2.0), np.ones(270)]), 12),
}


@pytest.mark.parametrize("name", MISSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@either
def test_copies_of_a_repeated_eigenvalue_are_found(solve: Solve, dtype: torch.dtype, name: str):
    """Spectra whose distinct eigenvalues converge before the copies of the largest appear."""
    matrix_PP = oracles.planted(MISSED[name].values).to(dtype)
    k = MISSED[name].k
    expected_K, smallest = dense(matrix_PP, k)

    pairs = solve_planted(solve, matrix_PP, k, rtol=1e-3)

    np.testing.assert_allclose(np.sort(pairs.values_K), np.sort(expected_K), atol=1e-2)
    assert pairs.smallest.value == pytest.approx(smallest, abs=1e-2)


LOOKED_FOR = {
    "twice, over a broad bulk": Planted(cat([[10, 10, -9, 8, 7], bulk(295, 0, 3)]), 4),
    "twice, close to others": Planted(cat([[9, 8, 7.6, 7.6, 7.2], bulk(295, 0, 6.5)]), 4),
    "twice, among a crowd": Planted(cat([[9, 8, 7.6, 7.6, 7.2], bulk(295, 0, 6.9)]), 4),
}


@pytest.mark.parametrize("name", LOOKED_FOR)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_copy_that_no_round_off_brings_is_looked_for(name: str, seed: int):
    """In float64 all else converges long before round-off has grown to the copy.

    Only a fresh direction holds it, and only one that is followed far enough shows it.
    """
    matrix_PP = oracles.planted(LOOKED_FOR[name].values)
    k = LOOKED_FOR[name].k

    pairs = solve_planted(lanczos, matrix_PP, k, rtol=1e-3, seed=seed)

    np.testing.assert_allclose(pairs.values_K, dense(matrix_PP, k)[0], atol=1e-2)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_look_begins_before_the_last_pair_has_converged(seed: int):
    """Where the end is in sight: the products of the look but four are all it adds."""
    matrix_PP = oracles.planted(cat([np.geomspace(100, 10, 30), bulk(770, -3, 9)]))
    asked = {"k": 30, "rtol": 1e-3, "seed": seed}

    looked = solve_planted(lanczos, matrix_PP, **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectra.curvature.eigen._AHEAD", -1)
        patch.setattr("spectra.curvature.eigen._ROUNDS", 0)
        unseen = solve_planted(lanczos, matrix_PP, **asked)

    assert looked.converged_K.all()
    assert looked.products - unseen.products <= 16
    np.testing.assert_allclose(looked.values_K, dense(matrix_PP, 30)[0], rtol=1e-4)


COPIES = {
    "none": [9, 8, 7.8, 7.6, 7.2],
    "two": [9, 8, 7.6, 7.6, 7.2],
    "three": [9, 8, 7.6, 7.6, 7.6, 7.2],
    "four": [9, 8, 7.6, 7.6, 7.6, 7.6, 7.2],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", COPIES)
def test_several_starts_need_no_look_for_fewer_copies_than_they_show(name: str, seed: int):
    """Four starts: with up to two copies the search ends where it would without one."""
    values = cat([COPIES[name], bulk(293, 0, 6.9)])
    matrix_PP, k = oracles.planted(values), len(COPIES[name])

    pairs = solve_planted(several, matrix_PP, k, rtol=1e-3, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectra.curvature.eigen._SPARE", -9)
        unseen = solve_planted(several, matrix_PP, k, rtol=1e-3, seed=seed)

    np.testing.assert_allclose(pairs.values_K, dense(matrix_PP, k)[0], atol=1e-2)
    if name in ("none", "two"):
        assert pairs.products == unseen.products
    else:
        assert pairs.products > unseen.products + 8
