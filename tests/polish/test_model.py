"""The quadratic model and its minimum within a radius, against dense linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from spectra.polish.model import QuadraticModel, minimum_within


def brute(values_J: np.ndarray, slopes_J: np.ndarray, radius: float) -> float:
    """The smallest model value over many points of the ball, the interior minimum among them."""
    draw = np.random.default_rng(0)
    points = draw.standard_normal((20_000, len(values_J)))
    points *= (
        radius * (draw.random((20_000, 1)) ** 0.2) / np.linalg.norm(points, axis=1, keepdims=True)
    )
    if values_J.min() > 0 and np.linalg.norm(slopes_J / values_J) <= radius:
        points = np.vstack([points, -slopes_J / values_J])
    return float((points @ slopes_J + (points**2) @ values_J / 2).min())


@pytest.mark.parametrize("radius", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(
    ("values", "slopes"),
    [
        ([0.5, 1.0, 4.0], [1.0, -2.0, 0.3]),
        ([-1.0, 0.2, 3.0], [0.5, 1.0, -1.0]),
        ([-1.0, 0.2, 3.0], [0.0, 1.0, -1.0]),
        ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]),
    ],
    ids=["convex", "indefinite", "hard case", "singular"],
)
def test_no_point_of_the_ball_is_lower(values: list[float], slopes: list[float], radius: float):
    values_J, slopes_J = np.array(values), np.array(slopes)

    step_J, shift = minimum_within(values_J, slopes_J, radius)

    length = np.linalg.norm(step_J)
    assert length <= radius * (1 + 1e-9)
    assert shift == 0.0 or length == pytest.approx(radius, rel=1e-6)
    value = float(step_J @ slopes_J + step_J**2 @ values_J / 2)
    assert value <= brute(values_J, slopes_J, radius) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_radius_gives_the_newton_step(dtype: torch.dtype):
    matrix_PP = oracles.planted([30.0, 10.0, *np.linspace(0.1, 1.0, 38)])
    gradient_P = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = QuadraticModel(
        lambda v_P: (matrix_PP @ v_P.double()).to(dtype), gradient_P, dtype=dtype,
        generator=torch.Generator(),
    )  # fmt: skip

    step = model.grow(1e6, 1e-12, 100)

    expected_P = -torch.linalg.solve(matrix_PP, gradient_P)
    assert step.inside
    accuracy = 1e-4 if dtype == torch.float32 else 1e-9
    assert float((step.step_P - expected_P).norm() / expected_P.norm()) < accuracy
    assert step.decrease == pytest.approx(-float(gradient_P @ expected_P) / 2, rel=accuracy)


def test_a_smaller_radius_costs_no_product():
    matrix_PP = oracles.planted([5.0, 1.0, -0.5, 0.3, 0.2])
    model = QuadraticModel(
        lambda v_P: matrix_PP @ v_P, torch.ones(5, dtype=torch.float64), dtype=torch.float64,
        generator=torch.Generator(),
    )  # fmt: skip
    model.grow(2.0, 1e-10, 20)
    spent = model.products

    steps = [model.within(radius) for radius in (1.0, 0.5, 0.01)]

    assert model.products == spent
    assert [step.length for step in steps] == pytest.approx([1.0, 0.5, 0.01])
    assert all(step.residual < 1e-6 for step in steps)


def test_the_budget_ends_the_growth():
    matrix_PP = oracles.planted(np.linspace(1e-6, 1.0, 50))
    model = QuadraticModel(
        lambda v_P: matrix_PP @ v_P, torch.ones(50, dtype=torch.float64), dtype=torch.float64,
        generator=torch.Generator(),
    )  # fmt: skip

    assert model.grow(1e9, 1e-12, 7).residual > 1e-12
    assert model.products == 7


def test_the_inverse_curvature_inverts_where_the_whole_space_is_known():
    matrix_PP = oracles.planted([8.0, 4.0, 2.0, 1.0])
    model = QuadraticModel(
        lambda v_P: matrix_PP @ v_P, torch.ones(4, dtype=torch.float64), dtype=torch.float64,
        generator=torch.Generator(),
    )  # fmt: skip
    model.grow(1e6, 1e-14, 4)
    v_P = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)

    torch.testing.assert_close(model.inverse(0.1)(v_P), torch.linalg.solve(matrix_PP, v_P))
