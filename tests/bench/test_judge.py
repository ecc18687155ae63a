"""What the judge of eigenpairs finds wrong, by a matrix whose spectrum is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import verify

SPECTRUM = np.array([4.0, 3.0, 3.0, -2.5, 1.0, 0.9, *np.linspace(0.1, -0.1, 34)])
WANTED = SPECTRUM[:5]


@pytest.fixture
def planted() -> tuple[Tensor, Tensor]:
    """A symmetric matrix of known spectrum, λ = 3 twice, and its eigenvectors as rows."""
    generator = torch.Generator().manual_seed(3)
    random_PP = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    q_PP = torch.linalg.qr(random_PP)[0]
    return q_PP @ torch.diag(torch.from_numpy(SPECTRUM)) @ q_PP.t(), q_PP.t()


def judged(
    planted: tuple[Tensor, Tensor],
    vectors_KP: Tensor,
    values_K: verify.Floats = WANTED,
    *,
    stopped: bool = False,
) -> verify.Certificate:
    H_PP, _ = planted
    images_KP = verify.images(lambda v: H_PP @ v, vectors_KP)
    return verify.certify(
        values_K, vectors_KP, images_KP, wanted_K=WANTED, rtol=1e-3, stopped=stopped
    )


def test_right_pairs_are_right(planted: tuple[Tensor, Tensor]):
    certificate = judged(planted, planted[1][:5])

    assert certificate.right
    assert (certificate.within, certificate.distinct) == (5, 5)
    assert certificate.worst_residual < 1e-12


def test_length_and_sign_of_a_vector_do_not_matter(planted: tuple[Tensor, Tensor]):
    assert judged(planted, -7 * planted[1][:5]).right


def test_a_repeated_pair_is_found_although_its_residual_is_perfect(
    planted: tuple[Tensor, Tensor],
):
    certificate = judged(planted, planted[1][[0, 1, 1, 3, 4]])

    assert certificate.within == 5
    assert certificate.distinct == 4
    assert certificate.verdict == "wrong: 1 of 5 repeat another"


def test_a_wrong_vector_is_found_although_its_value_is_right(planted: tuple[Tensor, Tensor]):
    vectors_KP = planted[1][:5].clone()
    vectors_KP[3] += 0.01 * planted[1][20]

    certificate = judged(planted, vectors_KP)

    assert certificate.verdict == "wrong: 1 residuals above 0.001"
    assert certificate.worst_residual == pytest.approx(0.01, rel=0.1)


def test_a_wrong_value_is_found_although_its_vector_is_right(planted: tuple[Tensor, Tensor]):
    values_K = WANTED * np.array([1, 1, 1, 1.01, 1])

    certificate = judged(planted, planted[1][:5], values_K)

    assert not certificate.right
    assert certificate.value_error == pytest.approx(0.01)


def test_a_missed_copy_of_a_repeated_eigenvalue_is_found(planted: tuple[Tensor, Tensor]):
    """Five perfect, different pairs that are not the five leading ones."""
    chosen = [0, 1, 3, 4, 5]

    certificate = judged(planted, planted[1][chosen], SPECTRUM[chosen])

    assert (certificate.within, certificate.distinct) == (5, 5)
    assert certificate.verdict.startswith("incomplete: a leading pair was missed, 3 ")


def test_one_that_was_stopped_says_how_far_it_came(planted: tuple[Tensor, Tensor]):
    some = judged(planted, planted[1][:2], WANTED[:2], stopped=True)
    none = judged(planted, planted[1][:0], WANTED[:0], stopped=True)

    assert some.verdict == "stopped: 2 of 5 pairs"
    assert none.verdict.startswith("stopped")
    assert judged(planted, planted[1][:2], WANTED[:2]).verdict == "wrong: 3 missing"


def test_the_reference_is_what_all_found_together(planted: tuple[Tensor, Tensor]):
    """One missed λ = 4, another a copy of λ = 3, a third brought rough copies and noise."""
    H_PP, vectors_PP = planted
    noise_KP = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [
        vectors_PP[[1, 2, 3]],
        vectors_PP[[0, 1, 3, 4]],
        vectors_PP[[0, 4]] + 0.01 * vectors_PP[[7, 8]],
        noise_KP,
    ]

    found = verify.reference([(part, part @ H_PP) for part in parts], 5)

    np.testing.assert_allclose(found, WANTED, rtol=1e-10)
