"""Leading eigenpairs of a symmetric operator, each with the residual that vouches for it.

"Leading" is by largest magnitude with the sign kept, so a spectrum may hold negative values.
The largest-magnitude pairs cannot show that a stationary point is a minimum; that needs the
smallest algebraic eigenvalue, which comes out of the same Krylov basis: if one of the leading
pairs is negative, the most negative of them is it, for everything outside the set is smaller in
magnitude; otherwise the lowest Ritz value is, once it has converged too.

A solver's own error estimate is not a proof. Every pair's residual |Hv − λv| is recomputed from
a fresh product after the solve, and the eigenvalue returned is the Rayleigh quotient of that
product, the best that the vector gives.

Tolerances are relative to |λ| for the pairs that are wanted, and to |λ_K| for the smallest
algebraic eigenvalue, which may be zero. No tolerance can be met below the round-off of the
products, so residuals below `ROUND_OFF` · eps · |λ_1| count as converged.

Letters: P parameters, K pairs.

Source: B. N. Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), ch. 4 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.lanczos import Lanczos, Ritz
from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError

Floats = NDArray[np.floating]

ROUND_OFF = 32
"""Multiples of eps · |λ_1| that the residual of an exact pair shows in the products here."""

_BASIS_BYTES = 1 << 29
_CHECK_EVERY = 4
_SECOND_LOOK = 16
"""Products from a fresh direction before a set of pairs is believed complete."""


@dataclass(frozen=True)
class Smallest:
    """The smallest algebraic eigenvalue, its residual |Hv − λv| and whether that met the bound."""

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class EigenPairs:
    """K eigenpairs and what vouches for them.

    Attributes:
        values_K: Sorted by |λ|, largest first, sign kept; float64.
        vectors_KP: Orthonormal rows, in the operator's dtype; the entry of largest magnitude
            in each is positive, so that a sign is a fact and not an accident.
        residuals_K: |Hv − λv|, recomputed after the solve.
        converged_K: Whether residual <= rtol·|λ|, or is the round-off of the products.
        smallest: The smallest algebraic eigenvalue.
        products: Products spent, those of the recomputation included.
    """

    values_K: Floats
    vectors_KP: Floats
    residuals_K: Floats
    converged_K: NDArray[np.bool_]
    smallest: Smallest
    products: int


def leading_eigenpairs(
    matvec: MatVec,
    *,
    dim: int,
    k: int,
    rtol: float,
    max_products: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> EigenPairs:
    """The `k` eigenpairs of largest magnitude of a symmetric operator, by Lanczos.

    Args:
        matvec: `v_P -> (Hv)_P`, symmetric and deterministic.
        dim: P, the number of rows.
        k: Pairs wanted, `1 <= k < dim`.
        rtol: A pair has converged when `|Hv − λv| <= rtol * |λ|`.
        max_products: Bound on the products of the search; reaching it is reported, not raised.
        generator: Gives the start vector; on the CPU.
        dtype: Of the vectors that the operator takes.
        device: Of the vectors that the operator takes; the CPU unless given.

    Raises:
        ValueError: `k` is not in 1..dim−1.
        NonFiniteError: The operator returned NaN or infinity.
    """
    check_count(k, dim)
    start_P = torch.randn(dim, generator=generator, dtype=dtype).to(device or "cpu")
    room = _BASIS_BYTES // (dim * start_P.element_size())
    process = Lanczos(
        matvec, start_P, capacity=max(2 * k + 20, min(room, 1000)), generator=generator
    )
    floor = ROUND_OFF * torch.finfo(dtype).eps
    # A Krylov space holds one copy of each eigenvalue, however often that is repeated. A set of
    # pairs is believed only when a look from a fresh direction has found none larger.
    believed_K, until = None, 0

    while True:
        process.step()
        spent = process.products >= max_products
        due = process.size >= k + 1 and process.products % _CHECK_EVERY == 0
        if not (due or spent or process.full or process.complete):
            continue
        ritz = process.ritz()
        leading_K = np.argsort(-np.abs(ritz.values_J), kind="stable")[:k]
        largest, last = np.abs(ritz.values_J[leading_K[[0, -1]]])
        bounds_K = np.maximum(rtol * np.abs(ritz.values_J[leading_K]), floor * largest)
        done = process.size > k and bool((ritz.residuals_J[leading_K] <= bounds_K).all())
        done &= bool(ritz.residuals_J[0] <= max(rtol * last, floor * largest))
        if spent or process.complete:
            break
        look = done and process.products >= until
        if look:
            found_K = np.abs(ritz.values_J[leading_K])
            if believed_K is not None and bool((found_K <= believed_K + bounds_K).all()):
                break
            believed_K, until = found_K, process.products + _SECOND_LOOK
        if process.full:
            process.restart(ritz, _kept(ritz, k, process.capacity))
        if look:
            process.refresh()

    chosen = [*leading_K, 0] if 0 not in leading_K else list(leading_K)
    vectors_KP = process.vectors(ritz.coefficients_JJ[:, chosen])
    return certified(matvec, vectors_KP, k=min(k, process.size), rtol=rtol, spent=process.products)


def certified(matvec: MatVec, vectors_KP: Tensor, *, k: int, rtol: float, spent: int) -> EigenPairs:
    """Eigenpairs from vectors: Rayleigh quotients and residuals from fresh products.

    Args:
        matvec: The operator.
        vectors_KP: Orthonormal rows: `k` leading ones, and the vector of the smallest algebraic
            eigenvalue after them where it is not among them.
        k: How many are leading.
        rtol: See `leading_eigenpairs`.
        spent: Products spent until now.
    """
    if not len(vectors_KP):
        nothing = Smallest(float("nan"), float("nan"), converged=False)
        none = np.empty(0)
        return EigenPairs(none, vectors_KP.cpu().numpy(), none, none.astype(bool), nothing, spent)
    values, residuals = np.empty(len(vectors_KP)), np.empty(len(vectors_KP))
    for i, v_P in enumerate(vectors_KP):
        image_P, unit_P = matvec(v_P).double(), v_P.double()
        values[i] = float(unit_P @ image_P) / float(unit_P @ unit_P)
        residuals[i] = float((image_P - values[i] * unit_P).norm())
    if not np.isfinite(residuals).all():
        raise NonFiniteError("a product of the operator is NaN or infinite at an eigenvector")
    order = np.lexsort((-values[:k], -np.abs(values[:k])))
    floor = ROUND_OFF * torch.finfo(vectors_KP.dtype).eps * float(np.abs(values).max())
    leading, errors = values[:k][order], residuals[:k][order]
    lowest = int(np.argmin(values))
    bound = max(rtol * float(np.abs(leading[-1])), floor)
    return EigenPairs(
        values_K=leading,
        vectors_KP=_fix_signs(vectors_KP[:k].cpu().numpy()[order]),
        residuals_K=errors,
        converged_K=errors <= np.maximum(rtol * np.abs(leading), floor),
        smallest=Smallest(
            float(values[lowest]),
            float(residuals[lowest]),
            converged=bool(residuals[lowest] <= bound),
        ),
        products=spent + len(vectors_KP),
    )


def check_count(k: int, dim: int) -> None:
    """Refuse a number of pairs that the operator does not have.

    Raises:
        ValueError: `k` is not in 1..dim−1.
    """
    if not 1 <= k < dim:
        raise ValueError(f"k={k} eigenpairs of a {dim}×{dim} operator; k must be in 1..{dim - 1}")


def _kept(ritz: Ritz, k: int, capacity: int) -> NDArray[np.intp]:
    """Which Ritz pairs a thick restart keeps: the leading ones with a margin, and the lowest."""
    margin = k + max(4, (capacity - k) // 3)
    leading = np.argsort(-np.abs(ritz.values_J), kind="stable")[:margin]
    return np.union1d(leading, np.arange(min(3, len(ritz.values_J))))


def _fix_signs(vectors_KP: Floats) -> Floats:
    peak = np.abs(vectors_KP).argmax(axis=1)
    signs = np.sign(vectors_KP[np.arange(len(vectors_KP)), peak])
    return vectors_KP * np.where(signs == 0, 1, signs).astype(vectors_KP.dtype)[:, None]
