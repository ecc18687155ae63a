"""Both ways of recomputing against dense Hessians; the noise of products against planted noise."""

from __future__ import annotations

import pytest
import torch

import oracles
from spectra.curvature.eigen import ROUND_OFF
from spectra.curvature.noise import noise_floor
from spectra.curvature.recomputation import Recomputed, other_way, recomputed
from spectra.mlp import Mlp

MLP = Mlp((6, 5, 4, 3), "tanh")


def problem(dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(0)
    inputs_ND = torch.randn(53, 6, generator=draw, dtype=dtype)
    labels_N = torch.randint(0, 3, (53,), generator=draw)
    return MLP.initial(draw, dtype), inputs_ND, labels_N


@pytest.mark.parametrize("solved_with", ["fused", "autodiff"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [7, 53, 1000])
@pytest.mark.parametrize("vectors", [0, 1, 4])
def test_loss_gradient_and_products_are_those_of_the_dense_hessian(
    solved_with: str, threads: int, chunk: int, vectors: int
):
    """Of the float32 weights and inputs, in float64; the last chunk is smaller."""
    theta_P, inputs_ND, labels_N = problem()
    loss = oracles.mean_loss(MLP.widths, "tanh", inputs_ND.double(), labels_N)
    draw = torch.Generator().manual_seed(1)
    v_BP = torch.randn(vectors, MLP.dim, generator=draw, dtype=torch.float64)

    part = other_way(MLP, theta_P, solved_with)
    again = recomputed(part, inputs_ND, labels_N, v_BP, threads=threads, chunk=chunk)

    exact_P = theta_P.double()
    assert again.loss == pytest.approx(float(loss(exact_P)), rel=1e-14)
    close = {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(again.gradient_P, oracles.gradient(loss, exact_P), **close)
    dense_PP = oracles.dense_hessian(loss, exact_P)
    torch.testing.assert_close(again.images_BP, v_BP @ dense_PP, rtol=1e-10, atol=1e-14)


def test_the_two_ways_are_different_code():
    theta_P, inputs_ND, labels_N = problem()
    v_BP = torch.eye(MLP.dim).double()

    one, other = (
        recomputed(other_way(MLP, theta_P, name), inputs_ND, labels_N, v_BP)
        for name in ("fused", "autodiff")
    )

    assert not torch.equal(one.images_BP, other.images_BP)
    torch.testing.assert_close(one.images_BP, other.images_BP, rtol=1e-10, atol=1e-15)


def test_there_must_be_examples():
    theta_P, inputs_ND, labels_N = problem()

    with pytest.raises(ValueError, match="at least one example"):
        recomputed(
            other_way(MLP, theta_P, "fused"), inputs_ND[:0], labels_N[:0], torch.zeros(1, MLP.dim)
        )


@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_the_noise_floor_is_that_of_the_product(size: float):
    """Planted: an error of `size` relative to |λ_1| in every product."""
    matrix_PP = oracles.planted([5, 4, 1, *oracles.bulk(57)])
    draw = torch.Generator().manual_seed(0)

    def noisy(v_P: torch.Tensor) -> torch.Tensor:
        error_P = torch.randn(60, generator=draw, dtype=torch.float64)
        return matrix_PP @ v_P + 5 * size * float(v_P.norm()) * error_P / error_P.norm()

    floor = noise_floor(
        noisy, lambda v_BP: Recomputed(0.0, v_BP[0], v_BP @ matrix_PP), dim=60,
        dtype=torch.float64, device=torch.device("cpu"), generator=draw,
    )  # fmt: skip

    assert floor == pytest.approx(size, rel=0.3)


def test_the_noise_floor_is_never_below_what_counts_as_converged():
    matrix_PP = oracles.planted([5, 4, 1, *oracles.bulk(57)])
    for scale in (1.0, 0.0):
        floor = noise_floor(
            lambda v_P, scale=scale: scale * matrix_PP @ v_P,
            lambda v_BP, scale=scale: Recomputed(0.0, v_BP[0], scale * v_BP @ matrix_PP),
            dim=60, dtype=torch.float64, device=torch.device("cpu"),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

        assert floor == ROUND_OFF * torch.finfo(torch.float64).eps
