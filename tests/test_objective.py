"""The objective: both conventions, with and without a reference, against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum

WIDTHS = (4, 3, 3)
L2 = 0.37
# c, the number in front of ‖θ − ref‖², by definition of the two conventions.
CONVENTIONS = [("full", L2), ("half", L2 / 2)]
with_or_without = pytest.mark.parametrize("referenced", [False, True])
both = pytest.mark.parametrize(("convention", "c"), CONVENTIONS)


def vectors(dim: int = 27) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    theta_P, reference_P = torch.randn(2, dim, generator=draw, dtype=torch.float64)
    return theta_P, reference_P


def examples() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(11, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (11,), generator=draw)


@both
@with_or_without
def test_value_and_gradient_are_c_times_the_square_and_its_derivative(
    convention: str, c: float, referenced: bool
):
    theta_P, reference_P = vectors()
    penalty = L2Penalty(L2, convention, reference_P if referenced else None)
    origin = reference_P if referenced else torch.zeros_like(theta_P)

    def value(t: Tensor) -> Tensor:
        return c * (t - origin).square().sum()

    assert penalty.coefficient == c
    assert penalty.value(theta_P) == pytest.approx(float(value(theta_P)), rel=1e-14)
    expected_P = oracles.gradient(value, theta_P)
    torch.testing.assert_close(penalty.gradient(theta_P), expected_P, rtol=1e-14, atol=1e-15)


@both
@with_or_without
def test_the_penalty_shifts_the_hessian_by_2c(convention: str, c: float, referenced: bool):
    """H_eff = H_CE + 2c I, on dense Hessians of the two losses."""
    theta_P, reference_P = vectors()
    penalty = L2Penalty(L2, convention, reference_P if referenced else None)
    origin = reference_P if referenced else 0.0
    plain = oracles.mean_loss(WIDTHS, "tanh", *examples())
    penalised = oracles.mean_loss(WIDTHS, "tanh", *examples(), c=c, reference_P=origin)

    difference_PP = oracles.dense_hessian(penalised, theta_P) - oracles.dense_hessian(
        plain, theta_P
    )

    identity_PP = torch.eye(27, dtype=torch.float64)
    torch.testing.assert_close(difference_PP, penalty.shift * identity_PP, rtol=1e-12, atol=1e-13)
    assert float(plain(theta_P)) + penalty.value(theta_P) == pytest.approx(
        float(penalised(theta_P)), rel=1e-14
    )


def test_half_is_adam_s_weight_decay():
    """2c is what PyTorch calls `weight_decay`: λ in the half convention, 2λ in the full."""
    assert L2Penalty(L2, "half").shift == L2
    assert L2Penalty(L2, "full").shift == 2 * L2
    assert L2Penalty(L2).convention == "full"


def test_value_of_float32_is_summed_in_float64():
    """10⁶ entries of 1/3: exact to the rounding of 1/3 itself, which a float32 sum is not."""
    theta_P = torch.full((1_000_000,), 1 / 3, dtype=torch.float32)
    exact = 1_000_000 * float(theta_P[0]) ** 2

    assert L2Penalty(1.0).value(theta_P) == pytest.approx(exact, rel=1e-13)


def test_cross_entropy_is_summed_over_examples():
    x, y = examples()
    loss = oracles.mean_loss((4, 3), "tanh", x, y)
    theta_P = vectors(15)[0]

    actual = cross_entropy_sum(Mlp((4, 3)).logits(theta_P, x), y)

    assert float(actual) == pytest.approx(11 * float(loss(theta_P)), rel=1e-14)


def test_an_exact_sum_is_taken_in_float64():
    """A million and one losses of log 2, as float32 rounds it, exact to the last of them."""
    labels_N = torch.zeros(1_000_001, dtype=torch.int64)
    logits_NC = torch.zeros(1_000_001, 2, dtype=torch.float32)

    exact, plain = (cross_entropy_sum(logits_NC, labels_N, exact=e) for e in (True, False))

    assert (exact.dtype, plain.dtype) == (torch.float64, torch.float32)
    expected = 1_000_001 * float(torch.tensor(math.log(2), dtype=torch.float32))
    assert float(exact) == pytest.approx(expected, rel=1e-13)
    assert float(plain) != pytest.approx(expected, rel=1e-13)


def test_exact_and_plain_sums_agree_in_float64():
    x, y = examples()
    logits_NC = Mlp((4, 3)).logits(vectors(15)[0], x)

    exact, plain = (cross_entropy_sum(logits_NC, y, exact=e) for e in (True, False))

    torch.testing.assert_close(exact, plain, rtol=1e-14, atol=0)
