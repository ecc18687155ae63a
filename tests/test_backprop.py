"""Back-propagation by hand against automatic differentiation of a network written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from spectra.activations import ACTIVATIONS
from spectra.backprop import Backprop
from spectra.mlp import Mlp

WIDTHS = [(5, 3), (5, 4, 3), (5, 4, 2, 3), (5, 4, 6, 4, 3)]


def problem(widths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(len(widths))
    theta_P = 0.7 * torch.randn(Mlp(widths).dim, generator=draw, dtype=torch.float64)
    x = torch.randn(11, 5, generator=draw, dtype=torch.float64)
    return theta_P.to(dtype), x.to(dtype), torch.randint(0, 3, (11,), generator=draw)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_equals_autograd(activation: str, widths: tuple[int, ...]):
    """Batches of 4, 4 and the ragged 3, through the same buffers, to float64 round-off."""
    theta_P, x, y = problem(widths)
    backprop = Backprop(Mlp(widths, activation), theta_P)

    for batch, labels in zip(x.split(4), y.split(4), strict=True):
        loss = oracles.mean_loss(widths, activation, batch, labels)
        expected_P = oracles.gradient(loss, theta_P)
        assert expected_P.abs().max() > 1e-3
        torch.testing.assert_close(backprop(batch, labels), expected_P, rtol=1e-12, atol=1e-13)


def test_the_flat_gradient_is_what_a_call_writes():
    """The returned tensor is `gradient_P` itself, written anew: nothing accumulates."""
    theta_P, x, y = problem((5, 4, 3))
    backprop = Backprop(Mlp((5, 4, 3)), theta_P)

    first_P = backprop(x, y).clone()
    second_P = backprop(x, y)

    assert second_P.data_ptr() == backprop.gradient_P.data_ptr()
    assert torch.equal(second_P, first_P)


def test_parameters_changed_in_place_are_seen():
    """An optimiser steps on θ itself; the next gradient is that of the new θ."""
    widths = (5, 4, 3)
    theta_P, x, y = problem(widths)
    backprop = Backprop(Mlp(widths), theta_P)
    before_P = backprop(x, y).clone()

    theta_P.add_(0.3)

    expected_P = oracles.gradient(oracles.mean_loss(widths, "sigmoid", x, y), theta_P)
    torch.testing.assert_close(backprop(x, y), expected_P, rtol=1e-12, atol=1e-13)
    assert (expected_P - before_P).abs().max() > 1e-3


def test_arguments_are_left_alone():
    theta_P, x, y = problem((5, 4, 3))
    copies = [t.clone() for t in (theta_P, x, y)]

    Backprop(Mlp((5, 4, 3)), theta_P)(x, y)

    assert all(torch.equal(t, copy) for t, copy in zip((theta_P, x, y), copies, strict=True))


def test_float32_stays_float32():
    theta_P, x, y = problem((5, 4, 3), torch.float32)
    gradient_P = Backprop(Mlp((5, 4, 3)), theta_P)(x, y)
    exact = oracles.mean_loss((5, 4, 3), "sigmoid", x.double(), y)

    assert gradient_P.dtype == torch.float32
    expected_P = oracles.gradient(exact, theta_P.double())
    torch.testing.assert_close(gradient_P.double(), expected_P, rtol=1e-5, atol=1e-7)
