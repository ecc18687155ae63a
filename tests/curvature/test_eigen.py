"""Leading eigenpairs by both solvers on planted spectra: values, certificates, limits."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

import oracles
from oracles import bulk
from solvers import (
    Planted,
    Solve,
    check_certificate,
    dense,
    eigsh,
    either,
    every,
    lanczos,
    ours,
    restarted,
    several,
    solve_planted,
)
from spectra.curvature.eigen import leading_eigenpairs
from spectra.errors import NonFiniteError

cat = np.concatenate
SPECTRA = {
    "separated": Planted(cat([[10, 8, 6, 5, 4, 3, 2, 1.5, 1.2], bulk(291)]), 9),
    "into the bulk": Planted(cat([[10, 8, 6, 5, 4, 3, 2, 1.5, 1.2], bulk(291)]), 30),
    "clustered": Planted(cat([[10, 9.9999, 9.9998, 5, 4.9999], bulk(295)]), 5),
    "indefinite": Planted(cat([[10, -9, 8, -7, 6], bulk(295, -0.1, 0.1)]), 5),
    "magnitude, not algebra": Planted(cat([[-10, -9, -8, 7, 6, 5], bulk(294, -0.1, 0.1)]), 3),
    "smallest outside the set": Planted(cat([[10, 8, 7, 6, -1], bulk(295)]), 4),
    "smallest inside the bulk": Planted(cat([[10, 8, 7, 6], bulk(296, -0.2, 1.0)]), 4),
    "positive definite": Planted(cat([[10, 8, 7, 6], bulk(296, 1.0, 2.0)]), 4),
    "negative definite": Planted(-cat([[10, 8, 7, 6], bulk(296, 1.0, 2.0)]), 4),
    "negative, the largest outside": Planted(-cat([[10, 8, 7, 6, -1], bulk(295)]), 4),
    "negative, the largest inside the bulk": Planted(-cat([[10, 8, 7, 6], bulk(296, -0.2, 1)]), 4),
    "rank 9 of 300": Planted(cat([np.arange(9, 0, -1.0), np.zeros(291)]), 30),
    "identity": Planted(np.ones(60), 7),
    "one": Planted(cat([[3.0], bulk(99)]), 1),
    "k = dim - 1": Planted(np.array([3.0, 2.0, 1.0, -1.5, -2.5]), 4),
    "thrice the largest": Planted(cat([[10, 10, 10, 5, 4], bulk(295)]), 5),
    "thrice one within": Planted(cat([[10, 7, 5, 5, 5, 4], bulk(294)]), 6),
    "thrice among thirty": Planted(cat([[10, 10, 10, 5, 4], bulk(295)]), 30),
    "tiny scale": Planted(1e-9 * cat([[10, 8, -6], bulk(97)]), 3),
}


def ends(matrix_PP: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue, by LAPACK."""
    values = np.linalg.eigvalsh(matrix_PP.double().numpy())
    return values[0], values[-1]


@every
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_pairs_are_those_of_the_dense_matrix(solve: Solve, name: str):
    """All K of them, the smallest algebraic eigenvalue, and the certificate; in float64."""
    matrix_PP = oracles.planted(SPECTRA[name].values)
    k = SPECTRA[name].k
    expected_K, smallest = dense(matrix_PP, k)
    scale = np.abs(expected_K[0])

    pairs = solve_planted(solve, matrix_PP, k)

    # A Rayleigh quotient errs by the square of the residual over the gap, at most.
    np.testing.assert_allclose(np.sort(pairs.values_K), np.sort(expected_K), atol=1e-8 * scale)
    check_certificate(pairs, matrix_PP, 2.0**-52)
    assert pairs.converged_K.all()
    assert np.all(pairs.residuals_K <= np.maximum(1e-7 * np.abs(pairs.values_K), 1e-14 * scale))
    assert pairs.smallest.converged
    assert pairs.smallest.value == pytest.approx(smallest, abs=1e-7 * scale)
    assert pairs.largest.converged
    assert pairs.largest.value == pytest.approx(ends(matrix_PP)[1], abs=1e-7 * scale)


@every
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_noise_is_lived_with(solve: Solve, name: str):
    """Products in float32: values to its round-off, and certificates true to it."""
    matrix_PP = oracles.planted(SPECTRA[name].values).float()
    k = SPECTRA[name].k
    expected_K, smallest = dense(matrix_PP, k)
    scale = np.abs(expected_K[0])

    pairs = solve_planted(solve, matrix_PP, k, rtol=1e-3)

    np.testing.assert_allclose(np.sort(pairs.values_K), np.sort(expected_K), atol=2e-5 * scale)
    check_certificate(pairs, matrix_PP, 2.0**-23)
    assert pairs.vectors_KP.dtype == np.float32
    assert pairs.converged_K.all()
    assert pairs.smallest.value == pytest.approx(smallest, abs=1e-3 * scale)
    assert pairs.largest.value == pytest.approx(ends(matrix_PP)[1], abs=1e-3 * scale)


@either
def test_a_tolerance_below_the_noise_ends_at_the_noise(solve: Solve):
    """At rtol 1e-12 on float32 products: neither the whole budget nor a false alarm."""
    matrix_PP = oracles.planted(cat([[10, 8, 6, 5, 4, 3, 2, 1.5, 1.2], bulk(791)])).float()

    pairs = solve_planted(solve, matrix_PP, 9, rtol=1e-12, max_products=3000)

    assert pairs.products < 500
    assert pairs.converged_K[:5].all()
    assert pairs.residuals_K.max() < 1e-4


@either
def test_the_zero_operator_has_zero_eigenvalues(solve: Solve):
    pairs = solve_planted(solve, torch.zeros(40, 40, dtype=torch.float64), 7)

    assert np.all(pairs.values_K == 0)
    assert np.all(pairs.residuals_K == 0)
    assert pairs.converged_K.all()
    assert (pairs.smallest.value, pairs.smallest.converged) == (0, True)
    assert (pairs.largest.value, pairs.largest.converged) == (0, True)
    assert np.abs(pairs.vectors_KP @ pairs.vectors_KP.T - np.eye(7)).max() < 1e-14


@ours
def test_pairs_that_were_never_multiplied_are_declared(solve: Solve):
    """Nine eigenvalues of a 300×300 matrix; what is found null by products is not declared."""
    matrix_PP = torch.diag(torch.from_numpy(SPECTRA["rank 9 of 300"].values)).float()
    images = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal images
        images += len(v) if v.ndim == 2 else 1
        return v @ matrix_PP

    pairs = solve(counted, dim=300, k=30, rtol=1e-3, max_products=500, generator=torch.Generator())

    assert pairs.products == images < 30
    assert pairs.declared_K.sum() >= 30 - images
    assert not pairs.declared_K[:9].any()
    assert pairs.converged_K.all()
    assert np.all(pairs.values_K[pairs.declared_K] == 0)
    assert np.all(pairs.residuals_K[pairs.declared_K] > 0)
    assert not solve_planted(solve, matrix_PP[:20, :20], 9).declared_K.any()


@either
@pytest.mark.parametrize("values", [[3.0, 2], [3.0, 2, 1.5, 1, 0.5]], ids=str)
def test_all_but_one_of_a_positive_matrix(solve: Solve, values: list[float]):
    """Pairs wanted are dim − 1, and the one left is the smallest."""
    pairs = solve_planted(solve, oracles.planted(values), len(values) - 1)

    np.testing.assert_allclose(pairs.values_K, values[:-1], rtol=1e-12)
    assert pairs.smallest.value == pytest.approx(values[-1], rel=1e-12)
    assert pairs.smallest.converged


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exhausted", [False, True])
def test_the_same_generator_gives_the_same_bytes(solve: Solve, dtype: torch.dtype, exhausted: bool):
    """Also where fresh directions are drawn, after the Krylov space is exhausted."""
    if solve is eigsh and exhausted and "rng" not in inspect.signature(scipy_eigsh).parameters:
        pytest.skip("this SciPy draws them from a state of its own")
    # Diagonal, so that no round-off keeps the Krylov space alive.
    rank_9_PP = torch.diag(torch.from_numpy(SPECTRA["rank 9 of 300"].values))
    matrix_PP = rank_9_PP if exhausted else oracles.planted(SPECTRA["into the bulk"].values)
    matrix_PP = matrix_PP.to(dtype)
    first = solve_planted(solve, matrix_PP, 12, rtol=1e-3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - no global generator may enter
    second = solve_planted(solve, matrix_PP, 12, rtol=1e-3)
    other = solve_planted(solve, matrix_PP, 12, rtol=1e-3, seed=2)

    for part in ("values_K", "vectors_KP", "residuals_K"):
        assert getattr(first, part).tobytes() == getattr(second, part).tobytes()
    assert first.smallest == second.smallest
    assert first.products == second.products
    assert first.vectors_KP.tobytes() != other.vectors_KP.tobytes()


@pytest.mark.parametrize(("k", "budget"), [(5, 10), (5, 5), (5, 3), (30, 40)])
def test_a_spent_budget_is_reported_and_not_raised(k: int, budget: int):
    """The best pairs so far come back, flagged; what they claim about themselves is true."""
    matrix_PP = oracles.planted(np.linspace(1, 2, 300))

    pairs = solve_planted(lanczos, matrix_PP, k, max_products=budget)

    assert len(pairs.values_K) == min(k, budget)
    assert not pairs.converged_K.any()
    assert not pairs.smallest.converged
    assert not pairs.largest.converged
    assert pairs.products == budget
    check_certificate(pairs, matrix_PP, 2.0**-52)


def test_within_a_budget_the_pairs_that_converged_say_so():
    matrix_PP = oracles.planted(cat([[100.0, 50.0], bulk(298, 1.0, 2.0)]))
    expected_K, _ = dense(matrix_PP, 2)

    pairs = solve_planted(lanczos, matrix_PP, 8, max_products=16)

    assert pairs.converged_K.tolist() == [True] * 2 + [False] * 6
    np.testing.assert_allclose(pairs.values_K[:2], expected_K, rtol=1e-10)


def test_products_are_counted():
    """All of them, those too that `eigsh` does not tell of."""
    matrix_PP = oracles.planted(SPECTRA["smallest outside the set"].values)
    for solve in (lanczos, eigsh):
        spent = 0

        def matvec(v_P: Tensor) -> Tensor:
            nonlocal spent
            spent += 1
            return matrix_PP @ v_P

        pairs = solve(
            matvec, dim=300, k=4, rtol=1e-6, max_products=500,
            generator=torch.Generator(), dtype=torch.float64,
        )  # fmt: skip
        assert pairs.products == spent


def test_restarts_find_the_same_pairs():
    """With memory for 2k + 20 vectors only, the basis is restarted and the answer stands."""
    planted = Planted(cat([[10.0, -9.0, 8.0, 7.0], bulk(796, 0.0, 6.0)]), 8)
    matrix_PP = oracles.planted(planted.values)
    expected_K, smallest = dense(matrix_PP, 8)
    roomy = solve_planted(lanczos, matrix_PP, 8)

    tight = solve_planted(restarted, matrix_PP, 8)

    assert tight.products > 36
    assert tight.products != roomy.products
    assert tight.converged_K.all()
    np.testing.assert_allclose(tight.values_K, expected_K, rtol=1e-9)
    assert tight.smallest.value == pytest.approx(smallest, abs=1e-8)
    check_certificate(tight, matrix_PP, 2.0**-52)


def test_restarts_keep_the_lowest():
    """The smallest eigenvalue, small in magnitude and close to others, survives restarts."""
    matrix_PP = oracles.planted(cat([[10.0, 9.0, 8.0, 7.0], bulk(396, -0.02, 6.0)]))

    pairs = solve_planted(restarted, matrix_PP, 4, max_products=500)

    assert pairs.converged_K.all()
    assert pairs.smallest.converged
    assert pairs.smallest.value == pytest.approx(-0.02, abs=1e-6)


def test_restarts_keep_the_highest():
    """The mirror image: all leading pairs negative, the largest eigenvalue small and crowded."""
    matrix_PP = oracles.planted(-cat([[10.0, 9.0, 8.0, 7.0], bulk(396, -0.02, 6.0)]))

    pairs = solve_planted(restarted, matrix_PP, 4, max_products=500)

    assert pairs.converged_K.all()
    assert pairs.largest.converged
    assert pairs.largest.value == pytest.approx(0.02, abs=1e-6)
    assert pairs.lambda_max == pairs.largest.value


@pytest.mark.parametrize("seed", range(3))
def test_ends_meet_the_share_of_the_tolerance_that_is_asked_for(seed: int):
    """The lower end of a crowd, small beside the pairs wanted and taken by no gap."""
    matrix_PP = oracles.planted(cat([[10, 8, 7, 6], bulk(596, -0.5, 1.0)]))

    loose, tight = (
        leading_eigenpairs(
            matrix_PP.mv, dim=600, k=4, rtol=1e-2, max_products=1000, ends=share,
            generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
        ).smallest
        for share in (1.0, 0.1)
    )  # fmt: skip

    assert tight.residual <= 0.1 * 1e-2 * 6 < loose.residual
    assert abs(tight.value + 0.5) < abs(loose.value + 0.5) / 3


@pytest.mark.parametrize("seed", range(3))
def test_ends_are_not_waited_for_where_they_are_not_wanted(seed: int):
    """The pairs are the same; of the crowded end it says that it is not there yet."""
    matrix_PP = oracles.planted(cat([[10, 8, 7, 6], bulk(596, -0.5, 1.0)]))

    with_, without = (
        leading_eigenpairs(
            matrix_PP.mv, dim=600, k=4, rtol=1e-6, max_products=1000, ends=ends,
            generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
        )
        for ends in (1.0, None)
    )  # fmt: skip

    assert without.products < 0.7 * with_.products
    assert without.converged_K.all()
    np.testing.assert_allclose(without.values_K, [10, 8, 7, 6], rtol=1e-9)
    assert (with_.smallest.converged, without.smallest.converged) == (True, False)
    assert without.largest.value == without.values_K[0]
    assert without.largest.converged


@either
@pytest.mark.parametrize("k", [0, -1, 5, 6])
def test_k_out_of_range_is_refused(solve: Solve, k: int):
    with pytest.raises(ValueError, match=r"1\.\.4"):
        solve_planted(solve, oracles.planted([5.0, 4, 3, 2, 1]), k)


@either
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("after", [0, 7])
def test_an_operator_that_is_not_finite_is_refused(solve: Solve, bad: float, after: int):
    """From the first product or a later one."""
    matrix_PP = oracles.planted(SPECTRA["separated"].values)
    products = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal products
        products += len(v.view(-1, 300))
        return v @ matrix_PP * (bad if products > after else 1)

    spent = (after // 4 + 1) * 4 if solve is several else after + 1
    with pytest.raises(NonFiniteError, match=f"product {spent} "):
        solve(
            matvec, dim=300, k=5, rtol=1e-6, max_products=500,
            generator=torch.Generator(), dtype=torch.float64,
        )  # fmt: skip
