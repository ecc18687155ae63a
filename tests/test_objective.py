"""The objective: both conventions, with and without a reference, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum, evaluate

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
def test_add_gradient_adds_it_in_place(convention: str, c: float, referenced: bool):
    theta_P, reference_P = vectors()
    penalty = L2Penalty(L2, convention, reference_P if referenced else None)
    start_P = torch.linspace(-1, 1, 27, dtype=torch.float64)
    actual_P, theta_before_P = start_P.clone(), theta_P.clone()

    penalty.add_gradient_(actual_P, theta_P)

    offset_P = theta_P - reference_P if referenced else theta_P
    torch.testing.assert_close(actual_P, start_P + 2 * c * offset_P, rtol=1e-13, atol=1e-14)
    assert torch.equal(theta_P, theta_before_P)


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


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 10_000])
def test_evaluate_is_the_direct_mean_for_ragged_chunks(chunk: int):
    """Chunks of 4, 4 and 3 count by their examples; accuracy is in percent."""
    x, y = examples()
    theta_P, _ = vectors()
    z_NC = oracles.logits(WIDTHS, "sigmoid", theta_P, x)

    loss, accuracy = evaluate(Mlp(WIDTHS).logits, theta_P, x, y, chunk=chunk)

    expected = float(oracles.mean_loss(WIDTHS, "sigmoid", x, y)(theta_P))
    hits = sum(int(scores.argmax()) == int(label) for scores, label in zip(z_NC, y, strict=True))
    assert loss == pytest.approx(expected, rel=1e-13)
    assert 0 < hits < 11
    assert accuracy == pytest.approx(100 * hits / 11, rel=1e-14)


def test_evaluate_leaves_no_graph():
    x, y = examples()
    seen = []

    def logits(theta_P: Tensor, inputs_ND: Tensor) -> Tensor:
        seen.append(Mlp(WIDTHS).logits(theta_P, inputs_ND))
        return seen[-1]

    evaluate(logits, vectors()[0].requires_grad_(), x, y)

    assert not seen[0].requires_grad
