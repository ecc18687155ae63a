"""What is said of a point: eigenpairs, the smallest eigenvalue, loss and gradient.

A claim comes from a solver or from files, and is taken at its word only as far as the magnitudes
go by which it is judged: the residuals it admits, and the limits that nothing beside a complete
set of pairs exceeds.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.eigen import ROUND_OFF, Extreme
from spectra.curvature.spectrum import Spectrum

Floats = NDArray[np.floating]

IMPROBABLE = 5.0
"""t of the bound above: a false alarm once in 130,000 certificates."""
_TINY = 1e-150


@dataclass(frozen=True)
class Claim:
    """What is said of a point θ.

    Attributes:
        values_K: Eigenvalues, largest magnitude first.
        vectors_KP: Their vectors, as returned or written.
        residuals_K: |Hv − λv| as said; None where nothing is.
        smallest: The smallest algebraic eigenvalue; its residual may be NaN and its vector None.
        loss: L_CE(θ); None where it is not said.
        gradient_ce_P: ∇L_CE(θ); None where it is not said.
        weights: `weights_digest` of θ; None where it is not said.
    """

    values_K: Floats
    vectors_KP: Floats
    residuals_K: Floats | None
    smallest: Extreme
    loss: float | None = None
    gradient_ce_P: Tensor | None = None
    weights: str | None = None

    @classmethod
    def of(cls, found: Spectrum, theta_P: Tensor) -> Claim:
        """What a solver has just returned."""
        pairs = found.pairs
        return cls(
            pairs.values_K, pairs.vectors_KP, pairs.residuals_K, pairs.smallest, found.loss,
            found.gradient_ce_P, weights_digest(theta_P),
        )  # fmt: skip

    @property
    def smallest_inside(self) -> int | None:
        """The index of the smallest eigenvalue among the pairs, None if it is not among them.

        If a leading pair is negative, the most negative one is the smallest of all.
        """
        lowest = int(np.argmin(self.values_K))
        inside = self.values_K[lowest] < 0 and self.values_K[lowest] <= self.smallest.value
        return lowest if inside else None


def weights_digest(theta_P: Tensor) -> str:
    """SHA-256 of the parameters, in their order and precision."""
    return hashlib.sha256(theta_P.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Said:
    """A claim with the magnitudes that it implies.

    Attributes:
        claim: What was said.
        eps: Of the precision it was solved in.
        rtol: Tolerance of the pairs.
    """

    claim: Claim
    eps: float
    rtol: float

    @cached_property
    def scale(self) -> float:
        """|λ_1|, the norm of the Hessian."""
        return float(np.abs(self.claim.values_K).max())

    @cached_property
    def last(self) -> float:
        """|λ_K|."""
        return float(np.abs(self.claim.values_K).min())

    @property
    def floor(self) -> float:
        """What a solver counts as round-off."""
        return ROUND_OFF * self.eps * self.scale

    @property
    def exact(self) -> float:
        """The same in the precision of the recomputation."""
        return ROUND_OFF * float(torch.finfo(torch.float64).eps) * self.scale

    @cached_property
    def residuals_K(self) -> Floats:  # noqa: N802 - K pairs
        """The residuals said, or those the tolerance admits."""
        if self.claim.residuals_K is not None:
            return self.claim.residuals_K
        return np.maximum(self.rtol * np.abs(self.claim.values_K), self.floor)

    @property
    def smallest(self) -> float:
        """The residual said of the smallest eigenvalue; infinite where nothing is."""
        inside = self.claim.smallest_inside
        said = self.residuals_K[inside] if inside is not None else self.claim.smallest.residual
        return float(said) if math.isfinite(said) else math.inf

    @property
    def limit(self) -> float:
        """Magnitude that nothing beside the set should exceed: the last pairs' and their errors."""
        among_K = np.abs(self.claim.values_K) <= self.last * (1 + self.rtol) + self.floor
        errors = float(np.linalg.norm(self.residuals_K[among_K]))
        return self.last * (1 + self.rtol) + errors + self.floor

    @property
    def lowest(self) -> float:
        """Value that nothing beside the set should lie below."""
        error = self.smallest if math.isfinite(self.smallest) else 0.0
        return self.claim.smallest.value - error - self.rtol * self.last - self.floor

    def weights(self, generator: torch.Generator) -> Floats:
        """w: of unit norm, random signs, larger where the residual said is smaller."""
        signs_K = torch.randint(0, 2, (len(self.residuals_K),), generator=generator).numpy()
        weights_K = (2.0 * signs_K - 1.0) / self._at_least(self.residuals_K)
        return np.asarray(weights_K / np.linalg.norm(weights_K))

    def _at_least(self, residuals_K: Floats) -> Floats:
        """No smaller than the precision, and never zero."""
        return residuals_K + self.eps * self.scale + _TINY

    def across(self, weights_K: Floats) -> float:
        """What |Σ w_i r_i| hardly exceeds."""
        parts_K = np.abs(weights_K) * self.residuals_K
        return min(IMPROBABLE * float(np.linalg.norm(parts_K)), float(parts_K.sum()))
