"""Stationary points on spheres against dense linear algebra and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from landscapes import HUMP, Function, Spiral
from spectra.continuation.sphere import Place, Sphere
from spectra.objective import L2Penalty

DTYPES = [torch.float64, torch.float32]


def sphere_of(
    spiral: Spiral,
    convention: str = "full",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
) -> Sphere:
    reference_P = spiral.reference_P if spiral.centre else None
    return Sphere(
        spiral.landscape, L2Penalty(0.0, convention, reference_P), tolerance=tolerance,
        max_products=100, products_in=dtype, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def rough(dim: int = 7) -> Function:
    """A function with nothing regular about it."""
    draw = torch.Generator().manual_seed(3)
    mix_PP = torch.randn(dim, dim, generator=draw, dtype=torch.float64)

    def value(x_P: Tensor) -> Tensor:
        return torch.cos(mix_PP @ x_P + 0.3).sum() + torch.logsumexp(mix_PP.T @ x_P, 0)

    return Function(value, dim)


def dense_newton(function: Function, x_P: Tensor, steps: int = 60) -> tuple[Tensor, float]:
    """Stationary on its sphere, by Newton's method on (∇L + s x, ‖x‖² − r) written out."""
    r, dim = float(x_P @ x_P), len(x_P)
    shift = -float(x_P @ function.at(x_P).gradient_P) / r
    for _ in range(steps):
        here = function.at(x_P)
        equations = torch.cat([here.gradient_P + shift * x_P, (x_P @ x_P - r).view(1) / 2])
        jacobian = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
        jacobian[:dim, :dim] = here.hessian_PP + shift * torch.eye(dim)
        jacobian[:dim, dim] = jacobian[dim, :dim] = x_P
        step = torch.linalg.solve(jacobian, -equations)
        x_P, shift = x_P + step[:dim], shift + float(step[dim])
    return x_P, shift


@pytest.fixture
def still() -> tuple[Function, Tensor, float]:
    """A rough function, a stationary point of it on the unit sphere, and its multiplier."""
    function = rough()
    draw = torch.Generator().manual_seed(8)
    x_P = torch.randn(7, generator=draw, dtype=torch.float64)
    x_P /= x_P.norm()
    for _ in range(4000):  # down to a minimum first: Newton's method alone would wander
        gradient_P = function.at(x_P).gradient_P
        x_P = x_P - 0.02 * (gradient_P - x_P * (x_P @ gradient_P))
        x_P /= x_P.norm()
        if float((gradient_P - x_P * (x_P @ gradient_P)).norm()) < 1e-5:
            break
    x_P, shift = dense_newton(function, x_P, 4)
    return function, x_P, shift


def plain(function: Function, dtype: torch.dtype = torch.float64) -> Sphere:
    return Sphere(
        function, L2Penalty(0.0), tolerance=1e-12, max_products=100, products_in=dtype,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ corrector


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_corrected_point_is_that_of_dense_newton(
    still: tuple[Function, Tensor, float], dtype: torch.dtype
):
    """To the floor of float64 gradients, whatever the products are in."""
    function, x_P, shift = still
    away_P = x_P + 0.01 * torch.linspace(-1, 1, 7, dtype=torch.float64)

    found = plain(function, dtype).corrected(away_P, 1.0, most=6)

    assert found is not None
    place, steps = found
    assert 1 <= steps <= 6
    assert place.residual <= 1e-12
    torch.testing.assert_close(place.x_P, x_P, rtol=0, atol=1e-11)
    assert place.shift == pytest.approx(shift, abs=1e-11), "Lagrange's multiplier"
    assert place.local.loss == pytest.approx(float(function.value(x_P)), abs=1e-13)


@pytest.mark.parametrize("centre", [0.0, 0.7])
@pytest.mark.parametrize("convention", ["full", "half"])
def test_multiplier_is_the_shift_of_the_penalty(convention: str, centre: float):
    """∇L_eff at the strength that belongs to s is zero, by the penalty's own gradient."""
    spiral = Spiral(HUMP, centre=centre)
    sphere = sphere_of(spiral, convention)
    x_P = spiral.point(1.3)

    found = sphere.corrected(x_P + 0.01, 1.3**2, most=8)

    assert found is not None
    place = found[0]
    torch.testing.assert_close(place.x_P, x_P, rtol=0, atol=1e-10)
    assert place.shift == pytest.approx(float(HUMP(1.3)), abs=1e-11)
    strength = place.shift / sphere.shift_per_strength
    penalty = L2Penalty(strength, convention, spiral.reference_P)
    gradient_P = place.local.gradient_P + penalty.gradient(place.x_P)
    assert float(gradient_P.norm()) == pytest.approx(place.residual, abs=1e-14)
    assert float(gradient_P.norm()) <= 1e-12
    assert strength == pytest.approx(float(HUMP(1.3)) / (2 if convention == "full" else 1))


@pytest.mark.parametrize("centre", [0.0, 0.7])
def test_no_point_leaves_the_sphere(centre: float, monkeypatch: pytest.MonkeyPatch):
    spiral = Spiral(HUMP, centre=centre)
    seen: list[Tensor] = []
    at = spiral.landscape.at
    monkeypatch.setattr(spiral.landscape, "at", lambda x_P: seen.append(x_P) or at(x_P))

    sphere_of(spiral).corrected(spiral.point(1.3) + 0.05, 1.1**2, most=8)

    assert len(seen) >= 3
    for x_P in seen:
        assert float((x_P - spiral.reference_P).norm()) == pytest.approx(1.1, rel=1e-14)


def test_nearest_point_of_a_sphere_is_on_the_ray():
    spiral = Spiral(HUMP, centre=-0.4)
    x_P = torch.arange(4, dtype=torch.float64)

    nearest_P = sphere_of(spiral).on(x_P, 2.25)

    y_P, from_P = nearest_P + 0.4, x_P + 0.4
    assert float(y_P.norm()) == pytest.approx(1.5, rel=1e-15)
    torch.testing.assert_close(y_P / 1.5, from_P / from_P.norm())


def test_point_that_is_stationary_costs_one_evaluation():
    spiral = Spiral(HUMP)
    sphere = sphere_of(spiral)

    found = sphere.corrected(spiral.point(0.8), 0.64, most=0)

    assert found is not None
    assert found[1] == 0
    assert spiral.landscape.evaluations == 1
    assert sphere.products == 1.0


def test_corrector_that_may_not_step_does_not_pay_for_a_step():
    spiral = Spiral(HUMP)

    assert sphere_of(spiral).corrected(spiral.point(0.8) + 0.1, 0.64, most=0) is None
    assert spiral.landscape.evaluations == 1


def test_residual_that_grows_ends_the_attempt():
    """Next to an inflection a Newton step leads anywhere."""
    function = Function(lambda x_P: x_P[1] ** 3 + 0.1 * x_P[1] + 5 * x_P[2] ** 2, 3)
    x_P = torch.tensor([1.0, 0.01, 0.0], dtype=torch.float64)

    assert plain(function).corrected(x_P, float(x_P @ x_P), most=50) is None
    assert function.evaluations == 2


def test_value_that_is_not_finite_ends_the_attempt():
    function = Function(lambda x_P: torch.sqrt(0.2 - x_P[1] ** 2) + x_P[1:].sum(), 3)
    x_P = torch.tensor([1.0, 0.44, 0.0], dtype=torch.float64)

    assert plain(function).corrected(x_P, float(x_P @ x_P), most=6) is None


def test_products_are_counted_at_their_price():
    spiral, told = Spiral(HUMP), []
    sphere = sphere_of(spiral)
    sphere.on_product = lambda: told.append(1)
    spiral.landscape.evaluation, spiral.landscape.preparation = 10.0, 1000.0

    found = sphere.corrected(spiral.point(0.8) + 0.01, 0.64, most=8)
    assert found is not None
    corrected = sphere.products
    steps = found[1]
    assert corrected == 10 * (steps + 1) + 1000 * steps + len(told)

    told.clear()
    sphere.tangent(found[0])
    assert sphere.products - corrected == 1000 + len(told)


# -------------------------------------------------------------------------------------- tangent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangent_is_the_difference_of_corrected_points(
    still: tuple[Function, Tensor, float], dtype: torch.dtype
):
    function, x_P, _ = still
    sphere = plain(function)

    def at(r: float) -> Place:
        found = sphere.corrected(x_P, r, most=8)
        assert found is not None
        return found[0]

    velocity_P, slope = plain(function, dtype).tangent(at(1.0))

    step = 1e-4
    ahead, behind = at(1 + step), at(1 - step)
    rtol = 1e-6 if dtype == torch.float64 else 1e-4
    difference_P = (ahead.x_P - behind.x_P) / (2 * step)
    assert float((velocity_P - difference_P).norm()) <= rtol * float(velocity_P.norm())
    assert slope == pytest.approx((ahead.shift - behind.shift) / (2 * step), rel=rtol)
    assert float(velocity_P @ x_P) == pytest.approx(0.5, rel=1e-6), "d‖x‖²/dr = 1"


@pytest.mark.parametrize("centre", [0.0, 0.7])
@pytest.mark.parametrize("rho", [0.5, 1.0, 1.7])
def test_tangent_of_a_spiral(rho: float, centre: float):
    """Dσ/dr = σ'(ρ) / 2ρ, zero at the fold; dx/dr a difference of closed forms."""
    spiral = Spiral(HUMP, twist=Polynomial([0.1, 1.0, 0.5]), centre=centre)
    sphere = sphere_of(spiral)

    velocity_P, slope = sphere.tangent(sphere.at(spiral.point(rho)))

    assert slope == pytest.approx(float(HUMP.deriv()(rho)) / (2 * rho), abs=1e-12)
    r, step = rho**2, 1e-5
    ahead_P, behind_P = (spiral.point(math.sqrt(r + side)) for side in (step, -step))
    torch.testing.assert_close(velocity_P, (ahead_P - behind_P) / (2 * step), rtol=0, atol=1e-8)


def test_rest_is_tangential_and_hessian_on_the_tangent_space_regular_at_a_fold():
    spiral = Spiral(HUMP)
    place = sphere_of(spiral).at(spiral.point(1.0) + 0.01)

    assert float(place.rest_P @ place.y_P) == pytest.approx(0, abs=1e-15)
    tangential_P = place.off(torch.ones(4, dtype=torch.float64))
    assert float(tangential_P @ place.y_P) == pytest.approx(0, abs=1e-15)

    at_fold = sphere_of(spiral).at(spiral.point(1.0))
    whole_PP = at_fold.local.hessian_PP + at_fold.shift * torch.eye(4)  # type: ignore[attr-defined]
    assert np.abs(np.linalg.eigvalsh(whole_PP.numpy())).min() < 1e-12
    basis_Pp = torch.linalg.qr(torch.cat([at_fold.y_P[:, None], torch.eye(4)[:, :3]], 1))[0][:, 1:]
    inner = np.linalg.eigvalsh((basis_Pp.T @ whole_PP @ basis_Pp).numpy())
    assert np.abs(inner).min() > 0.1
