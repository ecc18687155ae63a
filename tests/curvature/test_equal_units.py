"""Equal units against networks written out: what was repeated is found, and merged again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import oracles
from oracles import REPEATED, Case
from spectra.activations import ACTIVATIONS
from spectra.curvature.equal_units import quotient
from spectra.mlp import Mlp

CLOSE = {"rtol": 1e-11, "atol": 1e-13}


cases = pytest.mark.parametrize("case", REPEATED.values(), ids=REPEATED)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@dataclass(frozen=True)
class Repeated:
    """A small network, the whole one that repeats its units, and data."""

    small: tuple[int, ...]
    whole: tuple[int, ...]
    theta_P: Tensor
    origins: list[Tensor]
    x: Tensor
    y: Tensor


def plant(case: Case) -> Repeated:
    draw = torch.Generator().manual_seed(31)
    theta_p = torch.randn(Mlp(case.widths).dim, generator=draw, dtype=torch.float64)
    x = torch.randn(11, case.widths[0], generator=draw, dtype=torch.float64)
    y = torch.randint(0, case.widths[-1], (11,), generator=draw)
    whole, theta_P, origins = oracles.repeated(case.widths, theta_p, case.copies)
    return Repeated(case.widths, whole, theta_P, origins, x, y)


def firsts(origin_H: Tensor) -> list[int]:
    """The units that were repeated, in the order in which their copies first appear."""
    return list(dict.fromkeys(origin_H.tolist()))


def losses(planted: Repeated, activation: str) -> list[Callable[[Tensor], Tensor]]:
    """Of the whole network and of the small one."""
    return [
        oracles.mean_loss(widths, activation, planted.x, planted.y)
        for widths in (planted.whole, planted.small)
    ]


@cases
def test_the_units_that_were_repeated_are_found(case: Case):
    """Which are equal, and how many of each."""
    planted = plant(case)

    found = quotient(Mlp(planted.whole), planted.theta_P)

    assert found.mlp == Mlp(case.widths)
    assert found.layers[0].of_unit_H.tolist() == list(range(case.widths[0]))
    assert found.layers[-1].counts_G.tolist() == [1] * case.widths[-1]
    for classes, origin_H, counts in zip(
        found.layers[1:-1], planted.origins, case.copies, strict=True
    ):
        order = firsts(origin_H)
        assert [order[g] for g in classes.of_unit_H.tolist()] == origin_H.tolist()
        assert classes.counts_G.tolist() == [counts[unit] for unit in order]


@cases
@activations
def test_the_quotient_computes_the_same(case: Case, activation: str):
    """Loss and gradient; the whole gradient is symmetric and is the lift of the scaled one."""
    planted = plant(case)
    found = quotient(Mlp(planted.whole, activation), planted.theta_P)
    merged_p = found.merge(planted.theta_P)
    whole, small = losses(planted, activation)

    gradient_P = oracles.gradient(whole, planted.theta_P)
    lifted_P = found.lift(found.scale_p * oracles.gradient(small, merged_p))

    assert float(small(merged_p)) == pytest.approx(float(whole(planted.theta_P)), rel=1e-13)
    assert gradient_P.norm() > 0.1
    torch.testing.assert_close(lifted_P, gradient_P, **CLOSE)
    torch.testing.assert_close(found.lift(merged_p / found.scale_p), planted.theta_P, **CLOSE)


@cases
@activations
def test_lifting_keeps_lengths_and_commutes_with_the_hessian(case: Case, activation: str):
    planted = plant(case)
    found = quotient(Mlp(planted.whole, activation), planted.theta_P)
    whole, small = losses(planted, activation)
    H_PP = oracles.dense_hessian(whole, planted.theta_P)
    h_pp = oracles.dense_hessian(small, found.merge(planted.theta_P))

    identity_pp = torch.eye(found.mlp.dim, dtype=torch.float64)
    lift_pP = torch.stack([found.lift(z_p) for z_p in identity_pp])

    torch.testing.assert_close(lift_pP @ lift_pP.T, identity_pp, **CLOSE)
    scaled_pp = found.scale_p[:, None] * h_pp * found.scale_p
    torch.testing.assert_close(lift_pP @ H_PP, scaled_pp @ lift_pP, **CLOSE)


# ------------------------------------------------------------------------- what counts as equal


def grouped(units_HF: Sequence[Sequence[float]], *, within: float = 0.0) -> list[int]:
    """Classes of a 1-H-2 network's units, each given by (weight, bias, two weights leaving)."""
    units = torch.tensor(units_HF, dtype=torch.float64)
    theta_P = torch.cat([units[:, 0], units[:, 1], units[:, 2:].T.reshape(-1), torch.zeros(2)])
    found = quotient(Mlp((1, len(units), 2)), theta_P.to(units), within)
    return found.layers[1].of_unit_H.tolist()


@pytest.mark.parametrize("entry", range(4))
def test_units_are_equal_when_all_their_weights_are(entry: int):
    """One that differs keeps them apart, what leaves the unit as much as what enters it."""
    unit = [0.3, -0.2, 0.5, 0.1]
    other = [value + 1e-9 * (i == entry) for i, value in enumerate(unit)]

    assert grouped([unit, other, unit]) == [0, 1, 0]
    assert grouped([unit, other, unit], within=2e-9) == [0, 0, 0]


def test_units_that_do_the_same_with_other_weights_leaving_stay_apart():
    """Twice the activation, half the weight: the function has one unit, the network two."""
    assert grouped([[0.3, -0.2, 0.5, 0.1], [0.3, -0.2, 0.25, 0.05]]) == [0, 1]


def test_the_distance_is_relative_to_large_weights_and_absolute_below_one():
    large, small = [30.0, 40.0, 0.0, 0.0], [3e-6, 4e-6, 0.0, 0.0]
    for unit, distance in ((large, 50), (small, 1)):
        shifted = {s: [unit[0], unit[1], s * distance, 0.0] for s in (0.9e-3, 1.1e-3)}
        assert grouped([unit, shifted[0.9e-3]], within=1e-3) == [0, 0]
        assert grouped([unit, shifted[1.1e-3]], within=1e-3) == [0, 1]
        # A large unit beside them grants the others nothing.
        assert grouped([[90.0] * 4, unit, shifted[1.1e-3]], within=1e-3) == [0, 1, 2]


def test_a_chain_of_neighbours_is_not_one_class():
    """Each class lies around its first unit, so no two of its units are two distances apart."""
    chain = [[0.6e-3 * i, 0.0, 0.0, 0.0] for i in range(5)]

    assert grouped(chain, within=1e-3) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_off_makes_no_difference(dtype: torch.dtype):
    """Four eps on every weight; sixty-four are more than round-off."""
    planted = plant(REPEATED["two layers"])
    theta_P = planted.theta_P.to(dtype)
    draw = torch.Generator().manual_seed(32)
    signs_P = torch.randint(0, 2, theta_P.shape, generator=draw).mul(2).sub(1).to(dtype)
    eps = torch.finfo(dtype).eps

    def widths(multiple: int) -> tuple[int, ...]:
        return quotient(Mlp(planted.whole), theta_P * (1 + multiple * eps * signs_P)).mlp.widths

    assert widths(0) == widths(4) == planted.small
    assert sum(widths(64)) > sum(planted.small)


def test_a_network_without_equal_units_is_its_own_quotient():
    planted = plant(Case((4, 3, 2, 3), [(1, 1, 1), (1, 1)]))

    found = quotient(Mlp(planted.whole), planted.theta_P)

    assert found.mlp.widths == planted.whole
    assert torch.equal(found.merge(planted.theta_P), planted.theta_P)
    assert torch.equal(found.lift(planted.theta_P), planted.theta_P)
    assert torch.equal(found.scale_p, torch.ones_like(planted.theta_P))


def test_a_network_without_hidden_layers_has_nothing_to_merge():
    theta_P = torch.arange(15.0, dtype=torch.float64)

    found = quotient(Mlp((4, 3)), theta_P)

    assert found.mlp.widths == (4, 3)
    assert torch.equal(found.merge(theta_P), theta_P)
