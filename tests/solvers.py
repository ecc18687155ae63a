"""Matrices of known spectrum, each solver on them, and what a dense solver says of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from spectra.curvature.arpack import leading_eigenpairs_arpack
from spectra.curvature.eigen import EigenPairs, leading_eigenpairs

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
    with mock.patch("spectra.curvature.lanczos._BASIS_BYTES", 1):
        return leading_eigenpairs(matvec, **how)


def several_restarted(matvec: Callable[[Tensor], Tensor], **how: object) -> EigenPairs:
    """The same from four starts."""
    with mock.patch("spectra.curvature.lanczos._BASIS_BYTES", 1):
        return several(matvec, **how)


every = pytest.mark.parametrize("solve", [lanczos, several, restarted, several_restarted, eigsh])
either = pytest.mark.parametrize("solve", [lanczos, several, eigsh])
ours = pytest.mark.parametrize("solve", [lanczos, several])


@dataclass(frozen=True)
class Planted:
    """Eigenvalues and how many of the leading ones are asked for."""

    values: np.ndarray
    k: int


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
