"""The descent, on landscapes whose stationary points are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from spectra.errors import NonFiniteError
from spectra.objective import L2Penalty
from spectra.polish.landscape import Local, Penalised
from spectra.polish.lowest import lowest_curvature
from spectra.polish.newton import Polished, State, polish
from spectra.polish.valley import InverseCurvature, follow


class Dense:
    """A function of a few coordinates, by automatic differentiation."""

    evaluation, preparation = 2.0, 1.0

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int) -> None:
        self.function, self.dim, self.evaluations = function, dim, 0

    def at(self, x_P: Tensor) -> Local:
        """The function near x."""
        self.evaluations += 1
        return Here(self.function, x_P.double())


class Here:
    """Its value, gradient and Hessian at a point."""

    def __init__(self, function: Callable[[Tensor], Tensor], x_P: Tensor) -> None:
        self.loss, self.gradient_P = float(function(x_P)), oracles.gradient(function, x_P)
        if not torch.isfinite(self.gradient_P).all():
            raise NonFiniteError("not here")
        self.hessian_PP = oracles.dense_hessian(function, x_P)

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv."""
        return (self.hessian_PP @ v_P.double()).to(v_P.dtype)


def valley(x_P: Tensor) -> Tensor:
    """Rosenbrock's, raised so that its minimum is 1 at (1, 1, ..., 1)."""
    return 1 + (100 * (x_P[1:] - x_P[:-1] ** 2) ** 2 + (1 - x_P[:-1]) ** 2).sum()


def saddle(x_P: Tensor) -> Tensor:
    """Minima 1 at ±e_0; at 0 a saddle that no gradient of the hyperplane x_0 = 0 leaves."""
    return 1 + (x_P[0] ** 2 - 1) ** 2 + (x_P[1:] ** 2).sum()


START_P = torch.full((8,), -1.2, dtype=torch.float64)
NONE = L2Penalty(0.0)


def descend(
    function: Callable[[Tensor], Tensor], x_P: Tensor, penalty: L2Penalty = NONE, **how: object
) -> Polished:
    given: dict[str, object] = {
        "max_products": 5000, "generator": torch.Generator().manual_seed(3),
        "products_in": torch.float64,
    }  # fmt: skip
    return polish(Dense(function, len(x_P)), x_P, penalty, **(given | how))  # type: ignore[arg-type]


@pytest.mark.parametrize("products_in", [torch.float32, torch.float64])
def test_a_curved_valley_is_descended_to_the_floor(products_in: torch.dtype):
    found = descend(valley, START_P, products_in=products_in)

    assert found.verdict in ("floor", "converged")
    assert found.minimum
    torch.testing.assert_close(found.x_P, torch.ones_like(START_P), rtol=1e-12, atol=1e-12)
    assert found.gradient_norm < 1e-11


def test_the_floor_of_float32_is_the_best_point_that_float32_holds():
    penalty = L2Penalty(0.3)
    exact = descend(valley, START_P, penalty)

    found = descend(valley, START_P.float(), penalty, products_in=torch.float32)

    assert found.verdict == "floor"
    assert found.x_P.dtype == torch.float32
    torch.testing.assert_close(found.x_P.double(), exact.x_P, rtol=1e-5, atol=1e-5)
    rounded = Penalised.at(Dense(valley, 8), exact.x_P.float(), penalty)
    assert found.gradient_norm < 10 * rounded.gradient_norm


def test_the_penalty_moves_the_minimum_to_where_the_gradients_cancel():
    penalty = L2Penalty(0.3, reference_P=torch.full_like(START_P, 0.5))

    found = descend(valley, START_P, penalty)

    total_P = oracles.gradient(valley, found.x_P) + 0.6 * (found.x_P - 0.5)
    assert float(total_P.norm()) < 1e-10
    curvature = oracles.dense_hessian(valley, found.x_P) + 0.6 * torch.eye(8).double()
    lowest = float(torch.linalg.eigvalsh(curvature)[0])
    assert found.lowest is not None
    assert found.lowest.value == pytest.approx(lowest, rel=1e-6)
    assert found.objective == pytest.approx(
        float(valley(found.x_P)) + 0.3 * float(((found.x_P - 0.5) ** 2).sum()), rel=1e-14
    )


def test_a_saddle_is_left():
    start_P = torch.tensor([0.0, 0.3, -0.1, 2.0], dtype=torch.float64)

    found = descend(saddle, start_P, L2Penalty(1e-3))
    stays = descend(saddle, start_P, L2Penalty(1e-3), leave_saddles=False)

    assert found.escapes >= 1
    assert found.minimum
    assert abs(float(found.x_P[0])) == pytest.approx((1 - 5e-4) ** 0.5, rel=1e-9)
    assert stays.verdict in ("floor", "converged")
    assert float(stays.x_P[0]) == 0.0
    assert not stays.minimum  # nobody has looked


def test_a_tolerance_ends_it_early():
    found = descend(valley, START_P, tolerance=1e-3)

    assert found.verdict == "converged"
    assert 1e-9 < found.gradient_norm <= 1e-3


def test_the_budget_ends_it_with_a_verdict_and_the_best_point():
    found = descend(valley, START_P, max_products=40)

    assert found.verdict == "budget"
    assert not found.stationary
    assert 40 <= found.products < 60
    assert found.objective < float(valley(START_P))
    assert found.objective == pytest.approx(float(valley(found.x_P)), rel=1e-15)


def numbers(found: Polished) -> dict[str, object]:
    """All of a result but its vectors."""
    return {
        name: value for name, value in vars(found).items() if isinstance(value, int | float | str)
    }


@pytest.mark.parametrize("start_P", [START_P, START_P.float()], ids=["float64", "float32"])
def test_from_every_step_a_later_call_ends_with_the_same_bytes(start_P: Tensor):
    states: list[State] = []
    whole = descend(valley, start_P, on_step=states.append)
    assert len(states) >= 3

    for state in states:
        again = descend(valley, torch.zeros_like(start_P), state=state)
        assert torch.equal(again.x_P, whole.x_P)
        assert numbers(again) == numbers(whole)


def test_points_that_are_not_finite_are_not_visited():
    def walled(x_P: Tensor) -> Tensor:
        return 1 + x_P.sum() - torch.log(x_P).sum()

    found = descend(walled, torch.full((3,), 20.0, dtype=torch.float64), radius=50.0)

    torch.testing.assert_close(found.x_P, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{"max_products": 0}, {"tolerance": 0.0}, {"tolerance": -1.0}])
def test_bounds_are_positive(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must be above zero"):
        descend(valley, START_P, **wrong)


def test_products_are_counted_at_their_price():
    landscape = Dense(valley, 8)
    told: list[float] = []
    found = polish(
        landscape, START_P, NONE, max_products=60, generator=torch.Generator(),
        products_in=torch.float64, on_product=told.append,
    )  # fmt: skip

    assert found.products >= 2.0 * (landscape.evaluations - 1)
    assert told == sorted(told)
    assert told[-1] == found.products


# ------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("values", [[9.0, 1.0, *([0.5] * 20), -0.3], [9.0, *([0.5] * 20), 0.2]])
def test_the_lowest_curvature_is_that_of_the_matrix(values: list[float]):
    matrix_PP = oracles.planted(values)

    found = lowest_curvature(
        lambda v_P: matrix_PP @ v_P, dim=len(values), scale=0.1, flat=1e-4, dtype=torch.float64,
        device=torch.device("cpu"), generator=torch.Generator().manual_seed(0),
        affordable=lambda: True,
    )  # fmt: skip

    assert found is not None
    assert found.value == pytest.approx(min(values), rel=0.02)
    image_P = matrix_PP @ found.direction_P
    assert float((image_P - found.value * found.direction_P).norm()) <= 0.1 * abs(found.value)


def test_quasi_newton_steps_descend_further_than_the_slope_alone():
    """Two entrances to the same valley: with its curvature known, and with a plain 1/σ."""
    landscape = Dense(valley, 8)
    here = Penalised.at(landscape, START_P, NONE)
    values_P, vectors_PP = torch.linalg.eigh(oracles.dense_hessian(valley, START_P))
    known = InverseCurvature(vectors_PP.T.contiguous(), values_P.abs().clamp(min=1e-3), 1.0)
    plain = InverseCurvature(vectors_PP.T[:0], values_P[:0], float(values_P[-1]))

    def move(point: Penalised, step_P: Tensor) -> Penalised:
        return Penalised.at(landscape, point.x_P + step_P, NONE)

    ends = [
        follow(here, inverse, move, longest=1.0, resolution=1e-14, steps=8)
        for inverse in (known, plain)
    ]

    assert ends[0].objective < ends[1].objective < here.objective
