"""Polishing networks: the identities of a stationary point, with and without merged units."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracles
from spectra.curvature.eigen import leading_eigenpairs
from spectra.curvature.mlp_operator import MlpHessian
from spectra.descent import Optimisation
from spectra.inputs import inputs_of
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.polish.network import Labelled
from spectra.polish.newton import Polished, State
from spectra.polish.symmetric import polish_network
from spectra.train import Examples, train

MLP = Mlp((784, 12, 8, 10))
PENALTY = L2Penalty(0.01)


def polished(data: Labelled, theta_P: Tensor, mlp: Mlp = MLP, **how: object) -> Polished:
    given: dict[str, object] = {
        "max_products": 4000, "generator": torch.Generator().manual_seed(1),
        "penalty": PENALTY,
    }  # fmt: skip
    return polish_network(mlp, theta_P, data=data, **(given | how))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> tuple[Labelled, Tensor]:
    """A small network trained on the shipped digits, and 600 of them."""
    inputs_ND, labels_N = digits[0][:600].float(), digits[1][:600]
    found = train(
        MLP, MLP.initial(torch.Generator().manual_seed(2), torch.float32),
        data=Examples(inputs_ND, labels_N), test=Examples(inputs_ND[:50], labels_N[:50]),
        penalty=PENALTY, how=Optimisation(max_epochs=60, lr=5e-3),
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    return Labelled(inputs_of(inputs_ND), labels_N, 1, inputs_ND), found.theta_P


def objective(data: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    return oracles.mean_loss(MLP.widths, "sigmoid", data[0][:600].float().double(), data[1][:600])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("merge", [True, False])
def test_a_polished_network_satisfies_the_identities(
    trained: tuple[Labelled, Tensor], digits: tuple[Tensor, Tensor], dtype: torch.dtype, merge: bool
):
    data, theta_P = trained

    found = polished(data, theta_P.to(dtype), merge=merge)

    assert found.verdict == "floor"
    assert found.minimum
    star_P = found.x_P.double()
    assert float(star_P.norm()) > 1  # learnt
    gradient_P = oracles.gradient(objective(digits), star_P)
    rest = float((gradient_P + 0.02 * star_P).norm())
    assert rest < (2e-6 if dtype == torch.float32 else 1e-12)
    assert found.gradient_norm == pytest.approx(rest, rel=1e-3, abs=1e-14)
    cosine = torch.nn.functional.cosine_similarity(gradient_P, star_P, dim=0)
    assert float(cosine) == pytest.approx(-1, abs=1e-9)
    last = MLP.split(star_P)
    assert float(last["fc3.weight"].sum(0).abs().max()) < 1e-4 * float(last["fc3.weight"].norm())
    assert abs(float(last["fc3.bias"].sum())) < 1e-4
    before = float(objective(digits)(theta_P.double())) + 0.01 * float(
        theta_P.double().square().sum()
    )
    assert found.objective < before


def test_from_every_step_a_later_call_ends_with_the_same_bytes(
    trained: tuple[Labelled, Tensor],
):
    """From those of the quotient, which are shorter, as from those of the whole."""
    data, _ = trained
    small, theta_p, _ = oracles.repeated(
        (784, 2, 2, 10),
        Mlp((784, 2, 2, 10)).initial(torch.Generator().manual_seed(4), torch.float32),
        [(4, 4), (4, 4)],
    )
    mlp, states = Mlp(small), list[State]()
    whole = polished(data, theta_p, mlp, on_step=states.append)
    assert whole.verdict == "floor"
    assert len({state.x_P.numel() for state in states}) == 2

    for state in states[:: max(1, len(states) // 4)]:
        again = polished(data, theta_p, mlp, state=state)
        assert torch.equal(again.x_P, whole.x_P)
        assert (again.products, again.verdict) == (whole.products, whole.verdict)


def test_a_budget_that_ends_in_the_quotient_gives_a_point_of_the_whole(
    trained: tuple[Labelled, Tensor],
):
    data, _ = trained
    small, theta_p, _ = oracles.repeated(
        (784, 2, 2, 10),
        Mlp((784, 2, 2, 10)).initial(torch.Generator().manual_seed(4), torch.float32),
        [(4, 4), (4, 4)],
    )

    found = polished(data, theta_p, Mlp(small), max_products=20)

    assert found.verdict == "budget"
    assert found.x_P.shape == found.gradient_ce_P.shape == theta_p.shape


# ------------------------------------------------------------------------- the full MNIST


def on_mnist(mnist: tuple[Tensor, Tensor], strengths: tuple[float, ...], **how: object) -> Polished:
    """A network of the published experiment, trained upward and polished at the last strength."""
    mlp = Mlp((784, 128, 128, 10))
    inputs_ND, labels_N = mnist[0].float(), mnist[1]
    data = Examples(inputs_ND, labels_N)
    theta_P = mlp.initial(torch.Generator().manual_seed(1), torch.float32)
    for l2 in strengths:
        theta_P = train(
            mlp, theta_P, data=data, test=Examples(inputs_ND[:100], labels_N[:100]),
            penalty=L2Penalty(l2), how=Optimisation(max_epochs=4),
            generator=torch.Generator().manual_seed(2),
        ).theta_P  # fmt: skip
    labelled = Labelled(data.inputs, labels_N, 2, inputs_ND)
    return polished(labelled, theta_P, mlp, penalty=L2Penalty(strengths[-1]), **how)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_trivial_phase_has_its_closed_forms(mnist: tuple[Tensor, Tensor]):
    """λ = 0.045: the class priors, and the outliers 33·eig(diag p − ppᵀ)."""
    mlp = Mlp((784, 128, 128, 10))
    found = on_mnist(mnist, (0.045,))
    counts_C = torch.bincount(mnist[1]).double()
    p_C = counts_C / counts_C.sum()

    assert found.minimum
    assert found.loss == pytest.approx(float(-(p_C * p_C.log()).sum()), abs=1e-4)
    assert found.loss == pytest.approx(2.30116, abs=5e-6)
    scores_NC = mlp.logits(found.x_P, mnist[0][:2000].float())
    assert bool((scores_NC.argmax(1) == 1).all())
    hessian = MlpHessian(mlp, found.x_P, mnist[0].float(), mnist[1], threads=2)
    pairs = leading_eigenpairs(
        hessian, dim=mlp.dim, k=10, rtol=1e-3, max_products=500,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    expected_K = [3.653, 3.422, 3.350, 3.276, 3.267, 3.258, 3.233, 3.218, 3.018, 0.0023]
    assert pairs.values_K.tolist() == pytest.approx(expected_K, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_learnt_phase_is_stationary_and_a_minimum(mnist: tuple[Tensor, Tensor]):
    """λ = 0.04, upward from λ = 0: much of the norm is gone, some of the digits is left."""
    mlp = Mlp((784, 128, 128, 10))
    found = on_mnist(mnist, (0.0, 0.02, 0.04), max_products=1000)

    star_P, seen_ND = found.x_P.double(), mnist[0].float().double()
    counts_C = torch.bincount(mnist[1]).double()
    p_C = counts_C / counts_C.sum()
    right = oracles.logits(mlp.widths, "sigmoid", star_P, seen_ND).argmax(1) == mnist[1]
    assert float(right.double().mean()) > 0.2, "the class priors alone have 0.112"
    assert found.loss < float(-(p_C * p_C.log()).sum()) - 0.2
    assert float(star_P.norm()) == pytest.approx(2.6, abs=0.2)

    loss = oracles.mean_loss(mlp.widths, "sigmoid", seen_ND, mnist[1])
    gradient_P = oracles.gradient(loss, star_P)
    assert found.verdict == "floor"
    assert float((gradient_P + 0.08 * star_P).norm()) < 5e-7
    cosine = torch.nn.functional.cosine_similarity(gradient_P, star_P, dim=0)
    assert float(cosine) == pytest.approx(-1, abs=1e-9)

    assert found.minimum
    assert found.lowest is not None
    lowest_P = found.lowest.direction_P
    curvature = float(lowest_P @ oracles.forward_over_reverse(loss, star_P)(lowest_P)) + 0.08
    assert curvature == pytest.approx(found.lowest.value, abs=1e-5)
    assert 0 < curvature < 0.08
    assert found.lowest.residual < 0.1 * curvature
