"""Activations: values against PyTorch's, derivatives against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from spectra.activations import ACTIVATIONS

NAMED = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
}
# 0 is on the grid: there ReLU's derivatives must be those that automatic differentiation takes.
GRID = torch.arange(-120, 121, dtype=torch.float64) / 20


def test_the_grid_contains_zero():
    assert (GRID == 0).any()


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(NAMED)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_slope_and_bend_are_phi_and_its_derivatives(name: str):
    """φ is PyTorch's function; φ' and φ'' equal its first two autograd derivatives."""
    a = GRID.clone().requires_grad_()
    value = NAMED[name](a)
    (slope,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    bend = torch.zeros_like(a)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), a)

    phi = ACTIVATIONS[name]
    h = phi.value(GRID)

    torch.testing.assert_close(h, value.detach(), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(phi.slope(GRID, h), slope.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(phi.bend(GRID, h), bend, rtol=1e-12, atol=1e-13)


def test_relu_is_flat_at_zero():
    zero = torch.zeros(1)
    relu = ACTIVATIONS["relu"]

    assert relu.value(zero) == relu.slope(zero, zero) == relu.bend(zero, zero) == 0


def test_gelu_is_the_exact_form():
    """That is x Φ(x), not the tanh approximation, from which it differs by up to 5e-4."""
    exact = GRID * torch.special.ndtr(GRID)

    torch.testing.assert_close(ACTIVATIONS["gelu"].value(GRID), exact, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_keep_shape_and_dtype(name: str, dtype: torch.dtype):
    a = torch.linspace(-2, 2, 6, dtype=dtype).view(2, 3)
    phi = ACTIVATIONS[name]
    h = phi.value(a)

    for result in (h, phi.slope(a, h), phi.bend(a, h)):
        assert result.shape == a.shape
        assert result.dtype == dtype
