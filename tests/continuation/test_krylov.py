"""Linear systems and lowest eigenvalues against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from oracles import bulk, planted
from spectra.continuation.krylov import Lowest, every, lowest, solved
from spectra.errors import NonFiniteError

SPECTRA = {
    "definite": np.linspace(0.5, 3.0, 60),
    "indefinite": np.r_[-2.0, -0.3, np.linspace(0.2, 3.0, 58)],
    "clustered": np.r_[-1.0, np.full(30, 0.5), np.full(29, 0.5 + 1e-7)],
    "both signs alike": np.r_[-np.linspace(1, 2, 30), np.linspace(1, 2, 30)],
    "nearly singular": np.r_[1e-3, np.linspace(0.5, 3.0, 59)],
    "large and small": np.r_[np.geomspace(1e-2, 50.0, 60)],
}


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix_PP: Tensor) -> None:
        self.matrix_PP, self.products = matrix_PP, 0

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Av."""
        self.products += 1
        return self.matrix_PP @ v_P


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def right_side(size: int) -> Tensor:
    return torch.randn(size, generator=drawn(5), dtype=torch.float64)


# ------------------------------------------------------------------------------- linear systems


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_solution_is_that_of_a_dense_solve(name: str, dtype: torch.dtype):
    matrix_PP, b_P = planted(SPECTRA[name]), right_side(60)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    magnitudes_P = np.abs(SPECTRA[name])
    bound = 2 * rtol * magnitudes_P.max() / magnitudes_P.min()

    found = solved(
        Counted(matrix_PP.to(dtype)), b_P, rtol=rtol, max_products=200, dtype=dtype,
        generator=drawn(),
    )  # fmt: skip

    wanted_P = torch.linalg.solve(matrix_PP, b_P)
    assert found.w_P.dtype == torch.float64, "as the right-hand side"
    assert float((found.w_P - wanted_P).norm()) <= bound * float(wanted_P.norm())
    actual = float((matrix_PP @ found.w_P - b_P).norm() / b_P.norm())
    floor = 8 * torch.finfo(dtype).eps * magnitudes_P.max() * float(wanted_P.norm() / b_P.norm())
    assert found.residual == pytest.approx(actual, rel=0.1, abs=floor), "a fact"


def test_digits_that_float32_does_not_have_are_not_chased():
    values = np.r_[-0.3, np.geomspace(1e-2, 5.0, 999)]
    matrix_PP, b_P = planted(values).float(), right_side(1000)

    found = solved(
        Counted(matrix_PP), b_P, rtol=1e-9, max_products=900, dtype=torch.float32,
        generator=drawn(),
    )  # fmt: skip

    assert 1e-9 < found.residual < 1e-4
    assert found.products < 400


def test_few_distinct_eigenvalues_take_as_many_products():
    """The Krylov space of b is then as small, and is exhausted."""
    matrix_PP, b_P = planted(np.repeat([-1.0, 0.5, 2.0], 20)), right_side(60)
    counted = Counted(matrix_PP)

    found = solved(
        counted, b_P, rtol=1e-12, max_products=60, dtype=torch.float64, generator=drawn()
    )

    assert found.products == counted.products <= 4
    torch.testing.assert_close(found.w_P, torch.linalg.solve(matrix_PP, b_P), rtol=0, atol=1e-12)


def test_exhausted_space_gives_the_part_that_can_be_solved():
    """The right-hand side within the range of a singular operator, as on a tangent space."""
    matrix_PP = planted(np.r_[np.zeros(7), np.linspace(-1, 1, 6)])
    b_P = matrix_PP @ right_side(13)

    found = solved(
        Counted(matrix_PP), b_P, rtol=1e-13, max_products=99, dtype=torch.float64,
        generator=drawn(),
    )  # fmt: skip

    torch.testing.assert_close(
        found.w_P, torch.linalg.pinv(matrix_PP, rtol=1e-8) @ b_P, rtol=0, atol=1e-10
    )


def test_zero_is_solved_for_nothing():
    counted = Counted(planted([1.0, 2.0, 3.0]))

    found = solved(
        counted, torch.zeros(3), rtol=1e-3, max_products=9, dtype=torch.float32, generator=drawn()
    )

    assert (float(found.w_P.norm()), found.residual, found.products) == (0.0, 0.0, 0)
    assert counted.products == 0


@pytest.mark.parametrize("products", [1, 2, 3])
def test_singular_projection_of_a_regular_operator(products: int):
    """Of ((0, 1), (1, 0)) and e₁ the first projection is (0): no step, not an infinite one."""
    matrix_PP = torch.block_diag(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(3)).double()
    b_P = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)

    found = solved(
        Counted(matrix_PP), b_P, rtol=1e-9, max_products=products, dtype=torch.float64,
        generator=drawn(),
    )  # fmt: skip

    if products == 1:
        assert (float(found.w_P.norm()), found.residual) == (0.0, 1.0)
    else:
        torch.testing.assert_close(found.w_P, matrix_PP @ b_P)


@pytest.mark.parametrize("products", range(1, 31))
def test_cut_short_a_solution_is_never_worse_than_none(products: int):
    matrix_PP, b_P = planted(SPECTRA["both signs alike"]), right_side(60)
    counted = Counted(matrix_PP)

    found = solved(
        counted, b_P, rtol=1e-12, max_products=products, dtype=torch.float64, generator=drawn()
    )

    assert found.products == counted.products == products
    assert found.residual <= 1.0
    actual = float((matrix_PP @ found.w_P - b_P).norm() / b_P.norm())
    assert found.residual == pytest.approx(actual, rel=1e-9)


def test_operator_of_nothing_gives_nothing():
    found = solved(
        torch.zeros_like, right_side(5), rtol=1e-9, max_products=9, dtype=torch.float64,
        generator=drawn(),
    )  # fmt: skip

    assert (float(found.w_P.norm()), found.residual) == (0.0, 1.0)


def test_product_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError):
        solved(
            lambda v_P: v_P * float("nan"), right_side(5), rtol=1e-9, max_products=9,
            dtype=torch.float64, generator=drawn(),
        )  # fmt: skip


# --------------------------------------------------------------------------- lowest eigenvalues


def find(
    matrix_PP: Tensor,
    near: Sequence[Tensor] = (),
    *,
    shift: float = 0.0,
    atol: float = 1e-6,
    max_products: int = 400,
    seed: int = 0,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Lowest:
    return lowest(
        product or Counted(matrix_PP), near, dim=len(matrix_PP), shift=shift, atol=atol,
        max_products=max_products, dtype=matrix_PP.dtype, device=matrix_PP.device,
        generator=drawn(seed),
    )  # fmt: skip


def agree(found: Lowest, matrix_PP: Tensor, shift: float, atol: float) -> None:
    """All negative eigenvalues of A + shift and one more, with their vectors."""
    exact = np.linalg.eigvalsh(matrix_PP.double().numpy()) + shift
    negative = int((exact < 0).sum())
    assert found.negative == negative
    wanted = exact[: min(negative + 1, len(exact))]
    np.testing.assert_allclose(found.values_J, wanted, rtol=0, atol=atol)
    vectors_JP = found.vectors_JP.double()
    torch.testing.assert_close(
        vectors_JP @ vectors_JP.T, torch.eye(len(wanted)).double(), rtol=0, atol=1e-5
    )
    images_JP = vectors_JP @ matrix_PP.double()
    values_J1 = torch.from_numpy(found.values_J - shift)[:, None]
    residuals_J = (images_JP - values_J1 * vectors_JP).norm(dim=1).numpy()
    assert (residuals_J <= found.residuals_J + atol).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [1e-3, 0.4, 2.5])
@pytest.mark.parametrize("values", [
    np.r_[-2.0, -0.3, bulk(97), 3.0], np.r_[-0.5, -0.49, -0.48, bulk(97, 0.1, 8.0)],
    np.r_[np.zeros(60), bulk(40, 0.5, 3.0)],
], ids=["outliers", "close", "null space"])  # fmt: skip
def test_lowest_are_those_of_a_dense_solver(values: np.ndarray, shift: float, dtype: torch.dtype):
    matrix_PP = planted(values)
    found = find(matrix_PP.to(dtype), shift=shift, atol=1e-5)

    agree(found, matrix_PP, shift, 1e-4)


@pytest.mark.parametrize("overlap", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("seed", range(4))
def test_lowest_is_found_from_a_start_that_nearly_hides_it(overlap: float, seed: int):
    """The start is all but the second lowest eigenvector, as along a branch past a crossing."""
    matrix_PP = planted(np.r_[-0.02, 0.01, bulk(198, 0.02, 4.0)])
    vectors_PP = torch.linalg.eigh(matrix_PP)[1].T
    near_P = vectors_PP[1] + overlap * vectors_PP[0]

    found = find(matrix_PP, [near_P], atol=1e-4, seed=seed)

    agree(found, matrix_PP, 0.0, 1e-4)


def test_start_that_is_an_eigenvector_and_starts_that_cancel():
    matrix_PP = planted(np.r_[-1.0, -0.5, bulk(78, 0.1, 1.0)])
    vectors_PP = torch.linalg.eigh(matrix_PP)[1].T

    agree(find(matrix_PP, [vectors_PP[1]]), matrix_PP, 0.0, 1e-6)
    agree(find(matrix_PP, [vectors_PP[1], -vectors_PP[1]]), matrix_PP, 0.0, 1e-6)


def test_budget_shows_in_the_residuals():
    matrix_PP = planted(np.r_[-0.01, bulk(299, 0.0, 5.0)])
    counted = Counted(matrix_PP)

    found = find(matrix_PP, atol=1e-9, max_products=8, product=counted)

    assert found.products == counted.products == 8
    assert found.residuals_J.max() > 1e-9


def test_all_negative_gives_all():
    matrix_PP = planted(np.linspace(-3.0, -1.0, 12))

    agree(find(matrix_PP), matrix_PP, 0.0, 1e-6)
    agree(find(matrix_PP, shift=9.0), matrix_PP, 9.0, 1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.45, -4.0])
def test_written_out_gives_the_same(shift: float):
    matrix_PP = planted(np.r_[-1.0, -0.4, -0.4, bulk(20, 0.1, 3.0)])
    counted = Counted(matrix_PP)

    found = every(counted, dim=23, shift=shift, like=matrix_PP[0, :0])

    agree(found, matrix_PP, shift, 1e-12)
    assert found.products == counted.products == 23
    assert found.residuals_J.max() == 0
