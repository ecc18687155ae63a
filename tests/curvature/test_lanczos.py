"""The Lanczos process: orthonormal without ghosts, projections and residuals that are true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.lanczos import Lanczos
from spectra.errors import NonFiniteError

OUTLIERS = np.concatenate([[1e4, 3e3, 1e3, 100.0], oracles.bulk(146, -1.0, 1.0)])
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def process_of(
    matrix_PP: Tensor,
    *,
    capacity: int = 1000,
    dtype: torch.dtype = torch.float64,
    starts: int = 1,
    asked: list[int] | None = None,
) -> Lanczos:
    """A process of a matrix, and how many products it asks for at a time where that is wanted."""
    matrix_PP = matrix_PP.to(dtype)
    draw = torch.Generator().manual_seed(9)
    start_P = torch.randn(len(matrix_PP), generator=draw, dtype=dtype)

    def product(v: Tensor) -> Tensor:
        if asked is not None:
            asked.append(len(v) if v.ndim == 2 else 0)
        return v @ matrix_PP

    return Lanczos(product, start_P, capacity=capacity, generator=draw, starts=starts)


def basis_of(process: Lanczos) -> np.ndarray:
    return process.vectors(np.eye(process.size)).double().numpy()


def advance(process: Lanczos, steps: int, keep: int = 5, *, ahead: bool = False) -> None:
    """Steps with a thick restart, keeping the leading and the lowest, where the basis is full."""
    for _ in range(steps):
        if process.full:
            ritz = process.ritz()
            leading = np.argsort(-np.abs(ritz.values_J))[:keep]
            process.restart(ritz, np.union1d(leading, [0]))
        process.step(ahead=ahead)


def check_invariants(process: Lanczos, matrix_PP: Tensor, dtype: torch.dtype) -> None:
    """QQᵀ = I; C diag(θ) Cᵀ = Q H Qᵀ; images are H Q; residuals implied are those there are."""
    Q_JP, H_PP = basis_of(process), matrix_PP.numpy()
    eps, scale = EPS[dtype], np.abs(np.linalg.eigvalsh(H_PP)).max()
    ritz = process.ritz()
    C_JJ = ritz.coefficients_JJ

    assert np.abs(Q_JP @ Q_JP.T - np.eye(process.size)).max() < 30 * eps
    projection_JJ = C_JJ @ np.diag(ritz.values_J) @ C_JJ.T
    assert np.abs(projection_JJ - Q_JP @ H_PP @ Q_JP.T).max() <= 50 * eps * scale
    images_JP = process.images(np.eye(process.size)).double().numpy()
    assert np.abs(images_JP - Q_JP @ H_PP).max() <= 50 * eps * scale
    vectors_JP = C_JJ.T @ Q_JP
    true_J = np.linalg.norm(vectors_JP @ H_PP - ritz.values_J[:, None] * vectors_JP, axis=1)
    assert np.abs(true_J - ritz.residuals_J).max() <= 100 * eps * scale
    assert np.all(np.diff(ritz.values_J) >= 0)


@precisions
def test_the_basis_is_orthonormal_long_past_convergence(dtype: torch.dtype):
    """120 steps on outliers 10,000 times the bulk, which converge after a handful."""
    matrix_PP = oracles.planted(OUTLIERS)
    process = process_of(matrix_PP, dtype=dtype)

    for _ in range(6):
        advance(process, 20)
        check_invariants(process, matrix_PP, dtype)
    assert process.products == process.size == 120


@precisions
def test_there_are_no_ghosts(dtype: torch.dtype):
    """The plain recurrence returns the largest eigenvalue several times, this process once."""
    matrix_PP = oracles.planted(OUTLIERS)
    start_P = torch.randn(150, generator=torch.Generator().manual_seed(9), dtype=dtype)
    plain = oracles.lanczos_without_reorthogonalisation(matrix_PP.to(dtype), start_P, 60)
    process = process_of(matrix_PP, dtype=dtype)
    advance(process, 60)
    ours = process.ritz().values_J

    assert np.sum(np.abs(plain - 1e4) < 1) > 1
    assert np.sum(np.abs(ours - 1e4) < 1) == 1
    assert np.sum(np.abs(ours - 3e3) < 1) == 1


@precisions
@pytest.mark.parametrize("capacity", [9, 12, 40])
def test_thick_restarts_keep_the_invariants(dtype: torch.dtype, capacity: int):
    """The projection after a restart is measured, arrowhead and all; the residual goes on."""
    matrix_PP = oracles.planted(OUTLIERS)
    process = process_of(matrix_PP, capacity=capacity, dtype=dtype)

    for _ in range(12):
        advance(process, 7)
        check_invariants(process, matrix_PP, dtype)
    assert process.products == 84
    assert process.size <= capacity
    assert process.exhausted == 0


@precisions
def test_restarts_let_no_vector_lose_its_length(dtype: torch.dtype):
    """However many: what is kept has converged, so nothing else would ever correct it."""
    matrix_PP = oracles.planted(OUTLIERS)
    process = process_of(matrix_PP, capacity=9, dtype=dtype)

    advance(process, 900)

    lengths_J = np.linalg.norm(basis_of(process), axis=1)
    assert np.abs(lengths_J - 1).max() < 8 * EPS[dtype]


def test_restarts_lose_no_progress():
    """With room for 12 vectors the outliers still converge, as eigenvalues of the matrix."""
    matrix_PP = oracles.planted(OUTLIERS)
    process = process_of(matrix_PP, capacity=12)
    advance(process, 100)
    ritz = process.ritz()

    np.testing.assert_allclose(ritz.values_J[[-1, -2, -3, -4]], [1e4, 3e3, 1e3, 100], rtol=1e-10)
    assert ritz.residuals_J[-4:].max() < 1e-6


@precisions
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_an_invariant_krylov_space_is_noticed(dtype: torch.dtype, rank: int):
    """Of rank r, a start vector reaches r + 1 dimensions; after that every direction is fresh.

    One step more may pass first: the last coupling is small, and the round-off over it is not.
    """
    matrix_PP = oracles.planted(np.concatenate([np.arange(rank, 0, -1.0), np.zeros(60 - rank)]))
    process = process_of(matrix_PP, dtype=dtype)

    advance(process, rank)
    assert process.exhausted == 0
    advance(process, 2)
    noticed = process.exhausted
    assert noticed in (1, 2)
    advance(process, 20)
    assert process.exhausted == noticed + 20
    check_invariants(process, matrix_PP, dtype)
    found = np.sort(process.ritz().values_J)[::-1][:rank]
    np.testing.assert_allclose(found, np.arange(rank, 0, -1.0), rtol=100 * EPS[dtype])


@precisions
@pytest.mark.parametrize("capacity", [9, 12, 40])
def test_images_are_what_the_operator_makes_of_the_vectors(dtype: torch.dtype, capacity: int):
    """Of Ritz vectors and of any other combination, through restarts and a fresh direction."""
    matrix_PP = oracles.planted(OUTLIERS)
    process = process_of(matrix_PP, capacity=capacity, dtype=dtype)
    mixes = np.random.default_rng(0)
    for _ in range(6):
        advance(process, 11)
        process.refresh()
        coefficients_JK = np.hstack(
            [process.ritz().coefficients_JJ, mixes.standard_normal((process.size, 3))]
        )

        vectors_KP = process.vectors(coefficients_JK).double()
        images_KP = process.images(coefficients_JK).double()

        lengths_K = vectors_KP.norm(dim=1, keepdim=True)
        off_KP = (images_KP - vectors_KP @ matrix_PP) / lengths_K
        assert off_KP.abs().max() < 50 * EPS[dtype] * 1e4
    assert process.products == 66


@precisions
@pytest.mark.parametrize("rank", [0, 3])
def test_a_basis_is_filled_without_products(dtype: torch.dtype, rank: int):
    """By orthonormal directions that the operator maps to nothing, once fresh ones were such."""
    values = np.concatenate([np.arange(rank, 0, -1.0), np.zeros(60 - rank)])
    # Diagonal, so that what is mapped to nothing is so exactly.
    matrix_PP = torch.diag(torch.from_numpy(values))
    process = process_of(matrix_PP, dtype=dtype)
    process.negligible = 1e-3
    while process.nulls < 2:
        advance(process, 1)
    spent, size = process.products, process.size
    assert size < 20

    process.fill(20)
    process.fill(5)

    assert process.size == 20
    assert process.products == spent
    check_invariants(process, matrix_PP, dtype)
    np.testing.assert_allclose(
        np.sort(process.ritz().values_J)[::-1], values[:20], atol=100 * EPS[dtype]
    )


def test_a_basis_is_filled_to_its_capacity_and_to_the_whole_space():
    zero_PP = torch.zeros(6, 6, dtype=torch.float64)
    tight, roomy = process_of(zero_PP, capacity=4), process_of(zero_PP)

    tight.fill(100)
    roomy.fill(100)

    assert (tight.size, tight.full, tight.complete) == (4, True, False)
    assert (roomy.size, roomy.full, roomy.complete) == (6, True, True)
    for process in (tight, roomy):
        check_invariants(process, zero_PP, torch.float64)


def test_fresh_directions_mapped_to_nothing_are_counted():
    """Two copies of 1 over zeros: the start does not count, nor what a direction leaves over."""
    matrix_PP = torch.diag(torch.tensor([1.0, 1.0, *[0.0] * 28], dtype=torch.float64))
    process = process_of(matrix_PP)

    counts = []
    for _ in range(8):
        process.step()
        counts.append(process.nulls)

    # The start, what it leaves over, a fresh one with the second copy, what that leaves; then
    # every direction is fresh and null.
    assert counts == [0, 0, 0, 0, 1, 2, 3, 4]
    assert process.exhausted == 6


def test_a_fresh_direction_that_is_mapped_to_something_begins_the_count_anew():
    """What is something and what nothing is the caller's to say, and only fresh ones count."""
    process = process_of(oracles.planted(OUTLIERS))
    advance(process, 5)
    process.refresh()
    process.step()  # what waited before
    process.negligible = 1e9
    process.step()
    assert (process.nulls, process.waiting) == (1, 1)
    process.negligible = 0.0
    process.step()  # of the old chain
    assert process.nulls == 1
    process.refresh()
    advance(process, 2)
    assert process.nulls == 0


@pytest.mark.parametrize("capacity", [14, 60])
def test_what_is_negligible_is_dropped_and_still_counted(capacity: int):
    """The Krylov space is exhausted early; residuals still say what was left, also restarted."""
    values = np.concatenate([[4.0, 3.0, 2.0], 1e-3 * np.linspace(-1, 1, 57)])
    matrix_PP = oracles.planted(values)
    process = process_of(matrix_PP, capacity=capacity)
    process.negligible = 5e-3
    advance(process, 30)
    ritz = process.ritz()
    Q_JP, H_PP = basis_of(process), matrix_PP.numpy()
    vectors_JP = ritz.coefficients_JJ.T @ Q_JP
    true_J = np.linalg.norm(vectors_JP @ H_PP - ritz.values_J[:, None] * vectors_JP, axis=1)

    assert process.exhausted > 10
    assert ritz.residuals_J.max() > 1e-4
    # What was dropped may come back into the basis, so the sum may say too much; and two that
    # were dropped need not be orthogonal, so it may say too little by a little.
    assert np.all(true_J <= 1.5 * ritz.residuals_J + 1e-12)
    exact = process_of(matrix_PP)
    advance(exact, 30)
    assert exact.exhausted == 0


def test_a_direction_followed_ahead_leaves_its_rest_first():
    """Without, what is left over waits behind the others."""
    matrix_PP = oracles.planted(OUTLIERS)
    processes = [process_of(matrix_PP), process_of(matrix_PP)]
    for process, ahead in zip(processes, (False, True), strict=True):
        advance(process, 5)
        process.refresh()
        process.step()  # what waited before the fresh direction
        assert process.waiting == 2
        process.step(ahead=ahead)  # the fresh one
        process.step(ahead=ahead)
        assert process.waiting == 2
        check_invariants(process, matrix_PP, torch.float64)

    behind, followed = (basis_of(process) for process in processes)
    np.testing.assert_allclose(behind[:7], followed[:7], atol=1e-12)
    rest_P = matrix_PP.numpy() @ followed[6]
    rest_P -= followed[:7].T @ (followed[:7] @ rest_P)
    assert abs(followed[7] @ rest_P) > 0.9 * np.linalg.norm(rest_P)
    assert abs(behind[7] @ rest_P) < 0.5 * np.linalg.norm(rest_P)


@pytest.mark.parametrize("capacity", [14, 1000])
def test_what_came_of_a_look_is_kept_apart(capacity: int):
    """Of a value that occurs twice, the copy that was there before has no share, the other all.

    The shares are those of the vectors in the span of the basis before, also across restarts.
    """
    values = np.concatenate([[30.0, 20.0, 20.0], oracles.bulk(147, -6.0, 6.0)])
    process = process_of(oracles.planted(values), capacity=capacity)
    advance(process, 14)
    process.restart(process.ritz(), np.arange(-5, 0) + process.size)
    before_JP = basis_of(process)
    first = process.ritz()
    assert not process.sought(first.coefficients_JJ).any()
    assert (np.abs(first.values_J - 20) < 1e-3).sum() == 1

    process.look()
    process.step()  # what waited before the fresh direction
    advance(process, 16, ahead=True)

    ritz = process.ritz()
    copies = np.abs(ritz.values_J - 20) < 1e-3
    shares_J = process.sought(ritz.coefficients_JJ)
    vectors_JP = ritz.coefficients_JJ.T @ basis_of(process)
    known_J = ((vectors_JP @ before_JP.T) ** 2).sum(1)
    assert copies.sum() == 2
    assert shares_J[copies].sum() == pytest.approx(1, abs=1e-6)
    assert shares_J[np.abs(ritz.values_J - 30) < 1e-3] == pytest.approx(0, abs=1e-6)
    let_go = 0.01 if capacity == 14 else 1e-9  # of what the basis was before, in restarts
    assert np.all(shares_J <= 1 - known_J + let_go)
    process.look()
    assert not process.sought(ritz.coefficients_JJ).any()


def test_the_zero_operator_gives_directions_all_the_same():
    matrix_PP = torch.zeros(20, 20, dtype=torch.float64)
    process = process_of(matrix_PP)
    advance(process, 10)

    assert process.exhausted == 10
    check_invariants(process, matrix_PP, torch.float64)
    assert np.all(process.ritz().values_J == 0)


@precisions
@pytest.mark.parametrize("values", [[4.0, 2, 1, -1, -3, 0.5], [2.0, 2, 2, 1, 1, 0]], ids=str)
def test_a_complete_basis_has_all_eigenvalues_and_no_residual(
    dtype: torch.dtype, values: list[float]
):
    """Six steps in six dimensions, repeated eigenvalues included."""
    process = process_of(oracles.planted(values), dtype=dtype)
    assert not process.complete
    advance(process, 6)
    ritz = process.ritz()

    assert process.complete
    assert process.capacity == 6
    np.testing.assert_allclose(ritz.values_J, np.sort(values), atol=50 * EPS[dtype])
    assert np.all(ritz.residuals_J == 0)
    check_invariants(process, oracles.planted(values), dtype)


def test_the_start_vector_s_length_does_not_matter():
    matrix_PP = oracles.planted(OUTLIERS)
    start_P = torch.ones(150, dtype=torch.float64)
    runs = [
        Lanczos(matrix_PP.mv, factor * start_P, capacity=20, generator=torch.Generator())
        for factor in (1.0, 1024.0)
    ]
    for run in runs:
        advance(run, 10)

    assert np.array_equal(runs[0].ritz().values_J, runs[1].ritz().values_J)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_named(bad: float):
    products = 0

    def matvec(v_P: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return torch.flip(v_P, [0]) if products < 3 else v_P * bad

    start_P = torch.linspace(1, 2, 8)
    process = Lanczos(matvec, start_P, capacity=8, generator=torch.Generator())
    with pytest.raises(NonFiniteError, match="product 3"):
        advance(process, 5)


@precisions
@pytest.mark.parametrize("capacity", [1000, 14])
def test_several_starts_keep_the_invariants(dtype: torch.dtype, capacity: int):
    """Through restarts, and with a fresh direction followed while the others wait."""
    matrix_PP, asked = oracles.planted(OUTLIERS), []
    process = process_of(matrix_PP, capacity=capacity, dtype=dtype, starts=3, asked=asked)
    advance(process, 12, keep=6)
    process.refresh()
    advance(process, 3, keep=6)
    advance(process, 4, keep=6, ahead=True)

    # Blocks of three, one of four with the fresh direction, and one direction alone, which it is.
    assert asked == [3, 3, 3, 3, 4, 1, 1, 1]
    assert process.products == sum(asked)
    check_invariants(process, matrix_PP, dtype)


def test_a_block_is_taken_once_for_all_that_wait():
    """It is ready for those that come next, whose steps cost nothing."""
    asked: list[int] = []
    process = process_of(oracles.planted(OUTLIERS), starts=4, asked=asked)

    ready = []
    for _ in range(8):
        process.step()
        ready.append(process.ready)

    assert asked == [4, 4]
    assert ready == [True, True, True, False] * 2


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5])
def test_as_many_copies_show_as_there_are_starts(copies: int):
    """Of an eigenvalue that is repeated, and no more."""
    values = np.concatenate([np.full(copies, 9.0), oracles.bulk(140)])
    process = process_of(oracles.planted(values), starts=4)
    advance(process, 40)

    found = np.abs(process.ritz().values_J - 9) < 1e-9
    assert found.sum() == min(copies, 4)


def test_more_starts_than_dimensions():
    """The basis is complete, and nothing waits."""
    process = process_of(oracles.planted([3.0, 2, 1]), starts=8)
    advance(process, 3)

    assert process.complete
    assert process.waiting == 0
    np.testing.assert_allclose(process.ritz().values_J, [1, 2, 3])


def test_starts_mapped_to_nothing_are_counted():
    """Of four of them the operator that is zero maps every one but the first, fresh, to nothing."""
    process = process_of(torch.zeros(20, 20, dtype=torch.float64), starts=4)
    advance(process, 4)

    assert process.nulls == 3
    assert process.exhausted == 1
