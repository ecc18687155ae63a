"""The verdict at points whose kind is known: a convex objective, a saddle, no stationary point."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.certificate import Certificate, certificate
from spectra.curvature.claim import Claim
from spectra.curvature.examination import examine
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.recomputation import other_way, recomputed
from spectra.curvature.spectrum import spectrum
from spectra.mlp import Mlp
from spectra.objective import L2Penalty

K = 5


def data(inputs: int):
    draw = torch.Generator().manual_seed(0)
    inputs_ND = torch.randn(40, inputs, generator=draw, dtype=torch.float64)
    return inputs_ND, torch.arange(40) % 3


def certified(mlp: Mlp, theta_P: Tensor, l2: float, convention: str = "full") -> Certificate:
    inputs_ND, labels_N = data(mlp.widths[0])
    penalty = L2Penalty(l2, convention)
    hessian = MlpHessian(mlp, theta_P, inputs_ND, labels_N)
    draw = torch.Generator().manual_seed(1)
    found = spectrum(
        hessian, theta_P, penalty=penalty, k=K, rtol=1e-8, max_products=2000, solver="lanczos",
        generator=draw,
    )  # fmt: skip
    claim = Claim.of(found, theta_P)
    examined = examine(
        claim, theta_P, solved=hessian, rtol=1e-8, subset=2, products=12, generator=draw,
        reference=partial(recomputed, other_way(mlp, theta_P, "fused"), inputs_ND, labels_N),
    )  # fmt: skip
    return certificate(
        claim, examined, theta_P, penalty=penalty, rtol=1e-8, stationary=1e-4,
        environment={"a": 1},
    )  # fmt: skip


def stationary(mlp: Mlp, theta_P: Tensor, c: float, steps: int = 40) -> Tensor:
    """Newton's method on ‖∇L_eff‖ by dense matrices: to whatever stationary point is near."""
    inputs_ND, labels_N = data(mlp.widths[0])
    loss = oracles.mean_loss(mlp.widths, mlp.activation, inputs_ND, labels_N, c=c)
    for _ in range(steps):
        H_PP = oracles.dense_hessian(loss, theta_P)
        theta_P = theta_P - torch.linalg.lstsq(H_PP, oracles.gradient(loss, theta_P)).solution
    assert float(oracles.gradient(loss, theta_P).norm()) < 1e-8
    return theta_P


@pytest.mark.parametrize("convention", ["full", "half"])
def test_the_minimum_of_a_convex_objective(convention: str):
    """Multinomial regression: L_eff is strictly convex, and there ∇L_CE = −2cθ."""
    mlp = Mlp((4, 3))
    c = 0.05 if convention == "full" else 0.025
    theta_P = stationary(mlp, torch.zeros(mlp.dim, dtype=torch.float64), c)

    given = certified(mlp, theta_P, 0.05, convention)

    still = given.content["stationarity"]
    assert given.sound
    assert given.verdict == "minimum"
    assert still["cosine"] == pytest.approx(-1, abs=1e-9)
    assert still["negative_directions_exact"]
    assert given.negative_directions == 0
    assert given.content["objective"]["shift"] == 2 * c
    assert still["lambda_min_low"] <= 2 * c + 1e-12
    assert still["lambda_min_high"] >= 2 * c - 1e-12  # shifts of all logits cost nothing


def test_without_a_penalty_a_null_direction_leaves_it_undecided():
    mlp = Mlp((4, 3))
    theta_P = stationary(mlp, torch.zeros(mlp.dim, dtype=torch.float64), 0.0)

    given = certified(mlp, theta_P, 0.0)

    assert given.sound
    assert given.verdict == "undecided"
    still = given.content["stationarity"]
    assert still["lambda_min_low"] < 0 < still["lambda_min_high"]


def test_a_network_that_tells_the_priors_only_is_a_saddle():
    """All weights zero: without a penalty the layers' coupling leads down to second order."""
    mlp = Mlp((4, 4, 3), "tanh")
    inputs_ND, labels_N = data(4)
    balanced = torch.zeros(mlp.dim, dtype=torch.float64)
    priors_C = np.bincount(labels_N.numpy()) / len(labels_N)
    balanced[-3:] = torch.from_numpy(np.log(priors_C) - np.log(priors_C).mean())

    given = certified(mlp, balanced, 0.0)

    loss = oracles.mean_loss(mlp.widths, "tanh", inputs_ND, labels_N)
    exact = torch.linalg.eigvalsh(oracles.dense_hessian(loss, balanced))
    assert given.sound
    assert given.verdict == "saddle"
    assert given.content["stationarity"]["gradient_norm"] < 1e-12
    assert 1 <= given.negative_directions <= int((exact < -1e-12).sum())


def test_away_from_stationarity_it_says_so():
    mlp = Mlp((4, 3))
    given = certified(mlp, torch.ones(mlp.dim, dtype=torch.float64), 0.01)

    assert given.sound
    assert given.verdict == "not stationary"
    assert given.content["environment"] == {"a": 1}
    assert given.metrics()["certified"] == 1
    assert all(np.isfinite(value) for value in given.metrics().values())
