"""Products with a narrow side: equal to plain ones, and precise over many rows that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectra import narrow
from spectra.curvature.mlp_operator import MlpHessian
from spectra.mlp import Mlp

WIDTHS = [1, 2, 3, 4, 5, 11, 12, 40]


def factors(n: int, x: int, y: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that are alike: some constants and a hundredth of noise."""
    draw = torch.Generator().manual_seed(100 * x + y)

    def rows(width: int) -> Tensor:
        constant = torch.rand(width, generator=draw, dtype=torch.float64) + 0.1
        noise = torch.randn(n, width, generator=draw, dtype=torch.float64)
        return (constant + 0.01 * noise).to(dtype)

    return rows(x), rows(y)


@pytest.mark.parametrize("x", WIDTHS)
@pytest.mark.parametrize("y", WIDTHS)
@pytest.mark.parametrize("n", [1, 99, 100, 230])
def test_equal_to_plain_products(n: int, x: int, y: int):
    a, b = factors(n, x, y, torch.float64)
    w = torch.randn(x, y, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = w.clone()

    narrow.add_outer(sums, a, b)

    torch.testing.assert_close(sums, w + a.T @ b, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(narrow.product(a, w), a @ w, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(narrow.product(a, w, w[0]), a @ w + w[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(narrow.outer(a, b), a.T @ b, rtol=1e-13, atol=1e-13)
    more = narrow.add_product(b.clone(), a, w)
    torch.testing.assert_close(more, b + a @ w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("x", WIDTHS)
@pytest.mark.parametrize("y", WIDTHS)
def test_sums_over_many_rows_stay_precise(x: int, y: int):
    """One running sum of these is off by up to 1e-5."""
    a, b = factors(30_000, x, y, torch.float32)
    sums = torch.zeros(x, y)
    for a_n, b_n in zip(a.split(1500), b.split(1500), strict=True):
        narrow.add_outer(sums, a_n, b_n)

    exact = a.double().T @ b.double()

    assert float(((sums - exact) / exact).abs().max()) < 1.5e-6


@pytest.mark.parametrize("hidden", [(1, 1), (2, 5), (3, 20)], ids=str)
def test_hessian_of_a_narrow_network_is_precise_where_examples_are_alike(hidden: tuple[int, int]):
    """Small weights: hidden units are near 1/2 for every example."""
    draw = torch.Generator().manual_seed(3)
    mlp = Mlp((30, *hidden, 10))
    theta = 1e-2 * torch.randn(mlp.dim, generator=draw)
    x, labels = torch.rand(30_000, 30, generator=draw), torch.arange(30_000) % 10
    v = torch.randn(mlp.dim, generator=draw)

    image = MlpHessian(mlp, theta, x, labels)(v)
    exact = MlpHessian(mlp, theta.double(), x.double(), labels)(v.double())

    assert float((image - exact).norm() / exact.norm()) < 2e-6
