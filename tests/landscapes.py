"""Landscapes with closed forms, and branches on them that are known.

Nothing here imports `spectra`: a landscape is whatever has `at`, and what `at` returns whatever
has a loss, a gradient and a product.

Letters: P coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor


@dataclass
class Point:
    """A function at a point, its Hessian written out."""

    loss: float
    gradient_P: Tensor
    written_out: Callable[[], Tensor]

    @cached_property
    def hessian_PP(self) -> Tensor:  # noqa: N802
        """Computed when it is first asked for."""
        return self.written_out()

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv."""
        return self.hessian_PP.to(v_P.dtype) @ v_P


@dataclass
class Function:
    """Any differentiable function as a landscape."""

    value: Callable[[Tensor], Tensor]
    dim: int
    evaluation: float = 1.0
    preparation: float = 1.0
    evaluations: int = field(default=0, init=False)

    def at(self, x_P: Tensor) -> Point:
        """The function near x."""
        self.evaluations += 1
        leaf_P = x_P.detach().clone().requires_grad_()
        loss = self.value(leaf_P)
        (gradient_P,) = torch.autograd.grad(loss, leaf_P)
        hessian = partial(torch.autograd.functional.hessian, self.value, x_P.detach())
        return Point(float(loss.detach()), gradient_P, hessian)


def polynomial(coefficients: Polynomial, at: Tensor) -> Tensor:
    """By Horner's rule."""
    result = torch.zeros_like(at)
    for coefficient in coefficients.coef[::-1]:
        result = result * at + float(coefficient)
    return result


@dataclass
class Spiral:
    """A function whose branch of stationary points is a spiral with a given shift at each radius.

    In coordinates z = Q (x − centre), with ρ and φ polar coordinates of the first two,

        L = −∫ ρ σ(ρ) dρ + stiffness ρ² (1 − cos m(φ − h(ρ))) / m² + Σ (½ d(ρ) z² + ¼ z⁴).

    On z = 0, φ = h(ρ), where the slope in φ and in z vanishes, that of L + ½ s ρ² in ρ vanishes
    where s = σ(ρ). So the branch folds where σ' = 0, and a transverse direction turns where
    d(ρ) + σ(ρ) = 0. With m > 1 there are m such branches, turned by 2π/m, all with the same σ.

    Attributes:
        sigma: s as a function of ρ.
        twist: h.
        across: The d of each further coordinate; a constant from the third on.
        teeth: m.
        stiffness: Of the direction along the sphere.
        centre: ref.
        seed: Of Q.
    """

    sigma: Polynomial
    twist: Polynomial = field(default_factory=lambda: Polynomial([0.0, 1.0]))
    across: Sequence[Polynomial] = (Polynomial([0.5]), Polynomial([2.0]))
    teeth: int = 1
    stiffness: float = 1.0
    centre: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.dim = 2 + len(self.across)
        draw = torch.Generator().manual_seed(self.seed)
        normal_PP = torch.randn(self.dim, self.dim, generator=draw, dtype=torch.float64)
        self.turn_PP = torch.linalg.qr(normal_PP)[0]
        self.reference_P = torch.full((self.dim,), self.centre, dtype=torch.float64)
        self._radial = -(Polynomial([0.0, 1.0]) * self.sigma).integ()
        self.landscape = Function(self.value, self.dim)

    def value(self, x_P: Tensor) -> Tensor:
        """L(x)."""
        z_P = self.turn_PP @ (x_P - self.reference_P)
        rho = torch.linalg.vector_norm(z_P[:2])
        apart = torch.atan2(z_P[1], z_P[0]) - polynomial(self.twist, rho)
        tooth = self.stiffness * rho**2 * (1 - torch.cos(self.teeth * apart)) / self.teeth**2
        result = polynomial(self._radial, rho) + tooth
        curvatures = torch.stack([polynomial(across, rho) for across in self.across[:2]])
        # Beyond two they are constants: what is written in one line is fast.
        constants = torch.tensor([float(across(0.0)) for across in self.across[2:]])
        curvatures = torch.cat([curvatures, constants.to(curvatures)])
        return result + (curvatures * z_P[2:] ** 2 / 2 + z_P[2:] ** 4 / 4).sum()

    def point(self, rho: float) -> Tensor:
        """The branch's point at a radius."""
        phi = float(self.twist(rho))
        z_P = torch.zeros(self.dim, dtype=torch.float64)
        z_P[0], z_P[1] = rho * np.cos(phi), rho * np.sin(phi)
        return self.turn_PP.T @ z_P + self.reference_P

    def off_branch(self, x_P: Tensor) -> float:
        """Distance from the branch at the point's radius."""
        rho = float((x_P - self.reference_P).norm())
        return float((x_P - self.point(rho)).norm())

    def negative(self, x_P: Tensor, shift: float) -> int:
        """Negative eigenvalues of the dense Hessian, shifted."""
        hessian_PP = self.landscape.at(x_P).hessian_PP
        return int((torch.linalg.eigvalsh(hessian_PP) + shift < 0).sum())


HUMP = Polynomial([0.5, 0, 0]) - Polynomial([-1.0, 1.0]) ** 2 / 4
"""σ with its maximum 0.5 at ρ = 1: a fold there."""

WAVE = Polynomial([0.4]) + 0.5 * (Polynomial([-1.2, 1.0]) ** 3 - 0.12 * Polynomial([-1.2, 1.0]))
"""σ with extrema at ρ = 1 and 1.4: two folds."""
