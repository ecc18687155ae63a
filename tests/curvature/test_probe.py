"""The probe catches every pair that is left out, and says nothing against complete sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import oracles
from spectra.curvature.probe import CHANCE, Probe, probe

RTOL = 1e-4

SPECTRA = {
    "outliers": np.concatenate([[5, 4, 3, 2.5, 2, 1], oracles.bulk(114, 0, 0.5)]),
    "indefinite": np.concatenate([[5, -4, 3, -2.5, 2, -1], oracles.bulk(114, -0.6, 0.5)]),
    "a bulk up to the set": np.concatenate([[5, 4, 3, 1.2, 1.1, 1.05], oracles.bulk(114, 0, 1)]),
    "copies": np.concatenate([[5, 3, 3, 3, 2, 2], oracles.bulk(114, 0, 1.5)]),
    "null space": np.concatenate([[5, 4, 3, 3, -2, 1], np.zeros(114)]),
    "a degenerate rest": np.concatenate([[5, 4, 3, 2, 2, 2], np.full(114, 1.0)]),
}


def look(matrix_PP: torch.Tensor, vectors_KP: torch.Tensor, last: float, seed: int = 0) -> Probe:
    every = torch.linalg.eigvalsh(matrix_PP)
    return probe(
        lambda v_P: matrix_PP @ v_P,
        vectors_KP,
        limit=last * (1 + RTOL),
        lowest=float(every[0]) - RTOL * last,
        products=12,
        negligible=0.05 * RTOL * last,
        generator=torch.Generator().manual_seed(seed),
    )


def solved(name: str):
    matrix_PP = oracles.planted(SPECTRA[name], seed=1)
    values, vectors = torch.linalg.eigh(matrix_PP)
    order = values.abs().argsort(descending=True)[:6]
    return matrix_PP, values[order], vectors[:, order].T.contiguous()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dropped", range(5))
@pytest.mark.parametrize("seed", range(3))
def test_each_pair_left_out_is_missed(name: str, dropped: int, seed: int):
    """A copy of a larger cluster too: what is left of it is still beside the set."""
    matrix_PP, values_K, vectors_KP = solved(name)
    kept = [i for i in range(6) if i != dropped]
    last = float(values_K[5].abs())
    if float(values_K[dropped].abs()) <= last * (1 + 2 * RTOL):
        pytest.skip("as large as the last pair: the set is complete without it")

    found = look(matrix_PP, vectors_KP[kept], last, seed)

    lowest = float(torch.linalg.eigvalsh(matrix_PP)[0]) - RTOL * last
    (value,) = found.missed(limit=last * (1 + RTOL), lowest=lowest)
    assert math.copysign(1, value) == math.copysign(1, float(values_K[dropped]))
    assert abs(value) <= float(values_K[dropped].abs()) * (1 + 1e-9)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("seed", range(5))
def test_of_a_complete_set_nothing_is_missed(name: str, seed: int):
    matrix_PP, values_K, vectors_KP = solved(name)
    last = float(values_K[5].abs())

    found = look(matrix_PP, vectors_KP, last, seed)

    assert found.decided
    assert found.missed(limit=last * (1 + RTOL), lowest=-last * (1 + RTOL)) == []


@pytest.mark.parametrize("name", ["outliers", "indefinite", "a bulk up to the set"])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_said_to_be_excluded_is(name: str, seed: int):
    matrix_PP, values_K, vectors_KP = solved(name)

    found = look(matrix_PP, vectors_KP, float(values_K[5].abs()), seed)

    rest = np.sort(np.abs(SPECTRA[name]))[-7]
    assert not found.exhausted
    assert rest <= found.excluded
    width = (math.log(1.648 * math.sqrt(120) / CHANCE) / (2 * found.products - 1)) ** 2
    assert found.excluded - max(found.largest, -found.smallest) >= width * (
        found.largest - found.smallest
    )


@pytest.mark.parametrize("name", ["null space", "a degenerate rest"])
def test_a_degenerate_rest_is_known_after_a_few_products(name: str):
    matrix_PP, values_K, vectors_KP = solved(name)

    found = look(matrix_PP, vectors_KP, float(values_K[5].abs()))

    assert found.exhausted
    assert found.products <= 4
    assert found.excluded == pytest.approx(float(np.abs(SPECTRA[name]).min()), abs=1e-9)


def test_a_smallest_eigenvalue_lower_than_said_shows():
    matrix_PP = oracles.planted([5, 4, 3, -0.9, -0.5, *oracles.bulk(55, 0, 0.4)])
    values, vectors = torch.linalg.eigh(matrix_PP)
    leading = vectors[:, -3:].T.contiguous()

    found = probe(
        lambda v_P: matrix_PP @ v_P, leading, limit=3.0, lowest=-0.5 - 1e-6, products=12,
        negligible=1e-9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    assert found.missed(limit=3.0, lowest=-0.5 - 1e-6) == [found.smallest]
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-3)


def test_the_first_image_is_that_of_the_start():
    matrix_PP, values_K, vectors_KP = solved("outliers")

    found = look(matrix_PP, vectors_KP, float(values_K[5]))

    torch.testing.assert_close(found.image_P, matrix_PP @ found.start_P)
    assert float((vectors_KP @ found.start_P).abs().max()) < 1e-14
    assert float(found.start_P.norm()) == pytest.approx(1)
