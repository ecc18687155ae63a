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


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-14), (torch.float32, 1e-5, 1e-6)], ids=str
)
def test_pull_is_an_error_times_the_slope(name: str, dtype: torch.dtype, rtol: float, atol: float):
    """Against autograd's derivative, in float64, of PyTorch's function; 0 is on the grid."""
    a = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(NAMED[name](a).sum(), a)
    error = torch.linspace(-3, 2, len(GRID), dtype=torch.float64)
    phi = ACTIVATIONS[name]
    given = [error.to(dtype), GRID.to(dtype), phi.value(GRID.to(dtype))]
    copies = [tensor.clone() for tensor in given]

    pulled = phi.pull(*given)

    assert pulled.dtype == dtype
    torch.testing.assert_close(pulled.double(), error * slope, rtol=rtol, atol=atol)
    own = given[0] * phi.slope(*given[1:])
    torch.testing.assert_close(pulled, own, rtol=rtol, atol=atol)
    assert all(torch.equal(t, copy) for t, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pull_takes_stacks_as_they_lie_in_memory(name: str):
    """A transposed (M, N, H) error, as a matrix product may leave it, and a shape kept."""
    draw = torch.Generator().manual_seed(1)
    a, error = torch.randn(2, 3, 5, 4, generator=draw, dtype=torch.float64)
    phi = ACTIVATIONS[name]
    h = phi.value(a)

    pulled = phi.pull(error.mT.contiguous().mT, a, h)

    torch.testing.assert_close(pulled, error * phi.slope(a, h), rtol=1e-12, atol=1e-14)


def test_relu_is_flat_at_zero():
    zero = torch.zeros(1)
    relu = ACTIVATIONS["relu"]

    assert relu.value(zero) == relu.slope(zero, zero) == relu.bend(zero, zero) == 0
    assert relu.pull(torch.ones(1), zero, zero) == 0


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
