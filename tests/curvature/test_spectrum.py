"""The spectrum at a point: against dense Hessians, an independent solve, and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.eigen import EigenPairs, leading_eigenpairs
from spectra.curvature.equal_units import Classes, Quotient, quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import AutodiffHessian, Hessian
from spectra.curvature.spectrum import Merged, Spectrum, spectrum
from spectra.errors import NonFiniteError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum

WIDTHS = (6, 5, 3)
PAPER = (784, 128, 128, 10)
solvers = pytest.mark.parametrize("solver", ["lanczos", "eigsh"])


def chunks(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def by_autodiff(mlp: Mlp, theta_P: Tensor, x: Tensor, y: Tensor, size: int) -> AutodiffHessian:
    return AutodiffHessian(
        lambda theta, a, b: cross_entropy_sum(mlp.logits(theta, a), b), theta_P, chunks(x, y, size)
    )


def by_hand(mlp: Mlp, theta_P: Tensor, x: Tensor, y: Tensor, size: int) -> MlpHessian:
    return MlpHessian(mlp, theta_P, x, y, chunk=size, threads=2)


def learnt(
    widths: tuple[int, ...], x: Tensor, y: Tensor, *, steps: int, c: float, batch: int
) -> Tensor:
    """θ after some Adam steps on the oracle's own loss."""
    draw = torch.Generator().manual_seed(11)
    dim = sum((a + 1) * b for a, b in pairwise(widths))
    theta_P = 0.1 * torch.randn(dim, generator=draw, dtype=x.dtype)
    theta_P.requires_grad_()
    optimizer = torch.optim.Adam([theta_P], lr=0.01)
    for _ in range(steps):
        pick = torch.randint(0, len(y), (batch,), generator=draw)
        optimizer.zero_grad()
        oracles.mean_loss(widths, "sigmoid", x[pick], y[pick], c=c)(theta_P).backward()
        optimizer.step()
    return theta_P.detach()


@pytest.fixture(scope="module")
def small() -> tuple[Tensor, Tensor, Tensor]:
    """A trained 6-5-3 network and its 40 examples."""
    draw = torch.Generator().manual_seed(12)
    y = torch.randint(0, 3, (40,), generator=draw)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    x[:, :3] += torch.eye(3, dtype=torch.float64)[y]
    return learnt(WIDTHS, x, y, steps=300, c=0.001, batch=40), x, y


def solve_small(small: tuple[Tensor, Tensor, Tensor], **changes: object) -> Spectrum:
    theta_P, x, y = small
    arguments = {
        "penalty": L2Penalty(0.001),
        "k": 12,
        "rtol": 1e-8,
        "max_products": 2000,
        "solver": "lanczos",
        "generator": torch.Generator().manual_seed(13),
        **changes,
    }
    return spectrum(by_autodiff(Mlp(WIDTHS), theta_P, x, y, 17), theta_P, **arguments)


@solvers
def test_pairs_equal_those_of_the_dense_hessian(small: tuple[Tensor, Tensor, Tensor], solver: str):
    """Twelve of 53 by magnitude, negatives among them, and the smallest of all."""
    theta_P, x, y = small
    H_PP = oracles.dense_hessian(oracles.mean_loss(WIDTHS, "sigmoid", x, y), theta_P)
    values_P = torch.linalg.eigvalsh(H_PP).numpy()
    expected_K = values_P[np.argsort(-np.abs(values_P))][:12]

    pairs = solve_small(small, solver=solver).pairs

    assert values_P[0] < 0
    np.testing.assert_allclose(pairs.values_K, expected_K, rtol=1e-9)
    assert pairs.converged_K.all()
    assert pairs.smallest.value == pytest.approx(values_P[0], abs=1e-8 * expected_K[0])
    assert pairs.smallest.converged


@pytest.mark.parametrize("referenced", [False, True])
@pytest.mark.parametrize(("convention", "c"), [("full", 0.3), ("half", 0.15)])
def test_losses_gradients_and_shift(
    small: tuple[Tensor, Tensor, Tensor], convention: str, c: float, referenced: bool
):
    """Of both losses, by autograd; H_eff's eigenvalues are those reported plus the shift."""
    theta_P, x, y = small
    reference_P = theta_P.flip(0) if referenced else None
    plain = oracles.mean_loss(WIDTHS, "sigmoid", x, y)
    objective = oracles.mean_loss(
        WIDTHS, "sigmoid", x, y, c=c, reference_P=0.0 if reference_P is None else reference_P
    )

    at = solve_small(small, penalty=L2Penalty(0.3, convention, reference_P), k=3)

    assert at.loss == pytest.approx(float(plain(theta_P)), rel=1e-13)
    assert at.objective == pytest.approx(float(objective(theta_P)), rel=1e-13)
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(at.gradient_ce_P, oracles.gradient(plain, theta_P), **close)
    torch.testing.assert_close(at.gradient_P, oracles.gradient(objective, theta_P), **close)
    largest = float(torch.linalg.eigvalsh(oracles.dense_hessian(objective, theta_P))[-1])
    assert at.pairs.values_K[0] + at.shift == pytest.approx(largest, rel=1e-12)


@solvers
def test_products_are_told_one_by_one(small: tuple[Tensor, Tensor, Tensor], solver: str):
    told: list[int] = []

    pairs = solve_small(small, solver=solver, on_product=told.append).pairs

    assert told == list(range(1, pairs.products + 1))


@solvers
@pytest.mark.parametrize("k", [0, 53])
def test_k_out_of_range_is_refused(small: tuple[Tensor, Tensor, Tensor], solver: str, k: int):
    with pytest.raises(ValueError, match=r"1\.\.52"):
        solve_small(small, solver=solver, k=k)


def test_weights_that_are_not_finite_are_refused(small: tuple[Tensor, Tensor, Tensor]):
    theta_P, x, y = small
    with pytest.raises(NonFiniteError):
        solve_small((theta_P / 0, x, y))


@solvers
@pytest.mark.parametrize("operator", [by_autodiff, by_hand])
def test_float32_agrees_with_an_independent_float64_solve(
    digits: tuple[Tensor, Tensor], solver: str, operator: Callable[..., Hessian]
):
    """784-16-10 trained on 2,500 digits: ten pairs to 1e-3 of what forward mode and SciPy give."""
    x, y = digits
    widths = (784, 16, 10)
    theta_P = learnt(widths, x.float(), y, steps=400, c=1e-4, batch=64)
    loss = oracles.mean_loss(widths, "sigmoid", x, y)
    product = oracles.forward_over_reverse(loss, theta_P.double())
    expected_K = oracles.leading_values(product, len(theta_P), 10)

    at = spectrum(
        operator(Mlp(widths), theta_P, x.float(), y, 1000), theta_P, penalty=L2Penalty(1e-4), k=10,
        rtol=1e-3, max_products=2000, solver=solver, generator=torch.Generator().manual_seed(14),
    )  # fmt: skip

    assert at.loss == pytest.approx(float(loss(theta_P.double())), rel=1e-5)
    assert at.loss < 1
    assert at.pairs.converged_K.all()
    np.testing.assert_allclose(at.pairs.values_K, expected_K, rtol=1e-3)
    V_KP = torch.from_numpy(at.pairs.vectors_KP).double()
    for v_P, value in zip(V_KP, at.pairs.values_K, strict=True):
        assert float((product(v_P) - value * v_P).norm()) <= 1.1e-3 * abs(value)


def repeated(small: tuple[Tensor, Tensor, Tensor], **changes: object) -> Spectrum:
    """That of the small network with its five units repeated, fourteen in all."""
    theta_p, x, y = small
    widths, theta_P, _ = oracles.repeated(WIDTHS, theta_p, [(1, 2, 3, 4, 4)])
    classes = quotient(Mlp(widths), theta_P)
    arguments = {
        "penalty": L2Penalty(0.001), "k": 20, "rtol": 1e-8, "max_products": 2000,
        "solver": "lanczos", "generator": torch.Generator().manual_seed(13),
        "merged": Merged(classes, by_hand(classes.mlp, classes.merge(theta_P), x, y, 17)),
        **changes,
    }  # fmt: skip
    return spectrum(by_autodiff(Mlp(widths), theta_P, x, y, 17), theta_P, **arguments)


def test_merging_equal_units_changes_no_value(small: tuple[Tensor, Tensor, Tensor]):
    """Of twenty pairs, copies among them, with products that are told of as they are taken."""
    told: list[int] = []

    with_, without = repeated(small, on_product=told.append), repeated(small, merged=None)

    assert (with_.units, without.units) == ((5,), ())
    np.testing.assert_allclose(with_.pairs.values_K, without.pairs.values_K, rtol=1e-9)
    assert np.diff(with_.pairs.values_K).min() < 0
    assert (np.abs(np.diff(with_.pairs.values_K)) < 1e-12).sum() >= 3
    assert with_.pairs.converged_K.all()
    for end in ("smallest", "largest"):
        found, expected = (getattr(at.pairs, end).value for at in (with_, without))
        assert found == pytest.approx(expected, abs=1e-9)
    assert np.all(np.diff(told) > 0)
    assert told[-1] == with_.pairs.products
    assert (with_.loss, with_.objective) == (without.loss, without.objective)
    assert torch.equal(with_.gradient_P, without.gradient_P)


def test_what_the_merged_network_cannot_give_the_whole_one_does(
    small: tuple[Tensor, Tensor, Tensor],
):
    """Where classes are wrong, where merging did not pay, and by the other solver."""
    plain = repeated(small, merged=None)
    theta_p, x, y = small
    widths, theta_P, _ = oracles.repeated(WIDTHS, theta_p, [(1, 2, 3, 4, 4)])
    right = quotient(Mlp(widths), theta_P)
    of_unit_H = right.layers[1].of_unit_H % 4
    wrong = Classes(of_unit_H, torch.bincount(of_unit_H).double())
    classes = Quotient(right.whole, [right.layers[0], wrong, right.layers[2]])
    merged = Merged(classes, by_hand(classes.mlp, classes.merge(theta_P), x, y, 17))

    noticed = repeated(small, merged=merged)
    untried = repeated(small, merged=Merged(right, None))

    np.testing.assert_allclose(noticed.pairs.values_K, plain.pairs.values_K, rtol=1e-9)
    assert noticed.pairs.converged_K.all()
    assert untried.units == (5,)
    assert untried.pairs.vectors_KP.tobytes() == plain.pairs.vectors_KP.tobytes()
    assert untried.pairs.products == plain.pairs.products


def trivial_phase(x: Tensor, y: Tensor, k: int, chunk: int) -> tuple[AutodiffHessian, EigenPairs]:
    """Hidden weights 0, final bias the logarithm of the class priors."""
    mlp = Mlp(PAPER)
    priors_C, _ = oracles.class_covariance(y)
    theta_P = torch.zeros(mlp.dim, dtype=x.dtype)
    theta_P[-10:] = torch.from_numpy(np.log(priors_C))
    hessian = AutodiffHessian(
        lambda theta, inputs, labels: cross_entropy_sum(mlp.logits(theta, inputs), labels),
        theta_P,
        chunks(x, y, chunk),
    )
    pairs = leading_eigenpairs(
        hessian, dim=mlp.dim, k=k, rtol=1e-3, max_products=500,
        generator=torch.Generator().manual_seed(15), dtype=x.dtype,
    )  # fmt: skip
    return hessian, pairs


def check_trivial_phase(x: Tensor, y: Tensor, chunk: int) -> tuple[float, np.ndarray]:
    """L_CE is the entropy of the priors; H_CE = 33·(diag p − ppᵀ) on (W3, b3), and 0 elsewhere.

    All hidden units are σ(0) = 1/2, so the last layer sees the constant h = (½, ..., ½, 1) with
    |h|² = 128/4 + 1 = 33 and its block is (diag p − ppᵀ) ⊗ hhᵀ. Every other block has a factor
    W = 0 or Σ_n (p − y_n) = 0. So there are nine outliers, C − 1, and no tenth.
    """
    priors_C, covariance_CC = oracles.class_covariance(y)
    entropy = -float(np.sum(priors_C * np.log(priors_C)))
    outliers = 33 * np.linalg.eigvalsh(covariance_CC)[::-1][:9]

    hessian, pairs = trivial_phase(x, y, 12, chunk)

    assert hessian.loss == pytest.approx(entropy, rel=1e-6)
    assert float(hessian.gradient_P.norm()) < 1e-5
    np.testing.assert_allclose(pairs.values_K[:9], outliers, rtol=1e-5)
    assert np.abs(pairs.values_K[9:]).max() < 1e-5
    assert abs(pairs.smallest.value) < 1e-5
    assert pairs.converged_K.all()
    return entropy, outliers


def test_the_trivial_phase_in_closed_form(digits: tuple[Tensor, Tensor]):
    """On 500 digits, with their own priors."""
    check_trivial_phase(digits[0][:500].float(), digits[1][:500], chunk=300)


@pytest.mark.slow
def test_the_trivial_phase_of_mnist(mnist: tuple[Tensor, Tensor]):
    """2.30116 nats, and the nine outliers that solutions at strength 0.045 were seen to have.

    There the penalty pulls the scores z towards 0. The cheapest (W3, b3) for z costs |z|²/33, so
    z is the minimum of L_CE(z) + (0.045/33)|z|², and the outliers are those of its softmax.
    """
    x, y = mnist
    entropy, _ = check_trivial_phase(x.float(), y, chunk=10_000)
    assert entropy == pytest.approx(2.30116, abs=1e-5)

    priors_C, _ = oracles.class_covariance(y)
    z_C, identity_CC = np.log(priors_C), np.eye(10)
    for _ in range(30):
        p_C = np.exp(z_C) / np.exp(z_C).sum()
        covariance_CC = np.diag(p_C) - np.outer(p_C, p_C)
        slope_C = p_C - priors_C + 0.09 / 33 * z_C
        z_C = z_C - np.linalg.solve(covariance_CC + 0.09 / 33 * identity_CC, slope_C)
    outliers = 33 * np.linalg.eigvalsh(covariance_CC)[::-1][:9]
    observed = [3.653, 3.422, 3.350, 3.276, 3.267, 3.258, 3.233, 3.218, 3.018]
    np.testing.assert_allclose(outliers, observed, atol=1.1e-3)
