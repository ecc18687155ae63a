"""The Lanczos process with full reorthogonalisation and thick restarts.

A Krylov basis grows by one product a step. The projection of the operator onto the basis is
kept as a full symmetric matrix, measured and not assumed tridiagonal; that makes three things
one: an ordinary step, a thick restart (after which the projection is an arrowhead), and a fresh
direction after the Krylov space is exhausted.

Every new vector is orthogonalised against the whole basis, twice if once took away much of it
("twice is enough"). Without this, converged eigenvalues come back as copies: a solver of this
field returned the largest one seven times among thirty.

Letters: P rows of the operator, J vectors in the basis.

Source: K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
SIAM J. Matrix Anal. Appl. 22 (2000) 602-616; B. N. Parlett, The Symmetric Eigenvalue Problem
(SIAM, 1998), ch. 6 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of the basis: values_J (ascending), coefficients_JJ (columns), residuals_J.

    `residuals_J` are the norms |Hv − θv| that the recurrence implies, without further products.
    """

    values_J: NDArray[np.float64]
    coefficients_JJ: NDArray[np.float64]
    residuals_J: NDArray[np.float64]


class Lanczos:
    """A Krylov process of a symmetric operator.

    Args:
        matvec: `v_P -> (Hv)_P`, symmetric and deterministic.
        start_P: Start vector, not zero; its dtype and device are those of the basis.
        capacity: How many basis vectors there is memory for, at least 2.
        generator: Draws a fresh direction where the Krylov space is exhausted; on the CPU.

    Attributes:
        size: J, the vectors in the basis.
        products: Products spent.
        exhausted: How often the Krylov space was invariant to round-off.
    """

    def __init__(
        self, matvec: MatVec, start_P: Tensor, *, capacity: int, generator: torch.Generator
    ) -> None:
        self._matvec = matvec
        self._generator = generator
        self.capacity = min(capacity, start_P.numel())
        # Rows are allocated as they are used: a converged process never touches the rest.
        self._basis_JP = start_P.new_empty((self.capacity, start_P.numel()))
        self._projection_JJ = np.zeros((self.capacity, self.capacity))
        self._next_P = start_P / start_P.norm()
        self._coupling = 0.0
        self._given_up: list[NDArray[np.float64]] = []
        self._scale = 0.0
        self.size = 0
        self.products = 0
        self.exhausted = 0

    @property
    def full(self) -> bool:
        """Whether the basis must be restarted before it can grow."""
        return self.size == self.capacity

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size >= int(self._next_P.numel())

    def step(self) -> None:
        """Add a vector to the basis: one product.

        Raises:
            NonFiniteError: The product is NaN or infinite.
        """
        assert not self.full
        j = self.size
        self._basis_JP[j] = self._next_P
        self.size += 1
        image_P = self._matvec(self._next_P)
        self.products += 1
        before = float(image_P.norm())
        if not np.isfinite(before):
            raise NonFiniteError(
                f"product {self.products} of the operator is NaN or infinite; check the weights' "
                "scale or use runtime.dtype: float64"
            )
        self._scale = max(self._scale, before)
        rest_P, column_J, after = self._off_basis(image_P, before)
        self._projection_JJ[j, : j + 1] = self._projection_JJ[: j + 1, j] = column_J
        # What is left below the round-off of the product is not a direction.
        round_off = 4 * torch.finfo(image_P.dtype).eps * self._scale
        if self.complete:
            self._coupling = 0.0
        elif after <= round_off:
            self.exhausted += 1
            self._coupling = 0.0
            self._next_P = self._fresh()
        else:
            self._coupling = after
            self._next_P = rest_P / after

    def refresh(self) -> None:
        """Go on from a fresh direction: copies of a repeated eigenvalue show in no other way.

        What the basis lacks along the direction given up goes on counting as residual.
        """
        given_up_J = np.zeros(self.size)
        given_up_J[-1] = self._coupling
        self._given_up.append(given_up_J)
        self._coupling = 0.0
        self._next_P = self._fresh()

    def ritz(self) -> Ritz:
        """The Ritz pairs of the present basis."""
        # PyTorch's, not NumPy's: a second pool of BLAS threads would spin against the first.
        block_JJ = torch.from_numpy(self._projection_JJ[: self.size, : self.size])
        values_J, coefficients_JJ = (part.numpy() for part in torch.linalg.eigh(block_JJ))
        squares_J = (self._coupling * coefficients_JJ[-1]) ** 2
        for given_up_J in self._given_up:
            squares_J += (given_up_J @ coefficients_JJ[: len(given_up_J)]) ** 2
        return Ritz(values_J, coefficients_JJ, np.sqrt(squares_J))

    def vectors(self, coefficients_JK: NDArray[np.float64]) -> Tensor:
        """Ritz vectors as rows (K, P), orthonormal to round-off."""
        mixed_KJ = torch.from_numpy(np.ascontiguousarray(coefficients_JK.T)).to(self._basis_JP)
        return mixed_KJ @ self._basis_JP[: self.size]

    def restart(self, ritz: Ritz, keep: NDArray[np.intp]) -> None:
        """Shrink the basis to some Ritz vectors; the process goes on from the same residual.

        Args:
            ritz: The Ritz pairs of the present basis.
            keep: Indices of those kept, fewer than the capacity.
        """
        vectors_KP = self.vectors(ritz.coefficients_JJ[:, keep])
        self._given_up = [
            given_up_J @ ritz.coefficients_JJ[: len(given_up_J), keep]
            for given_up_J in self._given_up
        ]
        self.size = len(keep)
        self._basis_JP[: self.size] = vectors_KP
        self._projection_JJ[:] = 0.0
        self._projection_JJ[: self.size, : self.size] = np.diag(ritz.values_J[keep])

    def _off_basis(
        self, vector_P: Tensor, norm: float
    ) -> tuple[Tensor, NDArray[np.float64], float]:
        """A vector without its part in the basis, that part's coefficients, and the norm left."""
        basis_JP = self._basis_JP[: self.size]
        total_J = np.zeros(self.size)
        for _ in range(3):
            part_J = basis_JP @ vector_P
            vector_P = torch.addmv(vector_P, basis_JP.t(), part_J, alpha=-1)
            total_J += part_J.double().cpu().numpy()
            after = float(vector_P.norm())
            if after > norm / np.sqrt(2):
                break
            norm = after
        return vector_P, total_J, after

    def _fresh(self) -> Tensor:
        """A random unit vector orthogonal to the basis."""
        drawn_P = torch.randn(
            self._next_P.numel(), generator=self._generator, dtype=self._next_P.dtype
        ).to(self._next_P.device)
        rest_P, _, norm = self._off_basis(drawn_P, float(drawn_P.norm()))
        return rest_P / norm
