"""Certificates of networks never tuned: intervals hold dense references, planted defects show.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.certificate import Certificate, certificate
from spectra.curvature.claim import Claim
from spectra.curvature.eigen import Extreme
from spectra.curvature.examination import chosen, examine
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import AutodiffHessian
from spectra.curvature.recomputation import other_way, recomputed
from spectra.curvature.spectrum import spectrum
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum

PENALTY = L2Penalty(0.01)
K = 9


@dataclass(frozen=True)
class Network:
    """Widths, activation, precision, steps of training, product it is solved with, tolerance."""

    widths: tuple[int, ...]
    activation: str
    dtype: torch.dtype
    steps: int
    product: str = "fused"
    rtol: float = 1e-3


SINGLE, DOUBLE = torch.float32, torch.float64
NETWORKS = {
    "sigmoid": Network((7, 6, 5, 4), "sigmoid", SINGLE, 0),
    "sigmoid, trained": Network((7, 6, 5, 4), "sigmoid", SINGLE, 150),
    "tanh, trained": Network((6, 8, 3), "tanh", SINGLE, 100),
    "tanh, deep": Network((5, 4, 4, 4, 3), "tanh", SINGLE, 40),
    "relu": Network((8, 7, 5), "relu", SINGLE, 30),
    "gelu": Network((6, 5, 5, 2), "gelu", SINGLE, 60),
    "no hidden layer": Network((9, 4), "sigmoid", SINGLE, 20),
    "one class in two": Network((6, 9, 2), "tanh", DOUBLE, 50, rtol=1e-8),
    "double": Network((7, 6, 5, 4), "sigmoid", DOUBLE, 100, rtol=1e-6),
    "autodiff": Network((7, 6, 5, 4), "gelu", SINGLE, 20, product="autodiff"),
    "autodiff, double": Network((5, 5, 4, 3), "tanh", DOUBLE, 60, product="autodiff", rtol=1e-9),
}


@dataclass(frozen=True)
class Solved:
    """A network with its claim, the products, and its dense Hessian in float64."""

    network: Network
    mlp: Mlp
    theta_P: Tensor
    inputs_ND: Tensor
    labels_N: Tensor
    claim: Claim
    hessian: Callable[[Tensor], Tensor]
    dense_PP: Tensor

    def certify(self, claim: Claim | None = None, **changed: object) -> Certificate:
        """The certificate of a claim, its own unless given."""
        theta_P = changed.pop("theta_P", self.theta_P)
        how = {"subset": 2, "products": 12, "generator": torch.Generator().manual_seed(3)} | changed
        claim = self.claim if claim is None else claim
        reference = partial(
            recomputed, other_way(self.mlp, theta_P, self.network.product),
            self.inputs_ND, self.labels_N, chunk=32,
        )  # fmt: skip
        found = examine(
            claim, theta_P, solved=self.at(theta_P), reference=reference,
            rtol=self.network.rtol, **how,
        )  # fmt: skip
        return certificate(
            claim, found, theta_P, penalty=PENALTY, rtol=self.network.rtol, stationary=1e-4,
            environment={},
        )  # fmt: skip

    def at(self, theta_P: Tensor):
        """The product at other weights."""
        if theta_P is self.theta_P:
            return self.hessian
        return product(self.network, self.mlp, theta_P, self.inputs_ND, self.labels_N)


def product(network: Network, mlp: Mlp, theta_P: Tensor, inputs_ND: Tensor, labels_N: Tensor):
    if network.product == "fused":
        return MlpHessian(mlp, theta_P, inputs_ND, labels_N)
    loss = lambda theta, x, y: cross_entropy_sum(mlp.logits(theta, x), y)  # noqa: E731
    return AutodiffHessian(loss, theta_P, [(inputs_ND, labels_N)])


@cache
def solved(name: str) -> Solved:
    network = NETWORKS[name]
    mlp = Mlp(network.widths, network.activation)
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    inputs_ND = torch.randn(60, network.widths[0], generator=draw, dtype=network.dtype)
    labels_N = torch.randint(0, network.widths[-1], (60,), generator=draw)
    theta_P = 2 * mlp.initial(draw, network.dtype)
    loss = oracles.mean_loss(network.widths, network.activation, inputs_ND, labels_N, c=0.01)
    for _ in range(network.steps):
        theta_P = theta_P - 0.3 * oracles.gradient(loss, theta_P)
    hessian = product(network, mlp, theta_P, inputs_ND, labels_N)
    found = spectrum(
        hessian, theta_P, penalty=PENALTY, k=K, rtol=network.rtol, max_products=4000,
        solver="lanczos", generator=draw,
    )  # fmt: skip
    exact = oracles.mean_loss(network.widths, network.activation, inputs_ND.double(), labels_N)
    dense_PP = oracles.dense_hessian(exact, theta_P.double())
    claim = Claim.of(found, theta_P)
    return Solved(network, mlp, theta_P, inputs_ND, labels_N, claim, hessian, dense_PP)


every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
@pytest.mark.parametrize("subset", [0, 2, "all"])
def test_intervals_hold_the_dense_eigenvalues_one_to_one(name: str, subset: int | str):
    planted = solved(name)
    exact = torch.linalg.eigvalsh(planted.dense_PP).numpy()
    leading = np.sort(exact[np.argsort(-np.abs(exact))[:K]])

    given = planted.certify(subset=subset)

    pairs = sorted(given.content["pairs"], key=lambda pair: pair["value"])
    assert given.complaints == ()
    for pair, value in zip(pairs, leading, strict=True):
        assert pair["low"] <= value <= pair["high"]
        assert pair["high"] - pair["low"] < 3e-5 * abs(leading).max()
    smallest = given.content["smallest"]
    assert smallest["low"] <= exact[0] <= smallest["high"]
    below = int((exact + PENALTY.shift < 0).sum())
    assert given.negative_directions <= below
    if given.content["stationarity"]["negative_directions_exact"]:
        assert given.negative_directions == below


@every_network
def test_vectors_are_as_near_as_is_said(name: str):
    """Each to its eigenvector within its angle, each cluster's span within the cluster's."""
    planted = solved(name)
    values, vectors = torch.linalg.eigh(planted.dense_PP)
    order = values.abs().argsort(descending=True)[:K].numpy()

    content = planted.certify().content

    rows_KP = torch.from_numpy(planted.claim.vectors_KP).double()
    said = np.argsort(planted.claim.values_K)
    nearest = dict(zip(said, np.sort(order), strict=True))
    groups = [([p["pair"] - 1], p["vector_error"]) for p in content["pairs"]]
    groups += [([i - 1 for i in c["members"]], c["bound"]) for c in content["clusters"]]
    for members, bound in groups:
        span = vectors[:, [int(nearest[i]) for i in members]]
        orthonormal, _ = torch.linalg.qr(rows_KP[members].T)
        off = orthonormal - span @ (span.T @ orthonormal)
        assert float(torch.linalg.matrix_norm(off, 2)) <= bound * 1.001 + 1e-8


@every_network
def test_each_pair_left_out_is_told(name: str):
    planted = solved(name)
    claim, last = planted.claim, abs(planted.claim.values_K[-1])
    for dropped in range(K - 1):
        if abs(claim.values_K[dropped]) <= last * (1 + 3 * planted.network.rtol):
            continue  # the set is complete without it, to the tolerance
        kept = [i for i in range(K) if i != dropped]
        short = replace(
            claim, values_K=claim.values_K[kept], vectors_KP=claim.vectors_KP[kept],
            residuals_K=claim.residuals_K[kept],
        )  # fmt: skip

        given = planted.certify(short)

        assert not given.sound
        assert any("missing" in text or "belongs" in text for text in given.complaints)


@every_network
@pytest.mark.parametrize("subset", [0, 2])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_each_vector_disturbed_is_told(name: str, subset: int, size: float):
    """At random, kept a unit vector, and even orthogonal to the other vectors."""
    planted = solved(name)
    draw = np.random.default_rng(5)
    for hit in range(K):
        vectors_KP = planted.claim.vectors_KP.copy()
        others = np.delete(vectors_KP, hit, axis=0).astype(np.float64)
        noise = draw.standard_normal(vectors_KP.shape[1])
        noise -= np.linalg.lstsq(others.T, noise, rcond=None)[0] @ others
        bent = vectors_KP[hit] + size * noise / np.linalg.norm(noise)
        vectors_KP[hit] = bent / np.linalg.norm(bent)

        assert not planted.certify(
            replace(planted.claim, vectors_KP=vectors_KP), subset=subset
        ).sound


@every_network
@pytest.mark.parametrize("subset", [0, 2])
def test_each_eigenvalue_disturbed_is_told(name: str, subset: int):
    planted = solved(name)
    for hit in range(K):
        values_K = planted.claim.values_K.copy()
        values_K[hit] *= 1 + 1e-3

        assert not planted.certify(replace(planted.claim, values_K=values_K), subset=subset).sound


@every_network
def test_swapped_and_doubled_pairs_are_told(name: str):
    planted = solved(name)
    for first in range(K - 1):
        swapped = planted.claim.values_K.copy()
        swapped[[first, first + 1]] = swapped[[first + 1, first]]
        doubled_KP = planted.claim.vectors_KP.copy()
        doubled_KP[first] = doubled_KP[first + 1]
        near = abs(swapped[first] - swapped[first + 1]) < 1e-4 * abs(swapped[0])

        assert near or not planted.certify(replace(planted.claim, values_K=swapped)).sound
        assert not planted.certify(replace(planted.claim, vectors_KP=doubled_KP)).sound


@every_network
def test_each_wrong_weight_is_told(name: str):
    """By its digest; and without one by the loss, the gradient or the spectrum if it matters."""
    planted = solved(name)
    forgetful = replace(planted.claim, weights=None)
    for hit in range(0, planted.mlp.dim, 7):
        theta_P = planted.theta_P.clone()
        theta_P[hit] += 1e-2

        assert not planted.certify(theta_P=theta_P).sound
        moves = float(planted.dense_PP[:, hit].norm()) > 1e-3
        assert not moves or not planted.certify(forgetful, theta_P=theta_P).sound


@every_network
def test_a_residual_understated_is_told(name: str):
    planted = solved(name)
    vague = replace(planted.claim, vectors_KP=planted.claim.vectors_KP.copy())
    rows = vague.vectors_KP
    rows[:2] = [(rows[0] + 0.01 * rows[1]), (rows[1] - 0.01 * rows[0])]
    rows[:2] /= np.linalg.norm(rows[:2], axis=1, keepdims=True)

    assert not planted.certify(vague).sound


def test_what_is_not_said_is_not_held_against_it():
    planted = solved("sigmoid, trained")
    bare = Claim(
        planted.claim.values_K, planted.claim.vectors_KP, None,
        Extreme(planted.claim.smallest.value, float("nan"), converged=True),
    )  # fmt: skip

    given = planted.certify(bare)

    assert given.sound
    assert all(pair["residual_said"] is None for pair in given.content["pairs"])


@pytest.mark.parametrize(
    ("k", "subset", "expected"),
    [
        (9, 0, []), (9, 1, [0]), (9, 2, [0, 8]), (9, 3, [0, 4, 8]), (2, 5, [0, 1]),
        (3, "all", [0, 1, 2]),
    ],
)  # fmt: skip
def test_the_pairs_recomputed_are_spread_evenly(k: int, subset: int | str, expected: list[int]):
    assert chosen(k, subset) == expected
