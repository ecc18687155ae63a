"""The Lanczos process with full reorthogonalisation and thick restarts.

A Krylov basis Q grows by one product a step. With B = QᵀHQ the images of the basis are

    H Q = Q B + Σ_i d_i c_iᵀ,

where the d_i are directions that wait to join the basis: one in the ordinary process, two or
more with several starts or once a fresh one has been added, as in the band Lanczos process. Their
products do not depend on each other and may be taken as a block. B is kept as a full symmetric
matrix, measured and not assumed tridiagonal. That makes three things one: an ordinary step, a thick
restart (after which B is an arrowhead), and a fresh direction after the Krylov space is exhausted
or to look for copies of an eigenvalue, of which a Krylov space holds no more than it has starts.

The images H Q are kept beside Q. They make residuals facts instead of estimates: for any
combination x = Q s of the basis, H x = (H Q) s holds by linearity, without a further product.

What a step leaves over below `negligible`, which the caller sets to a fraction of what counts as
converged, is not pursued: the Krylov space is exhausted to that precision.

Every new vector is orthogonalised against the whole basis, twice if once took away much of it
("twice is enough"). Without this, converged eigenvalues come back as copies: a solver of this
field returned the largest one seven times among thirty.

Letters: P rows of the operator, J vectors in the basis.

Source: K. Wu, H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
SIAM J. Matrix Anal. Appl. 22 (2000) 602-616; A. Ruhe, Implementation aspects of band Lanczos
algorithms, Math. Comp. 33 (1979) 680-687; B. N. Parlett, The Symmetric Eigenvalue Problem
(SIAM, 1998), ch. 6 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError

_FEW = 4
"""Basis vectors taken one by one at most."""
_BASIS_BYTES = 1 << 29
"""Memory for a basis and the images beside it."""


def room(dim: int, dtype: torch.dtype) -> int:
    """How many vectors of P = `dim` numbers and their images there is memory for."""
    return _BASIS_BYTES // (2 * dim * dtype.itemsize)


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
        matvec: `v_P -> (Hv)_P`, symmetric and deterministic; see `starts`.
        start_P: Start vector, not zero; its dtype and device are those of the basis.
        capacity: How many basis vectors there is memory for, at least 2.
        generator: Draws a fresh direction where the Krylov space is exhausted; on the CPU.
        starts: Directions to begin with, those beside the start vector fresh ones. With several,
            products are asked for as blocks, `v_BP -> (Hv)_BP`, of the directions that wait.

    Attributes:
        size: J, the vectors in the basis.
        products: Products spent.
        negligible: Norm below which what a step leaves over is dropped; 0 until set, and never
            effective below the round-off of a product.
        exhausted: How often the Krylov space was invariant to that precision.
        nulls: How many fresh directions in a row the operator has mapped to nothing.
    """

    def __init__(
        self,
        matvec: MatVec,
        start_P: Tensor,
        *,
        capacity: int,
        generator: torch.Generator,
        starts: int = 1,
    ) -> None:
        self._matvec, self._in_blocks = matvec, starts > 1
        self._generator = generator
        self.capacity = min(capacity, start_P.numel())
        # Rows are allocated as they are used: a converged process never touches the rest.
        self._basis_JP = start_P.new_empty((self.capacity, start_P.numel()))
        self._images_JP = torch.empty_like(self._basis_JP)
        self._projection_JJ = np.zeros((self.capacity, self.capacity))
        self._sought_JJ = np.zeros((self.capacity, self.capacity))
        self._waiting = [_Direction(start_P / start_P.norm(), np.zeros(0))]
        self._dropped: list[NDArray[np.float64]] = []
        self._scale = 0.0
        self.negligible = 0.0
        self.nulls = 0
        self.dim = start_P.numel()
        self.size = 0
        self.products = 0
        self.exhausted = 0
        for _ in range(min(starts, self.dim) - 1):
            self.refresh()

    @property
    def limit(self) -> float:
        """Norm up to which what the operator makes of a direction counts as nothing."""
        return max(self.negligible, 4 * torch.finfo(self._basis_JP.dtype).eps * self._scale)

    @property
    def full(self) -> bool:
        """Whether the basis must be restarted before it can grow."""
        return self.size == self.capacity

    @property
    def waiting(self) -> int:
        """How many directions wait to join the basis."""
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether the next direction's product has been taken already, in a block with others."""
        return bool(self._waiting) and self._waiting[0].image_P is not None

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self.dim

    def step(self, *, ahead: bool = False) -> None:
        """Add the next direction to the basis: one product, or none where it is `ready`.

        What it leaves over joins those that wait, at the end: one that waited for good, however
        weakly coupled, would hide what lies along it from all that come after.

        Args:
            ahead: Put what is left over first instead, to follow one direction for a while.

        Raises:
            NonFiniteError: The product is NaN or infinite.
        """
        assert not self.full
        j = self.size
        direction = self._waiting.pop(0)
        self._basis_JP[j] = direction.vector_P
        self.size += 1
        image_P = self._image(direction, [] if ahead else self._waiting)
        self._images_JP[j] = image_P
        before = float(image_P.norm())
        if not np.isfinite(before):
            raise NonFiniteError(
                f"product {self.products} of the operator is NaN or infinite; check the weights' "
                "scale or use runtime.dtype: float64"
            )
        self._scale = max(self._scale, before)
        limit = self.limit
        if direction.fresh:
            self.nulls = self.nulls + 1 if before <= limit else 0
        near = [*np.flatnonzero(direction.coefficients_J), j]
        rest_P, column_J, waiting, after = self._off_basis(image_P, before, near)
        self._sought_JJ[j, j] = direction.sought
        self._projection_JJ[j, : j + 1] = self._projection_JJ[: j + 1, j] = column_J
        for other, part in zip(self._waiting, waiting, strict=True):
            other.coefficients_J = np.append(other.coefficients_J, part)
        self._dropped = [np.append(coefficients_J, 0.0) for coefficients_J in self._dropped]
        coefficients_J = np.append(np.zeros(j), after)
        if after > limit:
            left_over = _Direction(rest_P / after, coefficients_J, sought=direction.sought)
            self._waiting.insert(0 if ahead else len(self._waiting), left_over)
        elif after > 0:
            self._dropped.append(coefficients_J)
        if self.complete:
            self._waiting.clear()
            self._dropped.clear()
        elif not self._waiting:
            self.exhausted += 1
            self.refresh()

    def _image(self, direction: _Direction, others: Sequence[_Direction]) -> Tensor:
        """The product of a direction, and in blocks also those of others that have none yet."""
        if direction.image_P is not None:
            return direction.image_P
        if not self._in_blocks:
            self.products += 1
            return self._matvec(direction.vector_P)
        others = [other for other in others if other.image_P is None]
        rows = [direction.vector_P, *(other.vector_P for other in others)]
        images_BP = self._matvec(torch.stack(rows))
        self.products += len(images_BP)
        for other, image_P in zip(others, images_BP[1:], strict=True):
            other.image_P = image_P
        return images_BP[0]

    def fill(self, size: int) -> None:
        """Grow the basis by directions that the operator maps to nothing, without products."""
        for j in range(self.size, min(size, self.capacity)):
            direction = self._waiting.pop()
            self._basis_JP[j] = direction.vector_P
            self._images_JP[j] = 0
            self._sought_JJ[j, j] = direction.sought
            self.size += 1
            for other in self._waiting:
                other.coefficients_J = np.append(other.coefficients_J, 0.0)
            self._dropped = [np.append(coefficients_J, 0.0) for coefficients_J in self._dropped]
            if not self._waiting and not self.complete:
                self.refresh()

    def look(self) -> None:
        """Add a fresh direction, and keep apart from now on what comes of it: see `sought`."""
        self._sought_JJ[:] = 0.0
        for direction in self._waiting:
            direction.sought = False
        self.refresh()

    def sought(self, coefficients_JK: NDArray[np.float64]) -> NDArray[np.float64]:
        """The shares (K,) of unit vectors that lie along what came of fresh directions.

        Those since the last `look`, and what the operator made of them: an eigenvector that the
        basis already had before has a small share, a further copy one of 1, or copies together.
        """
        block_JJ = self._sought_JJ[: self.size, : self.size]
        shares_K: NDArray[np.float64] = (coefficients_JK * (block_JJ @ coefficients_JK)).sum(0)
        return shares_K

    def refresh(self) -> None:
        """Add a fresh direction: copies of a repeated eigenvalue show in no other way."""
        vector_P = torch.randn(self.dim, generator=self._generator, dtype=self._basis_JP.dtype).to(
            self._basis_JP.device
        )
        rest_P, _, _, norm = self._off_basis(vector_P, float(vector_P.norm()), [])
        fresh = _Direction(rest_P / norm, np.zeros(self.size), fresh=True, sought=True)
        self._waiting.append(fresh)

    def ritz(self) -> Ritz:
        """The Ritz pairs of the present basis."""
        # PyTorch's, not NumPy's: a second pool of BLAS threads would spin against the first.
        block_JJ = torch.from_numpy(self._projection_JJ[: self.size, : self.size])
        values_J, coefficients_JJ = (part.numpy() for part in torch.linalg.eigh(block_JJ))
        squares_J = np.zeros(self.size)
        for coefficients_J in [*(d.coefficients_J for d in self._waiting), *self._dropped]:
            squares_J += (coefficients_J @ coefficients_JJ) ** 2
        return Ritz(values_J, coefficients_JJ, np.sqrt(squares_J))

    def vectors(self, coefficients_JK: NDArray[np.float64]) -> Tensor:
        """Ritz vectors as rows (K, P), orthonormal to round-off."""
        return self._mixed(coefficients_JK, self._basis_JP)

    def images(self, coefficients_JK: NDArray[np.float64]) -> Tensor:
        """What the operator makes of them (K, P), from the products that were computed."""
        return self._mixed(coefficients_JK, self._images_JP)

    def _mixed(self, coefficients_JK: NDArray[np.float64], rows_JP: Tensor) -> Tensor:
        mixed_KJ = torch.from_numpy(np.ascontiguousarray(coefficients_JK.T)).to(rows_JP)
        return mixed_KJ @ rows_JP[: self.size]

    def restart(self, ritz: Ritz, keep: NDArray[np.intp]) -> None:
        """Shrink the basis to some Ritz vectors; the process goes on from the same residual.

        Args:
            ritz: The Ritz pairs of the present basis.
            keep: Indices of those kept, fewer than the capacity.
        """
        coefficients_JK = ritz.coefficients_JJ[:, keep]
        vectors_KP, images_KP = self.vectors(coefficients_JK), self.images(coefficients_JK)
        norms_K1 = vectors_KP.norm(dim=1, keepdim=True)  # every restart would err in the same way
        for direction in self._waiting:
            direction.coefficients_J = direction.coefficients_J @ coefficients_JK
        self._dropped = [coefficients_J @ coefficients_JK for coefficients_J in self._dropped]
        before, self.size = self.size, len(keep)
        self._basis_JP[: self.size] = vectors_KP / norms_K1
        self._images_JP[: self.size] = images_KP / norms_K1
        self._projection_JJ[:] = 0.0
        self._projection_JJ[: self.size, : self.size] = np.diag(ritz.values_J[keep])
        kept_KK = coefficients_JK.T @ self._sought_JJ[:before, :before] @ coefficients_JK
        self._sought_JJ[:] = 0.0
        self._sought_JJ[: self.size, : self.size] = kept_KK

    def _off_basis(
        self, vector_P: Tensor, norm: float, near: Sequence[int]
    ) -> tuple[Tensor, NDArray[np.float64], NDArray[np.float64], float]:
        """A vector without its parts in the basis and along the directions that wait.

        Args:
            vector_P: The vector.
            norm: Its length.
            near: Indices of the basis vectors along which large parts are expected, as the
                recurrence says: taken off first, a few of them save a pass over the whole basis.

        Returns:
            The rest, the coefficients of both kinds of parts, and the norm of the rest.
        """
        basis_JP = self._basis_JP[: self.size]
        inside_J, waiting = np.zeros(self.size), np.zeros(len(self._waiting))
        if 0 < len(near) <= _FEW:
            for i in near:
                part = float(basis_JP[i] @ vector_P)
                vector_P = torch.add(vector_P, basis_JP[i], alpha=-part)
                inside_J[i] += part
            norm = float(vector_P.norm())
        for _ in range(3):
            part_J = basis_JP @ vector_P
            vector_P = torch.addmv(vector_P, basis_JP.t(), part_J, alpha=-1)
            inside_J += part_J.double().cpu().numpy()
            for i, direction in enumerate(self._waiting):
                part = float(direction.vector_P @ vector_P)
                vector_P = vector_P - part * direction.vector_P
                waiting[i] += part
            after = float(vector_P.norm())
            if after > norm / np.sqrt(2):
                break
            norm = after
        return vector_P, inside_J, waiting, after


@dataclass
class _Direction:
    """A unit vector off the basis, and its coefficients in the images of the basis vectors.

    `fresh`: drawn at random; `sought`: since the last look, or what the operator made of such;
    `image_P`: what the operator makes of it, once that is known.
    """

    vector_P: Tensor
    coefficients_J: NDArray[np.float64]
    fresh: bool = False
    sought: bool = False
    image_P: Tensor | None = None
