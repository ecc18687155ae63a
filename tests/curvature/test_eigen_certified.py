"""What `certified` makes of any vectors and their products, whoever found them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spectra.curvature.eigen import certified


def test_certified_trusts_no_solver():
    """Vectors that are no eigenvectors: Rayleigh quotients, true residuals, not converged."""
    matrix_PP = torch.diag(torch.tensor([4.0, 1.0, -2.0], dtype=torch.float64))
    tilted_KP = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)

    pairs = certified(tilted_KP, tilted_KP @ matrix_PP, k=2, rtol=1e-3, products=10)

    # 0.64·4 + 0.36·1, and |(H − 2.92)v| = 0.6·0.8·(4 − 1).
    np.testing.assert_allclose(pairs.values_K, [2.92, -2], rtol=1e-14)
    np.testing.assert_allclose(pairs.residuals_K, [1.44, 0], rtol=1e-13)
    assert pairs.converged_K.tolist() == [False, True]
    assert pairs.smallest.value == -2
    assert pairs.largest.value == pytest.approx(2.92)
    assert not pairs.largest.converged
    assert pairs.products == 10


def test_an_end_need_not_be_better_than_what_is_asked_for():
    """Residual 0.01 at an end of −0.2: nothing where λ_K = 1 is wanted, enough where 20 is."""
    values = torch.tensor([1.0, -0.2 + 1e-4], dtype=torch.float64)
    vectors_KP = torch.eye(3, dtype=torch.float64)[:2]
    images_KP = values[:, None] * vectors_KP
    images_KP[1, 2] = 0.01

    strict, loose = (
        certified(vectors_KP, images_KP, k=1, rtol=1e-3, products=5, above=above)
        for above in (0.0, 20.0)
    )

    assert strict.smallest.value == loose.smallest.value == pytest.approx(-0.1999)
    assert strict.smallest.residual == pytest.approx(0.01)
    assert not strict.smallest.converged
    assert loose.smallest.converged
    assert strict.largest == loose.largest


def test_signs_follow_the_largest_entry():
    """A vector and its negative are certified as the same."""
    matrix_PP = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    v_P = torch.tensor([[-0.99, 0.14]], dtype=torch.float64)
    v_P /= v_P.norm()
    for start in (v_P, -v_P):
        pairs = certified(start, start @ matrix_PP, k=1, rtol=1e-3, products=1)
        assert pairs.vectors_KP[0, 0] > 0 > pairs.vectors_KP[0, 1]
