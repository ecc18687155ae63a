"""Products with the data matrix: sparse ones equal dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectra.curvature.inputs import DenseInputs, SparseInputs, inputs_of


def mostly_background(n: int, d: int, background: float) -> Tensor:
    """A chunk with an example and two inputs that are background alone."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(n, d, generator=draw, dtype=torch.float64) + background
    x[torch.rand(n, d, generator=draw) < 0.75] = background
    x[n // 2] = background
    x[:, [0, d - 1]] = background
    return x


@pytest.mark.parametrize("background", [0.0, -0.4242])
@pytest.mark.parametrize("shape", [(1, 9), (13, 9), (40, 3)], ids=str)
def test_sparse_products_equal_dense_ones(shape: tuple[int, int], background: float):
    n, d = shape
    x = mostly_background(n, d, background)
    draw = torch.Generator().manual_seed(2)
    v = torch.randn(5, d, generator=draw, dtype=torch.float64)
    delta = torch.randn(n, 5, generator=draw, dtype=torch.float64)

    sparse = SparseInputs.of(x, background)

    torch.testing.assert_close(sparse.times(v), x @ v.T, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(sparse.under(delta), delta.T @ x, rtol=1e-13, atol=1e-14)


def test_the_sparse_form_is_chosen_for_digits_and_not_for_noise(digits: tuple[Tensor, Tensor]):
    x, _ = digits
    noise = torch.randn(100, 20, generator=torch.Generator().manual_seed(3))

    assert {type(c) for c in inputs_of(x, 1000)} == {SparseInputs}
    assert len(inputs_of(x, 1000)) == 3
    assert {type(c) for c in inputs_of(noise, 40)} == {DenseInputs}
