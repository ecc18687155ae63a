"""Linear systems and lowest eigenvalues from one Lanczos basis, kept orthogonal.

A system A w = b is solved in the Krylov space of b by Galerkin's condition, w = Q T⁻¹ Qᵀ b. For
a positive definite A that is the method of conjugate gradients; unlike it, it neither breaks down
where A has a few negative eigenvalues nor loses its way once the space is exhausted. Residuals
come from the images of the basis and are facts; the best w met on the way counts, and none is
worse than w = 0.

Letters: P rows of an operator.

Source: C. C. Paige, M. A. Saunders, Solution of sparse indefinite systems of linear equations, SIAM
J. Numer. Anal. 12 (1975) 617-629.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.lanczos import Lanczos, room
from spectra.curvature.operator import MatVec

_CHECK_EVERY = 4
_GOOD, _PATIENCE = 1e-3, 32
"""Below that residual, products after which one that has not halved is taken for rounding. In
float32 a system asked for to 1e-6 ends at 3e-5 on a real network, and used up its budget there."""
_FRESH = 1.0
"""Length of the random part of a start, those near being of length 1. With a tenth, a first
eigenvalue that is not negative converges before a negative one hidden from them comes up: that
happened in 1 of 20 starts, and the whole costs a seventh more products."""


@dataclass(frozen=True)
class Solved:
    """A solution w of A w = b, ‖A w − b‖ / ‖b‖, and the products spent."""

    w_P: Tensor
    residual: float
    products: int


def solved(
    matvec: MatVec,
    b_P: Tensor,
    *,
    rtol: float,
    max_products: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Solved:
    """Solve A w = b, A symmetric.

    Args:
        matvec: `v_P -> (Av)_P`.
        b_P: The right-hand side; where it is zero, so is w.
        rtol: Relative residual wanted; where the space is exhausted or rounding is all that is
            left before, what there is.
        max_products: Bound on products.
        dtype: Of the vectors that the operator takes, and of the basis.
        generator: Required by the process.

    Raises:
        NonFiniteError: A product is NaN or infinite.
    """
    norm = float(b_P.double().norm())
    if norm == 0.0:
        return Solved(torch.zeros_like(b_P), 0.0, 0)
    process = Lanczos(
        matvec, (b_P / norm).to(dtype), capacity=_room(b_P, dtype, max_products),
        generator=generator,
    )  # fmt: skip
    best, best_J1 = 1.0, np.zeros((1, 1))
    halved, halved_at = 1.0, 0
    while True:
        process.step()
        last = process.full or process.complete or process.exhausted > 0
        last |= process.products >= max_products
        if not (last or process.products % _CHECK_EVERY == 0):
            continue
        ritz = process.ritz()
        # A projection of an indefinite A may be singular where A is not, at any one step.
        some_J = np.abs(ritz.values_J) > torch.finfo(dtype).eps * np.abs(ritz.values_J).max()
        weights_J = ritz.coefficients_JJ[0, some_J] / ritz.values_J[some_J]
        coefficients_J1 = norm * (ritz.coefficients_JJ[:, some_J] @ weights_J)[:, None]
        rest_P = process.images(coefficients_J1)[0].to(b_P) - b_P
        residual = float(rest_P.double().norm()) / norm
        if residual < best:
            best, best_J1 = residual, coefficients_J1
        if best <= halved / 2 or best > _GOOD:
            halved, halved_at = best, process.products
        last |= process.products - halved_at >= _PATIENCE
        if last or best <= rtol:
            unused = ((0, process.size - len(best_J1)), (0, 0))
            w_P = process.vectors(np.pad(best_J1, unused))[0].to(b_P)
            return Solved(w_P, best, process.products)


@dataclass(frozen=True)
class Lowest:
    """The lowest eigenvalues, ascending: all negative ones found and the first that is not.

    Attributes:
        values_J: Rayleigh quotients.
        vectors_JP: Their unit vectors.
        residuals_J: |Av − λv|.
        products: Products spent.
    """

    values_J: NDArray[np.float64]
    vectors_JP: Tensor
    residuals_J: NDArray[np.float64]
    products: int

    @property
    def negative(self) -> int:
        """How many are negative."""
        return int((self.values_J < 0).sum())


def lowest(
    matvec: MatVec,
    near: Sequence[Tensor],
    *,
    dim: int,
    shift: float,
    atol: float,
    max_products: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Lowest:
    """The lowest eigenvalues of A + shift·I, until the first that is not negative has converged.

    Of a repeated eigenvalue a Krylov space holds one copy, and others only by round-off.

    Args:
        matvec: `v_P -> (Av)_P`.
        near: Vectors thought to be rich in the lowest, none of them zero.
        dim: P.
        shift: What is added to every eigenvalue.
        atol: Bound on the residuals.
        max_products: Bound on products; reaching it shows in the residuals.
        dtype: Of the vectors that the operator takes.
        device: Of the vectors that the operator takes.
        generator: Draws the start; on the CPU.

    Raises:
        NonFiniteError: A product is NaN or infinite.
    """
    start_P = torch.randn(dim, generator=generator, dtype=dtype).to(device)
    start_P *= _FRESH / start_P.norm()
    for near_P in near:
        start_P += (near_P / near_P.norm()).to(start_P)
    process = Lanczos(
        matvec, start_P, capacity=max(2, _room(start_P, dtype, max_products)), generator=generator
    )
    while True:
        process.step()
        last = process.full or process.complete or process.products >= max_products
        last |= process.exhausted > 1
        if not (last or process.products % _CHECK_EVERY == 0):
            continue
        ritz = process.ritz()
        values_J = ritz.values_J + shift
        wanted = min(int((values_J < 0).sum()) + 1, len(values_J))
        if last or bool((ritz.residuals_J[:wanted] <= atol).all()):
            vectors_JP = process.vectors(ritz.coefficients_JJ[:, :wanted])
            return Lowest(
                values_J[:wanted], vectors_JP, ritz.residuals_J[:wanted], process.products
            )


def every(matvec: MatVec, *, dim: int, shift: float, like: Tensor) -> Lowest:
    """What `lowest` gives, for an operator small enough to be written out."""
    identity_PP = torch.eye(dim, dtype=like.dtype, device=like.device)
    matrix_PP = torch.stack([matvec(e_P) for e_P in identity_PP]).double()
    values_P, vectors_PP = torch.linalg.eigh((matrix_PP + matrix_PP.t()) / 2)
    values = values_P.cpu().numpy() + shift
    wanted = min(int((values < 0).sum()) + 1, dim)
    rows_JP = vectors_PP.t()[:wanted].to(like)
    return Lowest(values[:wanted], rows_JP, np.zeros(wanted), dim)


def _room(b_P: Tensor, dtype: torch.dtype, wanted: int) -> int:
    return max(2, min(wanted, room(b_P.numel(), dtype)))
