"""Branches whose folds, crossings and ends are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from landscapes import HUMP, WAVE, Function, Spiral
from oracles import planted
from spectra.continuation.branch import Branch, Follow, Part, Point
from spectra.continuation.sphere import Sphere
from spectra.errors import NonFiniteError
from spectra.objective import L2Penalty
from spectra.polish.landscape import Local


def followed(
    spiral: Spiral,
    start: float | Tensor,
    how: Follow,
    *,
    convention: str = "full",
    dtype: torch.dtype = torch.float64,
    parts: Sequence[Part] = (),
) -> tuple[Branch, list[Point]]:
    """The branch from a radius, or from coordinates, on."""
    reference_P = spiral.reference_P if spiral.centre else None
    sphere = Sphere(
        spiral.landscape, L2Penalty(0.0, convention, reference_P), tolerance=1e-11,
        max_products=200, products_in=dtype, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    branch = Branch(sphere, how, lambda _: parts)
    start_P = start if isinstance(start, Tensor) else spiral.point(start)
    return branch, list(branch.points(start_P))


def kinds(points: Sequence[Point]) -> list[str]:
    return [point.kind for point in points if point.kind != "step"]


def on_branch(spiral: Spiral, points: Sequence[Point], per: float = 2.0) -> None:
    """Every point is on the closed form's branch, and says of itself what is so."""
    for point in points:
        rho = math.sqrt(point.r)
        assert spiral.off_branch(point.x_P) < 1e-8
        assert point.l2 == pytest.approx(float(spiral.sigma(rho)) / per, abs=1e-10)
        slope = float(spiral.sigma.deriv()(rho)) / (2 * rho * per)
        assert point.slope == pytest.approx(slope, abs=1e-6)
        assert point.gradient_norm <= 1e-11
        shift = point.l2 * per
        hessian_PP = spiral.landscape.at(point.x_P).hessian_PP
        exact = np.linalg.eigvalsh(hessian_PP.numpy()) + shift
        assert point.lowest == pytest.approx(exact[0], abs=2e-4)
        if np.abs(exact).min() > 1e-6:
            assert point.negative == (exact < 0).sum()
        value = float(spiral.value(point.x_P))
        assert point.loss == pytest.approx(value, abs=1e-12)
        assert point.objective == pytest.approx(value + shift / 2 * point.r, abs=1e-12)
    assert [p.products for p in points] == sorted(p.products for p in points)


# ---------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("centre", [0.0, 0.6])
@pytest.mark.parametrize(("convention", "per"), [("full", 2.0), ("half", 1.0)])
def test_fold_is_where_it_is(convention: str, per: float, centre: float, dtype: torch.dtype):
    """σ = 0.5 at its top, ρ = 1: λ to eleven digits, with products of float32 too."""
    spiral = Spiral(HUMP, centre=centre)

    how = Follow(to=0.6, longest=0.02)
    branch, points = followed(spiral, 1.6, how, convention=convention, dtype=dtype)

    assert branch.ended == "fold"
    assert kinds(points) == ["start", "fold"]
    assert points[-1].l2 == pytest.approx(0.5 / per, abs=1e-11)
    assert math.sqrt(points[-1].r) == pytest.approx(1.0, abs=1e-4)
    assert abs(points[-1].slope) < 1e-4
    on_branch(spiral, points, per)


def test_beyond_a_fold_the_branch_turns_back():
    spiral = Spiral(HUMP, twist=Polynomial([0.2, 0.5, 1.0]))

    branch, points = followed(spiral, 1.6, Follow(to=0.6, longest=0.02, beyond=True))

    assert branch.ended == "back"
    assert kinds(points) == ["start", "fold"]
    assert points[-1].l2 < points[0].l2, "back where it began"
    assert points[-1].r < 1 < points[0].r
    assert points[0].slope < 0 < points[-1].slope
    assert points[0].negative == 0
    assert points[-1].negative == 1
    on_branch(spiral, points)


@pytest.mark.parametrize("longest", [0.002, 0.05, 1.0])
def test_two_folds_of_an_s(longest: float):
    """Up to the fold at ρ = 1.4, back to that at 1, up again to the target."""
    spiral = Spiral(WAVE)

    branch, points = followed(spiral, 1.0 / 0.6, Follow(to=0.1, longest=longest, beyond=True))

    downhill = [point.l2 for point in points]
    assert branch.ended == "target"
    assert kinds(points) == ["start", "fold", "fold", "target"], downhill
    low, high = (p for p in points if p.kind == "fold")
    for fold, rho in ((low, 1.4), (high, 1.0)):
        assert fold.l2 == pytest.approx(float(WAVE(rho)) / 2, abs=1e-10)
        assert math.sqrt(fold.r) == pytest.approx(rho, abs=1e-3)
    assert points[-1].l2 == pytest.approx(0.1, abs=1e-10)
    on_branch(spiral, points)


def test_the_first_event_ends_a_branch_that_is_not_to_go_beyond():
    branch, points = followed(Spiral(WAVE), 1.0 / 0.6, Follow(to=0.1, longest=1.0))

    assert (branch.ended, kinds(points)) == ("fold", ["start", "fold"])
    assert points[-1].kind == "fold"


# --------------------------------------------------------------------------------------- target


@pytest.mark.parametrize("longest", [0.003, 1.0])
@pytest.mark.parametrize("to", [0.05, 0.1, 0.16, 0.21, 0.2499999])
def test_target_is_hit(to: float, longest: float):
    """Upward and downward in λ; close before the fold too."""
    spiral = Spiral(HUMP)

    branch, points = followed(spiral, 1.7, Follow(to=to, longest=longest))

    assert branch.ended == "target"
    assert kinds(points) == ["start", "target"]
    assert points[-1].l2 == pytest.approx(to, abs=1e-10)
    strengths = [point.l2 for point in points]
    assert strengths == sorted(strengths, reverse=to < strengths[0])
    assert max(abs(a - b) for a, b in pairwise(strengths)) <= 1.5 * longest
    on_branch(spiral, points)


def test_target_of_zero_is_hit():
    """Where a change of λ is no small part of λ however small it is."""
    spiral = Spiral(HUMP)

    branch, points = followed(spiral, 2.0, Follow(to=0.0, longest=0.02))

    assert branch.ended == "target"
    assert points[-1].l2 == pytest.approx(0.0, abs=1e-10)
    assert points[-1].products - points[-2].products < 200


def test_target_passed_within_the_step_that_folds():
    """From λ beneath the target a step leads over the fold and beneath it again."""
    spiral = Spiral(HUMP, twist=Polynomial([0.1]))

    branch, points = followed(spiral, 1.012, Follow(to=0.25 - 1e-6, longest=10.0))

    assert branch.ended == "target"
    assert points[-1].l2 == pytest.approx(0.25 - 1e-6, abs=1e-10)
    assert math.sqrt(points[-1].r) > 1


# ---------------------------------------------------------------------------- crossings, parts


@pytest.mark.parametrize("longest", [0.004, 1.0])
def test_pitchfork_is_found_where_a_transverse_curvature_vanishes(longest: float):
    """D(ρ) + σ(ρ) = 0 at ρ = 1.3, by construction; the step on is along the same branch."""
    level = float(HUMP(1.3))
    across = (Polynomial([-level - 0.65, 0.5]), Polynomial([2.0]))
    spiral = Spiral(HUMP, across=across)

    branch, points = followed(spiral, 1.6, Follow(to=0.6, longest=longest))
    assert branch.ended == "crossing"
    assert kinds(points) == ["start", "crossing"]
    assert points[-1].l2 == pytest.approx(level / 2, abs=1e-8)
    assert math.sqrt(points[-1].r) == pytest.approx(1.3, abs=1e-7)
    assert abs(points[-1].lowest) < 1e-6

    branch, points = followed(spiral, 1.6, Follow(to=0.6, longest=longest, beyond=True))
    assert branch.ended == "back"
    assert kinds(points)[:3] == ["start", "crossing", "fold"]
    on_branch(spiral, points)


def test_fold_and_crossing_close_by_are_told_apart():
    """A step leads over both, and the number of negative directions is what it was before."""
    level = float(HUMP(0.97))
    spiral = Spiral(HUMP, across=(Polynomial([-level + 0.97 * 8, -8.0]),))

    branch, points = followed(spiral, 1.05, Follow(to=0.6, longest=1.0, beyond=True))

    assert kinds(points)[:3] == ["start", "fold", "crossing"]
    _, fold, crossing = (p for p in points if p.kind != "step")
    assert fold.l2 == pytest.approx(0.25, abs=1e-10)
    assert math.sqrt(crossing.r) == pytest.approx(0.97, abs=1e-6)
    assert branch.ended == "back"
    on_branch(spiral, points)


def test_breaking_of_the_symmetry_of_parts():
    """Curvatures −0.3 and 1 that the penalty lifts: the first is lost below s = 0.3."""
    matrix_PP = planted([-0.3, 1.0, 2.0])
    other_PP = planted([5.0, 6.0])
    parts = [
        Part(lambda v_P: other_PP @ v_P, 2, lambda _: 1),
        Part(lambda v_P: matrix_PP @ v_P, 3, lambda _: 4),
    ]
    spiral = Spiral(HUMP)

    how = Follow(to=0.05, longest=0.02)
    branch, points = followed(spiral, 1.3, how, parts=parts)
    assert (branch.ended, kinds(points)) == ("breaking", ["start", "breaking"])
    assert points[-1].l2 == pytest.approx(0.15, abs=1e-9)
    assert points[-1].breaking == pytest.approx(0.0, abs=1e-8)
    for point in points[:-1]:
        assert point.breaking == pytest.approx(2 * point.l2 - 0.3, abs=1e-9)

    how = Follow(to=0.05, longest=0.02, beyond=True)
    branch, points = followed(spiral, 1.3, how, parts=parts)
    assert (branch.ended, kinds(points)) == ("target", ["start", "breaking", "target"])
    assert points[0].negative == 0
    assert points[-1].negative == 4, "an eigenvector stands for four directions"


def test_without_parts_there_is_nothing_to_break():
    _, points = followed(Spiral(HUMP), 1.3, Follow(to=0.2, longest=0.1))

    assert {point.breaking for point in points} == {None}


def test_many_coordinates_are_multiplied_and_not_written_out():
    across = [Polynomial([0.3 + 0.02 * i]) for i in range(66)]
    spiral = Spiral(HUMP, across=across)

    branch, points = followed(spiral, 1.4, Follow(to=0.6, longest=0.05, beyond=True))

    assert (branch.ended, kinds(points)) == ("back", ["start", "fold"])
    on_branch(spiral, points)
    assert max(point.residual for point in points) <= 1e-4


# --------------------------------------------------------------------------------- the branch


def test_objective_rises_by_the_square_of_the_norm():
    """dL_eff/dλ = ‖x − ref‖² along a branch of stationary points."""
    spiral = Spiral(HUMP, centre=0.5)
    _, points = followed(spiral, 1.7, Follow(to=0.22, longest=0.002))

    for a, b in pairwise(points):
        rise = (b.objective - a.objective) / (b.l2 - a.l2)
        assert rise == pytest.approx((a.r + b.r) / 2, rel=1e-4)


def test_start_beside_the_branch_is_put_on_it():
    spiral = Spiral(HUMP)
    draw = torch.Generator().manual_seed(1)
    beside_P = 0.03 * torch.randn(4, generator=draw, dtype=torch.float64)

    branch, points = followed(spiral, spiral.point(1.5) + beside_P, Follow(to=0.6, longest=0.05))

    assert branch.ended == "fold"
    on_branch(spiral, points)


@pytest.mark.parametrize("longest", [0.04, 1.0])
@pytest.mark.parametrize("turns", [1.0, 6.0])
@pytest.mark.parametrize("teeth", [6, 48])
def test_close_branches_are_not_mistaken_for_one_another(teeth: int, turns: float, longest: float):
    """Up to 48 spirals of the same λ(r), 0.13 ρ apart, turned by up to 10 radians."""
    spiral = Spiral(HUMP, twist=Polynomial([0.0, turns, turns / 2]), teeth=teeth)

    branch, points = followed(spiral, 1.4, Follow(to=0.6, longest=longest, beyond=True))

    assert (branch.ended, kinds(points)) == ("back", ["start", "fold"])
    on_branch(spiral, points)


def test_landscape_that_ends_loses_the_branch_at_its_end():
    """On spheres beyond ρ = 2 the valley V = φ³/3 − (2 − ρ) φ has no bottom any more."""

    def value(x_P: Tensor) -> Tensor:
        rho, phi = torch.linalg.vector_norm(x_P), torch.atan2(x_P[1], x_P[0])
        return -(rho**2) / 4 + rho**3 / 12 + phi**3 / 3 - (2 - rho) * phi

    sphere = Sphere(
        Function(value, 2), L2Penalty(0.0), tolerance=1e-10, max_products=9,
        products_in=torch.float64, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    branch = Branch(sphere, Follow(to=10.0, longest=0.1, beyond=True))
    start = 1.5 * torch.tensor([math.cos(0.5**0.5), math.sin(0.5**0.5)], dtype=torch.float64)

    points = list(branch.points(start))

    assert branch.ended == "lost"
    rho = np.array([math.sqrt(point.r) for point in points])
    phi = np.array([math.atan2(point.x_P[1], point.x_P[0]) for point in points])
    np.testing.assert_allclose(phi, np.sqrt(2 - rho), atol=1e-6)
    assert 1.99 < rho[-1] < 2


def test_step_where_the_landscape_is_not_finite_is_shortened():
    spiral = Spiral(HUMP)
    inner = spiral.landscape.at

    def at(x_P: Tensor) -> Local:
        if float(x_P.norm()) < 1.2:
            raise NonFiniteError("the loss is NaN")
        return inner(x_P)

    spiral.landscape.at = at  # type: ignore[method-assign]
    branch, points = followed(spiral, 1.6, Follow(to=0.6, longest=0.1))

    assert branch.ended == "lost"
    assert 1.2 <= math.sqrt(points[-1].r) < 1.205
    with pytest.raises(NonFiniteError):
        followed(spiral, 1.1, Follow(to=0.6, longest=0.1))


@pytest.mark.parametrize("budget", [1.0, 30.0, 100.0])
def test_budget_ends_a_branch_with_what_there_is(budget: float):
    spiral = Spiral(HUMP)
    how = Follow(to=0.6, longest=0.001, max_products=budget)

    branch, points = followed(spiral, 1.6, how)

    assert branch.ended == "budget"
    assert len(points) >= 1
    assert points[-1].products < budget + 60
    on_branch(spiral, points)


def test_start_that_no_corrector_helps_is_lost():
    function = Function(lambda x_P: x_P[1] ** 3 + 0.1 * x_P[1] + 5 * x_P[2] ** 2, 3)
    sphere = Sphere(
        function, L2Penalty(0.0), tolerance=1e-12, max_products=9, products_in=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    branch = Branch(sphere, Follow(to=1.0, longest=0.1))

    assert list(branch.points(torch.tensor([1.0, 0.01, 0.0], dtype=torch.float64))) == []
    assert branch.ended == "lost"
