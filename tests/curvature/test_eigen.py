"""Leading eigenpairs by both solvers on planted spectra: values, certificates, limits.

What a Krylov method from one start vector can promise about a repeated eigenvalue: in exact
arithmetic it sees one copy of it. The others enter by round-off and grow like any converging
pair, so they come out late; a search that ends before has missed them, and no residual shows
it. The tests of repeated eigenvalues say where that happens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

import oracles
from oracles import bulk
from spectra.curvature.arpack import leading_eigenpairs_arpack
from spectra.curvature.eigen import EigenPairs, certified, leading_eigenpairs
from spectra.errors import NonFiniteError

Solve = Callable[..., EigenPairs]
lanczos, eigsh = leading_eigenpairs, leading_eigenpairs_arpack


def several(matvec: Callable[[Tensor], Tensor], **how: object) -> EigenPairs:
    """Lanczos from four starts, which asks for nothing but blocks."""

    def block(v_BP: Tensor) -> Tensor:
        assert v_BP.ndim == 2
        return matvec(v_BP)

    return leading_eigenpairs(block, starts=4, **how)


def restarted(matvec: Callable[[Tensor], Tensor], **how: object) -> EigenPairs:
    """Lanczos with room for 2k + 20 vectors."""
    with mock.patch("spectra.curvature.eigen._BASIS_BYTES", 1):
        return leading_eigenpairs(matvec, **how)


def several_restarted(matvec: Callable[[Tensor], Tensor], **how: object) -> EigenPairs:
    """The same from four starts."""
    with mock.patch("spectra.curvature.eigen._BASIS_BYTES", 1):
        return several(matvec, **how)


every = pytest.mark.parametrize("solve", [lanczos, several, restarted, several_restarted, eigsh])
either = pytest.mark.parametrize("solve", [lanczos, several, eigsh])
ours = pytest.mark.parametrize("solve", [lanczos, several])
cat = np.concatenate


@dataclass(frozen=True)
class Planted:
    """Eigenvalues and how many of the leading ones are asked for."""

    values: np.ndarray
    k: int


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


def solve_planted(
    solve: Solve,
    matrix_PP: Tensor,
    k: int,
    *,
    rtol: float = 1e-7,
    max_products: int = 5000,
    seed: int = 1,
) -> EigenPairs:
    return solve(
        lambda v: v @ matrix_PP,
        dim=len(matrix_PP),
        k=k,
        rtol=rtol,
        max_products=max_products,
        generator=torch.Generator().manual_seed(seed),
        dtype=matrix_PP.dtype,
    )


def ends(matrix_PP: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue, by LAPACK."""
    values = np.linalg.eigvalsh(matrix_PP.double().numpy())
    return values[0], values[-1]


def dense(matrix_PP: Tensor, k: int) -> tuple[np.ndarray, float]:
    """The `k` leading eigenvalues by magnitude and the smallest, by LAPACK."""
    values = np.linalg.eigvalsh(matrix_PP.double().numpy())
    return values[np.argsort(-np.abs(values), kind="stable")][:k], values[0]


def check_certificate(pairs: EigenPairs, matrix_PP: Tensor, eps: float) -> None:
    """Orthonormal, sorted, signed, and residuals that a dense product confirms."""
    H_PP, V_KP = matrix_PP.double().numpy(), pairs.vectors_KP.astype(np.float64)
    scale = np.abs(np.linalg.eigvalsh(H_PP)).max()
    true_K = np.linalg.norm(V_KP @ H_PP - pairs.values_K[:, None] * V_KP, axis=1)

    assert np.abs(V_KP @ V_KP.T - np.eye(len(V_KP))).max() < 50 * eps
    assert np.abs(true_K - pairs.residuals_K).max() <= 20 * eps * scale
    assert np.all(np.diff(np.abs(pairs.values_K)) <= 0)
    peaks_K = np.abs(V_KP).argmax(axis=1)
    assert np.all(V_KP[np.arange(len(V_KP)), peaks_K] > 0)
    assert pairs.values_K.dtype == np.float64


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


def test_certified_trusts_no_solver():
    """Vectors that are no eigenvectors: Rayleigh quotients, true residuals, not converged."""
    matrix_PP = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    tilted_KP = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)

    pairs = certified(tilted_KP, tilted_KP @ matrix_PP, k=2, rtol=1e-3, products=10)

    # 0.64·4 + 0.36·1, and |(H − 2.92)v| = 0.6·0.8·(4 − 1).
    np.testing.assert_allclose(pairs.values_K, [2.92, -2], rtol=1e-14)
    np.testing.assert_allclose(pairs.residuals_K, [1.44, 0], rtol=1e-13)
    assert pairs.converged_K.tolist() == [False, True]
    assert pairs.smallest.value == -2
    assert pairs.largest.value == pytest.approx(2.92)
    assert not pairs.largest.converged
    assert pairs.products == 10


def test_an_end_need_not_be_better_than_what_is_asked_for():
    """Residual 0.01 at an end of −0.2: nothing where λ_K = 1 is wanted, enough where 20 is."""
    values = torch.tensor([1.0, -0.2 + 1e-4], dtype=torch.float64)
    vectors_KP = torch.eye(3, dtype=torch.float64)[:2]
    images_KP = values[:, None] * vectors_KP
    images_KP[1, 2] = 0.01

    strict, loose = (
        certified(vectors_KP, images_KP, k=1, rtol=1e-3, products=5, above=above)
        for above in (0.0, 20.0)
    )

    assert strict.smallest.value == loose.smallest.value == pytest.approx(-0.1999)
    assert strict.smallest.residual == pytest.approx(0.01)
    assert not strict.smallest.converged
    assert loose.smallest.converged
    assert strict.largest == loose.largest


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


def test_signs_follow_the_largest_entry():
    """A vector and its negative are certified as the same."""
    matrix_PP = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    v_P = torch.tensor([[-0.99, 0.14]], dtype=torch.float64)
    v_P /= v_P.norm()
    for start in (v_P, -v_P):
        pairs = certified(start, start @ matrix_PP, k=1, rtol=1e-3, products=1)
        assert pairs.vectors_KP[0, 0] > 0 > pairs.vectors_KP[0, 1]


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
