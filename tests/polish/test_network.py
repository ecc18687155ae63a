"""A network as a landscape, whole and merged, against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.equal_units import quotient
from spectra.inputs import inputs_of
from spectra.mlp import Mlp
from spectra.polish.network import Labelled, NetworkLandscape

WIDTHS = (6, 5, 4, 3)


def examples(count: int = 60, sparse: bool = True) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    inputs_ND = torch.rand(count, WIDTHS[0], generator=draw)
    if sparse:
        inputs_ND *= torch.rand(count, WIDTHS[0], generator=draw) < 0.3
    return inputs_ND, torch.randint(0, 3, (count,), generator=draw)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sparse", [True, False])
def test_losses_and_gradients_are_those_of_float64(sparse: bool, threads: int):
    """From data in float32 with a background that rounds: what is left of float32 are the data."""
    inputs_ND, labels_N = examples(sparse=sparse)
    inputs_ND -= 0.4242
    mlp = Mlp(WIDTHS)
    theta_P = mlp.initial(torch.Generator().manual_seed(1), torch.float64)
    loss = oracles.mean_loss(WIDTHS, "sigmoid", inputs_ND.double(), labels_N)

    landscape = NetworkLandscape(
        mlp, Labelled(inputs_of(inputs_ND, 17), labels_N, threads, inputs_ND)
    )
    local = landscape.at(theta_P)

    assert local.loss == pytest.approx(float(loss(theta_P)), rel=1e-14)
    torch.testing.assert_close(
        local.gradient_P, oracles.gradient(loss, theta_P), rtol=1e-11, atol=1e-15
    )
    v_P = torch.randn(mlp.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected_P = oracles.dense_hessian(loss, theta_P) @ v_P
    assert float((local(v_P) - expected_P).norm() / expected_P.norm()) < 1e-5


def test_lifts_of_the_merged_landscape_are_the_whole_one():
    widths, theta_P, _ = oracles.repeated(
        (6, 3, 2, 3), Mlp((6, 3, 2, 3)).initial(torch.Generator().manual_seed(1), torch.float64),
        [(1, 2, 3), (5, 2)],
    )  # fmt: skip
    inputs_ND, labels_N = examples()
    data = Labelled(inputs_of(inputs_ND.double()), labels_N)
    whole = Mlp(widths)
    classes = quotient(whole, theta_P, 1e-6)
    assert classes.mlp.widths == (6, 3, 2, 3)

    z_p = classes.merge(theta_P) / classes.scale_p
    merged, local = NetworkLandscape.merged(classes, data).at(z_p), None
    local = NetworkLandscape(whole, data).at(theta_P)

    torch.testing.assert_close(classes.lift(z_p), theta_P)
    assert merged.loss == pytest.approx(local.loss, rel=1e-13)
    torch.testing.assert_close(classes.lift(merged.gradient_P), local.gradient_P)
    v_p = torch.randn(len(z_p), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(classes.lift(merged(v_p)), local(classes.lift(v_p)))
