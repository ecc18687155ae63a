"""The quadratic model of a landscape at a point, minimised within any radius.

The Lanczos process from the gradient g builds a basis Q of the Krylov space of H. Within it the
model m(s) = g·s + s·Hs/2 is a small dense problem, so its minimum over ‖s‖ ≤ r is exact (Moré and
Sorensen), for this radius and, without a further product, for every smaller one: a rejected step
costs an evaluation and nothing else. Where H has negative directions the minimum follows them,
while truncated conjugate gradients (Steihaug) stop at the first that they meet.

The basis is orthogonal to round-off and its images H Q are kept, so that the residual of a step,
(H + μ) s + g, is computed and not estimated.

Letters: P coordinates, J vectors of the basis.

Source: N. I. M. Gould, S. Lucidi, M. Roma, Ph. L. Toint, Solving the trust-region subproblem using
the Lanczos method, SIAM J. Optim. 9 (1999) 504-525; J. J. Moré, D. C. Sorensen, Computing a trust
region step, SIAM J. Sci. Stat. Comput. 4 (1983) 553-572.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.lanczos import Lanczos, Ritz, room
from spectra.curvature.operator import MatVec
from spectra.polish.valley import InverseCurvature

_MOST = 400
"""Vectors of a basis; with more, its own arithmetic would cost as much as the products."""
_CHECK_EVERY = 4
_STALE, _GAINS = 40, 1e-3
"""A step that so many products have not made fall further, by this share, is taken as it is: what
its residual still asks for lies along directions that do not matter yet."""
_ROUND_OFF = 4.0
"""Multiples of eps · |H| · ‖s‖ that the rounding of products leaves of a residual."""
_BISECTIONS = 200


@dataclass(frozen=True)
class Step:
    """A step within the model.

    Attributes:
        step_P: s, in float64.
        length: ‖s‖.
        decrease: −m(s), what the objective should fall by.
        residual: ‖(H + μ) s + g‖ / ‖g‖.
        noise: What of it the rounding of the products may be.
        lowest: The smallest Ritz value of H seen.
        inside: Whether the radius did not bind.
    """

    step_P: Tensor
    length: float
    decrease: float
    residual: float
    noise: float
    lowest: float
    inside: bool


class QuadraticModel:
    """g·s + s·Hs/2 in the Krylov space of H and g, grown until a step in it is good enough.

    Args:
        matvec: `v_P -> (Hv)_P`.
        gradient_P: g, not zero.
        dtype: Of the vectors that the operator takes, and of the basis.
        generator: Required by the process; what it draws is not used here.

    Attributes:
        products: Products spent.
    """

    def __init__(
        self,
        matvec: MatVec,
        gradient_P: Tensor,
        *,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self._gradient_P = gradient_P.double()
        self._norm = float(self._gradient_P.norm())
        self._dtype = dtype
        start_P = (self._gradient_P / self._norm).to(dtype)
        capacity = max(2, min(room(start_P.numel(), dtype), _MOST))
        self._process = Lanczos(matvec, start_P, capacity=capacity, generator=generator)
        self._ritz: Ritz | None = None

    @property
    def products(self) -> int:
        """Products spent."""
        return self._process.products

    def grow(
        self,
        radius: float,
        rtol: float,
        max_products: int,
        on_product: Callable[[], None] = lambda: None,
    ) -> Step:
        """Extend the basis until the step of a radius has a relative residual of `rtol`.

        Args:
            radius: Bound on the length of the step.
            rtol: Bound on ‖(H + μ) s + g‖ / ‖g‖, where rounding allows it.
            max_products: Bound on the products of the whole basis.
            on_product: Called before every product.

        Raises:
            NonFiniteError: A product is NaN or infinite.
        """
        process, before = self._process, 0.0
        while True:
            on_product()
            process.step()
            spent = process.full or process.complete or process.exhausted > 0
            spent |= process.products >= max_products
            if spent or process.products % _CHECK_EVERY == 0:
                self._ritz = process.ritz()
                step = self.within(radius)
                if spent or step.residual <= max(rtol, step.noise):
                    return step
            if process.products % _STALE == 0:
                if step.residual <= 0.5 and step.decrease <= (1 + _GAINS) * before:
                    return step
                before = step.decrease

    def within(self, radius: float) -> Step:
        """The minimum of the model over ‖s‖ ≤ radius in the present basis; no products."""
        ritz = self._ritz
        assert ritz is not None
        slopes_J = self._norm * ritz.coefficients_JJ[0]
        inner = minimum_within(ritz.values_J, slopes_J, radius)
        coefficients_J1 = (ritz.coefficients_JJ @ inner.step_J)[:, None]
        step_P = self._process.vectors(coefficients_J1)[0].double()
        image_P = self._process.images(coefficients_J1)[0].double()
        rest_P = torch.add(self._gradient_P + image_P, step_P, alpha=inner.shift)
        length = float(step_P.norm())
        largest = float(np.abs(ritz.values_J[[0, -1]]).max())
        eps = torch.finfo(self._dtype).eps
        return Step(
            step_P=step_P,
            length=length,
            decrease=-float(self._gradient_P @ step_P) - float(step_P @ image_P) / 2,
            residual=float(rest_P.norm()) / self._norm,
            noise=_ROUND_OFF * eps * largest * length / self._norm,
            lowest=float(ritz.values_J[0]),
            inside=inner.shift == 0.0,
        )

    def inverse(self, at_least: float) -> InverseCurvature:
        """What the basis knows of the inverse of H, as quasi-Newton steps start from it.

        Args:
            at_least: Curvature below which none is believed.
        """
        ritz = self._ritz
        assert ritz is not None
        values_J = torch.from_numpy(ritz.values_J)
        vectors_JP = self._process.vectors(ritz.coefficients_JJ)
        sigma = max(2 * at_least, float(values_J.clamp(min=0).quantile(0.25)))
        values_J = values_J.abs().clamp(min=max(at_least, 1e-300)).to(vectors_JP.device)
        return InverseCurvature(vectors_JP, values_J, max(sigma, 1e-300))


class Inner(NamedTuple):
    """The minimum of a diagonal model: the step, and μ, zero where the radius does not bind."""

    step_J: NDArray[np.float64]
    shift: float


def minimum_within(
    values_J: NDArray[np.float64], slopes_J: NDArray[np.float64], radius: float
) -> Inner:
    """The minimum of Σ slopes·s + values·s²/2 over ‖s‖ ≤ radius.

    With μ ≥ max(0, −λ_min) the minimum is s = −slopes/(values + μ), of length radius unless μ = 0.
    In the hard case, where the slope has nothing along the lowest direction and s stays too short,
    that direction fills it up.

    Args:
        values_J: Curvatures, ascending.
        slopes_J: Slopes along the same directions.
        radius: Bound on the length.
    """
    scale = max(float(np.abs(values_J).max()), np.finfo(float).tiny)
    tiny = 1e-14 * scale
    if values_J[0] > tiny:
        step_J = -slopes_J / values_J
        if np.linalg.norm(step_J) <= radius:
            return Inner(step_J, 0.0)
    low = max(0.0, -float(values_J[0])) + tiny
    step_J = -slopes_J / (values_J + low)
    length = float(np.linalg.norm(step_J))
    if length <= radius:
        if values_J[0] >= -tiny:
            return Inner(step_J, low)
        others = float(np.linalg.norm(step_J[1:]))
        step_J[0] = np.copysign(np.sqrt(radius**2 - others**2), step_J[0])
        return Inner(step_J, low)
    high = low + float(np.linalg.norm(slopes_J)) / radius
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.linalg.norm(slopes_J / (values_J + middle)) > radius:
            low = middle
        else:
            high = middle
        if high - low <= 1e-15 * high:
            break
    return Inner(-slopes_J / (values_J + high), high)
