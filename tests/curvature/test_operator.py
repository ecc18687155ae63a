"""The reference Hessian against dense Hessians and finite differences of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from spectra.activations import ACTIVATIONS
from spectra.curvature.operator import AutodiffHessian
from spectra.errors import NonFiniteError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum

WIDTHS = (5, 4, 3, 3)
PAPER = (784, 128, 128, 10)


def hessian_of(
    mlp: Mlp, theta_P: Tensor, x: Tensor, y: Tensor, chunk: int | list[int] = 10_000
) -> AutodiffHessian:
    return AutodiffHessian(
        lambda theta, inputs, labels: cross_entropy_sum(mlp.logits(theta, inputs), labels),
        theta_P,
        zip(x.split(chunk), y.split(chunk), strict=True),
    )


def problem() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    theta_P = 0.8 * torch.randn(Mlp(WIDTHS).dim, generator=draw, dtype=torch.float64)
    x = torch.randn(7, 5, generator=draw, dtype=torch.float64)
    return theta_P, x, torch.randint(0, 3, (7,), generator=draw)


def quadratic(theta_P: Tensor, inputs: Tensor, _targets: Tensor) -> Tensor:
    return (inputs @ theta_P).square().sum()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chunk", [[7], [4, 3], [1] * 7, [6, 1], [2, 4, 1]], ids=str)
def test_products_loss_and_gradient_equal_the_dense_ones(activation: str, chunk: list[int]):
    """All 51 columns of H, to round-off, however raggedly the seven examples are cut."""
    theta_P, x, y = problem()
    loss = oracles.mean_loss(WIDTHS, activation, x, y)
    H_PP = oracles.dense_hessian(loss, theta_P)

    hessian = hessian_of(Mlp(WIDTHS, activation), theta_P, x, y, chunk)
    identity_PP = torch.eye(len(theta_P), dtype=torch.float64)
    actual_PP = torch.stack([hessian(column_P) for column_P in identity_PP], dim=1)

    assert H_PP.abs().max() > 0.1
    torch.testing.assert_close(actual_PP, H_PP, rtol=1e-12, atol=1e-14)
    assert hessian.loss == pytest.approx(float(loss(theta_P)), rel=1e-14)
    expected_P = oracles.gradient(loss, theta_P)
    torch.testing.assert_close(hessian.gradient_P, expected_P, rtol=1e-12, atol=1e-14)
    assert not hessian.gradient_P.requires_grad
    assert (hessian.dim, hessian.examples, hessian.products) == (51, 7, 51)


@pytest.mark.parametrize("convention", ["full", "half"])
@pytest.mark.parametrize("referenced", [False, True])
def test_shifted_products_are_those_of_the_objective(convention: str, referenced: bool):
    """H_CE v + 2c v = H_eff v, with H_eff dense from the penalised loss; ref does not enter."""
    theta_P, x, y = problem()
    reference_P = theta_P.flip(0) if referenced else None
    penalty = L2Penalty(0.3, convention, reference_P)
    objective = oracles.mean_loss(
        WIDTHS,
        "sigmoid",
        x,
        y,
        c=0.3 if convention == "full" else 0.15,
        reference_P=0.0 if reference_P is None else reference_P,
    )
    v_P = torch.linspace(-1, 1, 51, dtype=torch.float64)

    actual_P = hessian_of(Mlp(WIDTHS), theta_P, x, y, 4)(v_P) + penalty.shift * v_P

    expected_P = oracles.dense_hessian(objective, theta_P) @ v_P
    torch.testing.assert_close(actual_P, expected_P, rtol=1e-11, atol=1e-13)


def check_finite_differences(x: Tensor, y: Tensor, chunk: int, rtol: float) -> None:
    """Hv is the central difference of the gradient, at the real size and on real digits."""
    mlp = Mlp(PAPER)
    draw = torch.Generator().manual_seed(6)
    theta_P = 2 * mlp.initial(draw, torch.float64)
    v_P = torch.randn(mlp.dim, generator=draw, dtype=torch.float64)
    v_P /= v_P.norm()
    hessian = hessian_of(mlp, theta_P, x, y, chunk)

    def gradient(at_P: Tensor) -> Tensor:
        total_P = torch.zeros_like(at_P)
        for inputs, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            part = oracles.gradient(oracles.mean_loss(PAPER, "sigmoid", inputs, labels), at_P)
            total_P += part * len(labels) / len(y)
        return total_P

    step = 1e-3
    difference_P = (gradient(theta_P + step * v_P) - gradient(theta_P - step * v_P)) / (2 * step)
    product_P = hessian(v_P)
    assert product_P.norm() > 1e-3
    assert (product_P - difference_P).norm() <= rtol * product_P.norm()
    torch.testing.assert_close(hessian.gradient_P, gradient(theta_P), rtol=1e-9, atol=1e-14)
    u_P = gradient(theta_P)
    left, right = float(u_P @ product_P), float(v_P @ hessian(u_P))
    assert left == pytest.approx(right, rel=1e-9)


def test_products_are_differences_of_the_gradient_of_the_real_network(
    digits: tuple[Tensor, Tensor],
):
    """784-128-128-10 on 250 digits in chunks of 100, 100 and 50; also symmetric there."""
    check_finite_differences(digits[0][:250], digits[1][:250], chunk=100, rtol=1e-6)


@pytest.mark.slow
def test_products_are_differences_of_the_gradient_on_all_of_mnist(mnist: tuple[Tensor, Tensor]):
    """60,000 digits in chunks of 8,192, the last ragged."""
    check_finite_differences(*mnist, chunk=8192, rtol=1e-6)


def test_products_are_symmetric_and_linear():
    theta_P, x, y = problem()
    hessian = hessian_of(Mlp(WIDTHS, "gelu"), theta_P, x, y, 3)
    draw = torch.Generator().manual_seed(7)
    u_P, v_P = torch.randn(2, 51, generator=draw, dtype=torch.float64)

    assert float(u_P @ hessian(v_P)) == pytest.approx(float(v_P @ hessian(u_P)), rel=1e-12)
    combined_P = 2 * hessian(u_P) - 3 * hessian(v_P)
    torch.testing.assert_close(hessian(2 * u_P - 3 * v_P), combined_P, rtol=1e-12, atol=1e-13)


def test_softmax_shift_gives_exact_null_directions():
    """Adding one vector to every row of the last W, or a number to b, changes no probability.

    That makes h + 1 directions with Hv = 0 for a last hidden layer of h units: 4 here, and the
    dense Hessian has at least as many zero eigenvalues.
    """
    theta_P, x, y = problem()
    hessian = hessian_of(Mlp(WIDTHS), theta_P, x, y, 4)
    H_PP = oracles.dense_hessian(oracles.mean_loss(WIDTHS, "sigmoid", x, y), theta_P)
    last_weight, last_bias = slice(51 - 12, 51 - 3), slice(51 - 3, 51)

    for unit in range(3):
        v_P = torch.zeros(51, dtype=torch.float64)
        v_P[last_weight].view(3, 3)[:, unit] = 1
        assert hessian(v_P).abs().max() < 1e-15
    v_P = torch.zeros(51, dtype=torch.float64)
    v_P[last_bias] = 1
    assert hessian(v_P).abs().max() < 1e-15
    v_P[last_bias] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert hessian(v_P).abs().max() > 1e-3
    assert int((torch.linalg.eigvalsh(H_PP).abs() < 1e-14).sum()) >= 4


def test_softmax_shift_gives_129_null_directions_of_the_real_network(
    digits: tuple[Tensor, Tensor],
):
    """A random combination of the 129 is null too, and one with two rows unequal is not."""
    mlp = Mlp(PAPER)
    draw = torch.Generator().manual_seed(8)
    hessian = hessian_of(mlp, mlp.initial(draw, torch.float64), digits[0][:100], digits[1][:100])
    v_P = torch.zeros(mlp.dim, dtype=torch.float64)
    weight, bias = v_P[-1290:-10].view(10, 128), v_P[-10:]
    weight += torch.randn(128, generator=draw, dtype=torch.float64)
    bias += 0.7
    assert hessian(v_P).norm() < 1e-13 * v_P.norm()

    weight[0] = 0
    assert hessian(v_P).norm() > 1e-2


def test_theta_is_copied():
    """The operator stays that of θ, whatever an optimiser does to the tensor afterwards."""
    theta_P, x, y = problem()
    hessian = hessian_of(Mlp(WIDTHS), theta_P, x, y)
    v_P = torch.ones(51, dtype=torch.float64)
    before_P = hessian(v_P)

    theta_P.zero_()

    assert torch.equal(hessian(v_P), before_P)


def test_products_are_bit_for_bit_repeatable():
    theta_P, x, y = problem()
    v_P = torch.linspace(-1, 1, 51)
    first, second = (hessian_of(Mlp(WIDTHS), theta_P.float(), x.float(), y, 3) for _ in range(2))

    assert torch.equal(first(v_P), second(v_P))
    assert first(v_P).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_give_no_finite_loss_are_refused(bad: float):
    theta_P, x, y = problem()
    theta_P[3] = bad

    with pytest.raises(NonFiniteError, match="float64"):
        hessian_of(Mlp(WIDTHS, "relu"), theta_P, x, y, 3)


def test_an_infinite_loss_of_any_chunk_is_refused():
    """Also where the gradient is finite and the last chunk is innocent."""
    data = torch.eye(2)

    def loss_sum(theta_P: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return quadratic(theta_P, inputs, targets) + targets.sum()

    chunks = [(data[:1], torch.tensor([math.inf])), (data[1:], torch.tensor([0.0]))]
    with pytest.raises(NonFiniteError):
        AutodiffHessian(loss_sum, torch.ones(2), chunks)


@pytest.mark.parametrize("chunks", [[], [(torch.zeros(0, 2), torch.zeros(0))]], ids=["no", "empty"])
def test_no_examples_are_refused(chunks: list[tuple[Tensor, Tensor]]):
    with pytest.raises(ValueError, match="at least one example"):
        AutodiffHessian(quadratic, torch.ones(2), chunks)
