"""Stationary points on spheres: what makes a fold of the branch an ordinary point.

A stationary point of L_eff = L_CE + c‖θ − ref‖² is a stationary point of L_CE on the sphere around
ref on which it lies; 2c is its Lagrange multiplier. So a branch of them is parametrised by
r = ‖θ − ref‖² as well as by λ. In λ it turns back at a fold, where the Hessian of L_eff is singular
along a soft direction v. In r it goes straight on, as long as v leaves the sphere: on the tangent
space, which is all that is solved with, the Hessian stays regular.

With y = θ − ref, g = ∇L_CE, s = 2c and P the projection off y:

    s = −y·g / r,    F = g + s y  (tangential by construction),    Newton: P (H + s) P w = −F
    dθ/dr = y/(2r) + w,    P (H + s) P w = −P H y/(2r),    ds/dr = −y·(H + s) dθ/dr / r

and the branch folds where ds/dr = 0. By Fermat's rule λ there is exact to the square of the error
in r.

Letters: P coordinates.

Source: H. B. Keller, Numerical solution of bifurcation and nonlinear eigenvalue problems, in
Applications of Bifurcation Theory (Academic Press, 1977) 359-384, on continuation by another
parameter; the sphere's is this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectra.continuation.krylov import solved
from spectra.curvature.operator import MatVec
from spectra.objective import L2Penalty
from spectra.polish.landscape import Landscape, Local

_LOOSEST, _TIGHTEST = 1e-2, 1e-6
_TANGENT = 1e-6


@dataclass
class Sphere:
    """A landscape whose stationary points on spheres are wanted.

    Attributes:
        landscape: L_CE.
        penalty: Whose convention and reference point count; its strength does not.
        tolerance: ‖F‖ at which a point is stationary.
        max_products: Bound on the products of one linear system.
        products_in: Dtype of the products.
        generator: Of the Lanczos processes; on the CPU.
        on_product: Told of every product.
        products: Spent so far, evaluations at their price.
    """

    landscape: Landscape
    penalty: L2Penalty
    tolerance: float
    max_products: int
    products_in: torch.dtype
    generator: torch.Generator
    on_product: Callable[[], None] = lambda: None
    products: float = field(default=0.0, init=False)

    @property
    def shift_per_strength(self) -> float:
        """2c/λ: 2 in the convention λ‖θ‖², 1 in the other."""
        return L2Penalty(1.0, self.penalty.convention).shift

    def offset(self, x_P: Tensor) -> Tensor:
        """The offset y = x − ref."""
        reference_P = self.penalty.reference_P
        return x_P if reference_P is None else x_P - reference_P

    def counted(self, product: MatVec) -> MatVec:
        """The same product, counted."""

        def matvec(v_P: Tensor) -> Tensor:
            self.products += 1
            self.on_product()
            return product(v_P)

        return matvec

    def on(self, x_P: Tensor, r: float) -> Tensor:
        """The point of the sphere ‖x − ref‖² = r nearest to x."""
        y_P = self.offset(x_P)
        stretch = math.sqrt(r) / float(y_P.norm())
        return x_P + (stretch - 1) * y_P

    def at(self, x_P: Tensor) -> Place:
        """Evaluate the landscape at a point of whatever sphere it is on."""
        self.products += self.landscape.evaluation
        local = self.landscape.at(x_P)
        y_P = self.offset(x_P)
        r = float(y_P @ y_P)
        shift = -float(y_P @ local.gradient_P) / r
        return Place(x_P, y_P, r, shift, local, local.gradient_P + shift * y_P)

    def corrected(self, x_P: Tensor, r: float, *, most: int) -> tuple[Place, int] | None:
        """The stationary point on the sphere of r near x, by Newton's method.

        Returns:
            It, and the steps taken; None where `most` did not do or the residual grew.
        """
        place = self.at(self.on(x_P, r))
        for steps in range(most + 1):
            if place.residual <= self.tolerance:
                return place, steps
            if steps == most:
                break
            rtol = min(_LOOSEST, max(place.residual, _TIGHTEST))
            w_P = self._tangential(place, -place.rest_P, rtol)
            following = self.at(self.on(place.x_P + w_P, r))
            if not following.residual < 2 * place.residual:
                return None
            place = following
        return None

    def tangent(self, place: Place) -> tuple[Tensor, float]:
        """dx/dr and ds/dr along the branch."""
        along_P = place.y_P / (2 * place.r)
        image_P = self.counted(place.product(self.products_in))(along_P)
        w_P = self._tangential(place, -place.off(image_P), _TANGENT)
        velocity_P = along_P + w_P
        # y·(H + s) dx/dr, with (Hy)·w for y·(Hw): no product more.
        pushed = float(image_P @ (along_P + w_P) * 2 * place.r) + place.shift * 0.5
        return velocity_P, -pushed / place.r

    def _tangential(self, place: Place, b_P: Tensor, rtol: float) -> Tensor:
        """Solve P (H + s) P w = b on the tangent space."""
        self.products += self.landscape.preparation if not place.prepared else 0.0
        place.prepared = True
        product = place.product(self.products_in)

        def matvec(v_P: Tensor) -> Tensor:
            inner_P = place.off(v_P)
            return place.off(product(inner_P) + place.shift * inner_P)

        found = solved(
            self.counted(matvec), b_P, rtol=rtol, max_products=self.max_products,
            dtype=self.products_in, generator=self.generator,
        )  # fmt: skip
        return place.off(found.w_P)


@dataclass
class Place:
    """A point on a sphere, and what was evaluated there.

    Attributes:
        x_P: The point.
        y_P: Its offset from the reference point.
        r: ‖y‖².
        shift: s, the multiplier.
        local: The landscape there.
        rest_P: F = ∇L_CE + s y.
        prepared: Whether products there have been paid for.
    """

    x_P: Tensor
    y_P: Tensor
    r: float
    shift: float
    local: Local
    rest_P: Tensor
    prepared: bool = False

    @property
    def residual(self) -> float:
        """‖F‖, which is ‖∇L_eff‖ at the strength of s."""
        return float(self.rest_P.norm())

    def off(self, v_P: Tensor) -> Tensor:
        """The part of v tangential to the sphere."""
        y_P = self.y_P.to(v_P)
        return v_P - y_P * ((y_P @ v_P) / (y_P @ y_P))

    def product(self, dtype: torch.dtype) -> MatVec:
        """H_CE v, multiplied in a dtype and returned in that of v."""

        def matvec(v_P: Tensor) -> Tensor:
            return self.local(v_P.to(dtype)).to(v_P)

        return matvec
