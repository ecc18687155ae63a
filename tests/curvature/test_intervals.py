"""Intervals, angles and clusters against dense matrices whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
from spectra.curvature.intervals import IDENTIFIABLE, located

SPECTRA = {
    "apart": [5, 4, 3, 2, 1, -3],
    "a pair nearly equal": [5, 4, 4 + 1e-7, 2, 1, -3],
    "copies": [5, 4, 4, 4, 1, -4],
    "both signs near": [2, 1e-4, -1e-4, 1.5, -2, 1],
    "all one": [3, 3, 3, 3, 3, 3],
}


def disturbed(values: list[float], size: float, seed: int):
    """A matrix of 40 rows, K vectors off its eigenvectors by `size`, their ρ and residuals."""
    matrix = oracles.planted([*values, *oracles.bulk(34, -0.5, 0.5)], seed=seed).numpy()
    every, vectors = np.linalg.eigh(matrix)
    chosen = [int(np.argsort(np.abs(every - v))[values[:i].count(v)]) for i, v in enumerate(values)]
    draw = np.random.default_rng(seed)
    rows, _ = np.linalg.qr(vectors[:, chosen] + size * draw.standard_normal((40, len(values))))
    rows = rows.T
    rho = np.einsum("kp,pq,kq->k", rows, matrix, rows)
    residuals = np.linalg.norm(rows @ matrix - rho[:, None] * rows, axis=1)
    return every, vectors, chosen, rows, rho, residuals


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_eigenvalues_one_to_one(name: str, size: float, seed: int):
    every, _, chosen, rows, rho, residuals = disturbed(SPECTRA[name], size, seed)
    singular = float(np.linalg.svd(rows, compute_uv=False)[-1])

    found = located(
        rho, residuals + 1e-13, beyond=(-0.5, 0.5), smallest_singular=min(singular, 1.0)
    )

    order = np.argsort(rho)
    exact = np.sort(every[chosen])
    assert (found.low_K[order] <= exact).all()
    assert (exact <= found.high_K[order]).all()
    assert (found.high_K - found.low_K <= 2 * np.sqrt(6) * residuals.max() / singular + 1e-12).all()


@pytest.mark.parametrize("size", [1e-3, 1e-6])
@pytest.mark.parametrize("seed", range(3))
def test_a_lone_vector_is_within_its_angle(size: float, seed: int):
    _, vectors, chosen, rows, rho, residuals = disturbed(SPECTRA["apart"], size, seed)

    found = located(rho, residuals, beyond=(-0.5, 0.5))

    cosines = np.abs(np.einsum("kp,pk->k", rows, vectors[:, chosen]))
    sines = np.sqrt(np.maximum(1 - cosines**2, 0))
    assert found.clusters == ()
    assert (sines <= found.angles_K + 1e-9).all()
    assert (found.angles_K < IDENTIFIABLE).all()


@pytest.mark.parametrize("seed", range(3))
def test_of_copies_the_subspace_is_identified_and_the_vectors_are_not(seed: int):
    _, vectors, chosen, rows, rho, residuals = disturbed(SPECTRA["copies"], 1e-6, seed)

    found = located(rho, residuals, beyond=(-0.5, 0.5))

    (cluster,) = found.clusters
    assert cluster.members == (1, 2, 3)
    assert not cluster.open
    assert (found.angles_K[[1, 2, 3]] >= IDENTIFIABLE).all()
    span = vectors[:, [chosen[i] for i in cluster.members]]
    cosines = np.linalg.svd(rows[[1, 2, 3]] @ span, compute_uv=False)
    assert np.sqrt(max(1 - cosines[-1] ** 2, 0)) <= cluster.bound + 1e-9
    assert cluster.bound < 1e-4


def test_a_cluster_at_the_edge_of_the_set_is_open():
    values = np.array([4.0, 1.0, -1.0])

    found = located(values, np.full(3, 1e-6), beyond=(-1.0, 1.0))

    assert [(c.members, c.open) for c in found.clusters] == [((1,), True), ((2,), True)]


def test_the_spectrum_beyond_counts_on_both_sides():
    """−1 is far below what lies beyond from −0.2 on; 1 is not far above 0.9999995."""
    values = np.array([4.0, 1.0, -1.0])

    found = located(values, np.full(3, 1e-6), beyond=(-0.2, 0.9999995))

    assert [c.members for c in found.clusters] == [(1,)]
    assert found.angles_K[2] == pytest.approx(1e-6 / 0.8)


def test_dependent_vectors_locate_nothing():
    found = located(np.array([2.0, 1.0]), np.zeros(2), beyond=(0, 0), smallest_singular=0.0)

    assert not np.isfinite(found.low_K).any()
    assert found.clusters[0].open


def test_the_bound_allows_for_vectors_that_are_not_quite_orthonormal():
    """Two unit vectors 1e-3 off each other's complement: matched within ‖R‖ / σ_min, not less."""
    matrix = torch.diag(torch.tensor([1.0, 1.0 + 1e-6, 0.0], dtype=torch.float64)).numpy()
    rows = np.array([[1, 0, 0], [1e-3, 1, 1e-3]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rho = np.einsum("kp,pq,kq->k", rows, matrix, rows)
    residuals = np.linalg.norm(rows @ matrix - rho[:, None] * rows, axis=1)
    singular = float(np.linalg.svd(rows, compute_uv=False)[-1])

    found = located(rho, residuals, beyond=(0.0, 0.0), smallest_singular=singular)

    order = np.argsort(rho)
    assert (found.low_K[order] <= [1.0, 1.0 + 1e-6]).all()
    assert (found.high_K[order] >= [1.0, 1.0 + 1e-6]).all()
