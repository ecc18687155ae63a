"""The reduction by equal units against the dense Hessian of the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from oracles import REPEATED, Case
from spectra.activations import ACTIVATIONS
from spectra.curvature.differences import Differences
from spectra.curvature.eigen import EigenPairs, leading_eigenpairs
from spectra.curvature.equal_units import Classes, Quotient, quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import MatVec
from spectra.curvature.reduction import reduced_eigenpairs
from spectra.mlp import Mlp

BACKGROUND = -0.4242
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


CASES = REPEATED | {
    "many inputs": Case((12, 2, 3), [(2, 3)]),
    "one class in the middle": Case((3, 2, 1, 1, 3), [(1, 1), (5,), (1,)]),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@dataclass(frozen=True)
class Problem:
    """A network that may have equal units, its data, and its Hessian as a matrix."""

    mlp: Mlp
    theta_P: Tensor
    x: Tensor
    y: Tensor
    H_PP: Tensor

    @property
    def values(self) -> np.ndarray:
        """All eigenvalues, in the order of the pairs."""
        values_P = torch.linalg.eigvalsh(self.H_PP).numpy()
        return values_P[np.lexsort((-values_P, -np.abs(values_P)))]

    def hessian(self, found: Quotient, dtype: torch.dtype = torch.float64) -> MlpHessian:
        """That of the quotient network."""
        return MlpHessian(
            found.mlp, found.merge(self.theta_P.to(dtype)), self.x.to(dtype), self.y, chunk=4
        )

    def solve(self, k: int, found: Quotient | None = None, **changes: object) -> EigenPairs | None:
        """By the reduction, with the dense Hessian in the place of the whole network's."""
        arguments = {
            "rtol": 1e-8, "max_products": 500, "generator": torch.Generator().manual_seed(41),
            **changes,
        }  # fmt: skip
        found = found or quotient(self.mlp, self.theta_P)
        whole = lambda v_P: self.H_PP.to(v_P) @ v_P  # noqa: E731
        dtype = found.layers[0].counts_G.dtype
        return reduced_eigenpairs(whole, found, self.hessian(found, dtype), k=k, **arguments)


def problem(mlp: Mlp, theta_P: Tensor, *, sparse: bool = False) -> Problem:
    """With 11 examples; sparse ones are mostly background, one input wholly."""
    draw = torch.Generator().manual_seed(42)
    x = torch.randn(11, mlp.widths[0], generator=draw, dtype=torch.float64).abs()
    if sparse:
        x[torch.rand(x.shape, generator=draw) < 0.8] = BACKGROUND
        x[:, 2] = BACKGROUND
    y = torch.randint(0, mlp.widths[-1], (11,), generator=draw)
    loss = oracles.mean_loss(mlp.widths, mlp.activation, x, y)
    return Problem(mlp, theta_P, x, y, oracles.dense_hessian(loss, theta_P))


def plant(case: Case, activation: str = "sigmoid", **how: bool) -> Problem:
    draw = torch.Generator().manual_seed(49)  # with which ReLU units are not all dead
    theta_p = torch.randn(Mlp(case.widths).dim, generator=draw, dtype=torch.float64)
    whole, theta_P, _ = oracles.repeated(case.widths, theta_p, case.copies)
    return problem(Mlp(whole, activation), theta_P, **how)


def differences(planted: Problem) -> list[Differences]:
    """Of every layer that has equal units."""
    found = quotient(planted.mlp, planted.theta_P)
    hessian = planted.hessian(found)
    parts = [Differences(hessian, found, layer) for layer in range(found.mlp.layers - 1)]
    return [part for part in parts if part.dim]


def matrix(part: Differences) -> Tensor:
    return torch.stack([part(v_p) for v_p in torch.eye(part.dim, dtype=torch.float64)])


def check_pairs(pairs: EigenPairs | None, planted: Problem, k: int, *, eps: float = 2.0**-52):
    """Values of the dense Hessian, residuals that are true, orthonormal vectors, both ends.

    A difference of a ReLU network has −λ for every λ, so values are compared by magnitude; that
    a sign is right the residual says.
    """
    assert pairs is not None
    H_PP, values = planted.H_PP, planted.values
    V_KP = torch.from_numpy(pairs.vectors_KP).double()
    scale = abs(values[0])
    found_K, exact_K = np.abs(pairs.values_K), np.abs(values[:k])
    np.testing.assert_allclose(found_K, exact_K, rtol=0, atol=200 * eps * scale)
    torch.testing.assert_close(
        V_KP @ V_KP.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=200 * eps
    )
    true_K = (V_KP @ H_PP - torch.from_numpy(pairs.values_K)[:, None] * V_KP).norm(dim=1).numpy()
    assert pairs.converged_K.all()
    assert (true_K <= 2 * pairs.residuals_K + 50 * eps * scale).all()
    assert pairs.smallest.value == pytest.approx(values.min(), abs=200 * eps * scale)
    assert pairs.largest.value == pytest.approx(values.max(), abs=200 * eps * scale)


# ----------------------------------------------------------------------------- how it splits


@pytest.mark.parametrize("sparse", [False, True])
@cases
@activations
def test_differences_are_the_hessian_between_lifted_differences(
    case: Case, activation: str, sparse: bool
):
    """For every layer and pair of classes, by every copy, and nothing leads out of one."""
    planted = plant(case, activation, sparse=sparse)
    parts = differences(planted)

    assert parts
    for part in parts:
        D_pp, each = matrix(part), part.dim // len(part.counts)
        identity = torch.eye(each, dtype=torch.float64)
        torch.testing.assert_close(D_pp, D_pp.T, **CLOSE)
        for index, count in enumerate(part.counts):
            D_xx = D_pp.unflatten(0, (-1, each))[index].unflatten(1, (-1, each))
            assert D_xx[:, [g for g in range(len(part.counts)) if g != index]].abs().sum() == 0
            for copy in range(count - 1):
                L_xP = torch.stack([part.lift(e_x, index, copy) for e_x in identity])
                torch.testing.assert_close(L_xP @ planted.H_PP, D_xx[:, index] @ L_xP, **CLOSE)


@cases
def test_lifted_differences_are_orthonormal_to_each_other_and_to_what_is_symmetric(case: Case):
    """All of them together: the parts fill the space but for what is zero."""
    planted = plant(case)
    found = quotient(planted.mlp, planted.theta_P)
    rows = [found.lift(e_p) for e_p in torch.eye(found.mlp.dim, dtype=torch.float64)]
    for part in differences(planted):
        identity = torch.eye(part.dim // len(part.counts), dtype=torch.float64)
        rows += [
            part.lift(e_x, index, copy)
            for index, count in enumerate(part.counts)
            for copy in range(count - 1)
            for e_x in identity
        ]
    hidden = [(len(c.of_unit_H), len(c.counts_G)) for c in found.layers[1:-1]]
    zeros = sum((a - b) * (c - d) for (a, b), (c, d) in pairwise(hidden))

    assert len(rows) == planted.mlp.dim - zeros
    Q_RP = torch.stack(rows)
    torch.testing.assert_close(Q_RP @ Q_RP.T, torch.eye(len(rows), dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("sparse", [False, True])
@cases
@activations
def test_the_spectrum_is_that_of_the_parts(case: Case, activation: str, sparse: bool):
    """All of it: the quotient's, m − 1 times that of each class of m units, and zeros."""
    planted = plant(case, activation, sparse=sparse)
    found = quotient(planted.mlp, planted.theta_P)
    small = oracles.mean_loss(found.mlp.widths, activation, planted.x, planted.y)
    h_pp = oracles.dense_hessian(small, found.merge(planted.theta_P))
    parts = [torch.linalg.eigvalsh(found.scale_p[:, None] * h_pp * found.scale_p)]
    for part in differences(planted):
        D_pp, each = matrix(part), part.dim // len(part.counts)
        for index, count in enumerate(part.counts):
            block = slice(index * each, (index + 1) * each)
            parts += [torch.linalg.eigvalsh(D_pp[block, block])] * (count - 1)
    values = torch.cat(parts)
    values = torch.cat([values, values.new_zeros(planted.mlp.dim - len(values))]).sort().values

    exact = torch.linalg.eigvalsh(planted.H_PP)

    assert exact.abs().max() > 0.1
    torch.testing.assert_close(values, exact, rtol=1e-10, atol=1e-13 * float(exact.abs().max()))


# ------------------------------------------------------------------------------ leading pairs


@cases
@activations
def test_pairs_are_those_of_the_whole_hessian(case: Case, activation: str):
    """Up to where zeros begin; copies straddle most of the cuts, and parts are small and large."""
    planted = plant(case, activation)
    magnitudes = np.abs(planted.values)
    count = int((magnitudes > 1e-12 * magnitudes[0]).sum())
    assert count >= 8

    for k in {1, 3, 8, count // 2, count - 7, count}:
        check_pairs(planted.solve(k), planted, k)


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("name", ["two layers", "many inputs", "one class in the middle"])
def test_as_many_pairs_as_a_part_has_rows(name: str, more: int):
    """Where the search for all but one of a part's pairs becomes one for all of them."""
    planted = plant(CASES[name])
    for part in differences(planted):
        check_pairs(planted.solve(part.dim + more), planted, part.dim + more)


def mirrored(tilt: float) -> Problem:
    """A tanh network in which two classes are mirror images but for a tilt of their weights.

    A unit with all its weights negated does the same, so both have the same differences.
    """
    draw = torch.Generator().manual_seed(44)
    mlp = Mlp((4, 3, 3), "tanh")
    theta_p = torch.randn(mlp.dim, generator=draw, dtype=torch.float64)
    weight, bias, leaving, _ = mlp.split(theta_p).values()
    weight[1], bias[1], leaving[:, 1] = -weight[0] * (1 + tilt), -bias[0], -1.5 * leaving[:, 0]
    whole, theta_P, _ = oracles.repeated(mlp.widths, theta_p, [(2, 3, 1)])
    # A copy's share of what leaves a unit is by the number of copies: 1/2 and 1.5/3.
    return problem(Mlp(whole, "tanh"), theta_P)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-6, 1e-4])
def test_classes_with_close_eigenvalues_are_taken_apart(tilt: float, seed: int):
    """Eigenvectors of their common operator reach both, and the cut falls between copies."""
    planted, rtol = mirrored(tilt), 1e-4
    (part,) = differences(planted)
    assert sorted(part.counts) == [2, 3]
    values_P = planted.values
    (at, *_), gap = np.flatnonzero(np.abs(np.diff(values_P)) < 1e-3 * np.abs(values_P[:-1])), 3

    for k in range(1, at + 2 * gap):
        pairs = planted.solve(k, rtol=rtol, generator=torch.Generator().manual_seed(seed))

        assert pairs is not None
        assert pairs.converged_K.all()
        np.testing.assert_allclose(np.abs(pairs.values_K), np.abs(values_P[:k]), rtol=1.1 * rtol)
        V_KP = torch.from_numpy(pairs.vectors_KP)
        torch.testing.assert_close(V_KP @ V_KP.T, torch.eye(k, dtype=torch.float64), **CLOSE)
        rest_KP = V_KP @ planted.H_PP - torch.from_numpy(pairs.values_K)[:, None] * V_KP
        assert (rest_KP.norm(dim=1).numpy() <= 2 * rtol * np.abs(pairs.values_K)).all()


@cases
def test_single_precision(case: Case):
    """To its round-off, vectors in its type."""
    planted = plant(case)
    found = quotient(planted.mlp, planted.theta_P.float())
    assert found.mlp.widths == case.widths

    pairs = planted.solve(8, found, rtol=1e-3)

    assert pairs is not None
    assert pairs.vectors_KP.dtype == np.float32
    V_KP = torch.from_numpy(pairs.vectors_KP).double()
    torch.testing.assert_close(V_KP @ V_KP.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.abs(pairs.values_K), np.abs(planted.values[:8]), rtol=1e-4)
    rest_KP = V_KP @ planted.H_PP - torch.from_numpy(pairs.values_K)[:, None] * V_KP
    assert (rest_KP.norm(dim=1).numpy() <= 1e-3 * np.abs(pairs.values_K)).all()


def test_the_same_generator_gives_the_same_bytes():
    planted = plant(CASES["two layers"])

    first, second = (planted.solve(20, generator=torch.Generator().manual_seed(7)) for _ in "ab")

    assert first is not None
    assert second is not None
    assert first.vectors_KP.tobytes() == second.vectors_KP.tobytes()
    assert first.values_K.tobytes() == second.values_K.tobytes()
    assert first.residuals_K.tobytes() == second.residuals_K.tobytes()
    assert first.products == second.products


@pytest.mark.parametrize("k", [1, 20, 79])
def test_every_product_is_counted(k: int):
    """Of the parts and of the whole, which takes one or two."""
    sizes: list[int] = []

    def counted(product: MatVec) -> MatVec:
        def matvec(v: Tensor) -> Tensor:
            sizes.extend(v.shape[-1] for _ in v.reshape(-1, v.shape[-1]))
            return product(v)

        return matvec

    planted = plant(CASES["two layers"])
    pairs = planted.solve(k, counted=counted)

    assert pairs is not None
    assert pairs.products == len(sizes)
    assert 1 <= sizes.count(planted.mlp.dim) <= 2


# --------------------------------------------------------------------- where there is no result


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("k", [1, 10])
def test_units_that_are_not_equal_are_noticed(layer: int, k: int):
    """Classes that are believed although two of their units have nothing in common."""
    planted = plant(Case((4, 3, 3, 3), [(1, 1, 1), (1, 1, 1)]))
    found = quotient(planted.mlp, planted.theta_P)
    wrong = Classes(torch.tensor([0, 1, 0]), torch.tensor([2.0, 1.0], dtype=torch.float64))
    layers = [wrong if i == layer else classes for i, classes in enumerate(found.layers)]

    assert planted.solve(k, Quotient(planted.mlp, layers), rtol=1e-2) is None


def test_a_wrong_hessian_of_the_whole_is_noticed():
    """The last word is that of the whole network, whatever the parts say."""
    planted = plant(CASES["one layer"])
    other = plant(CASES["one layer"], "tanh")
    assert planted.solve(5, rtol=1e-3) is not None

    found = quotient(planted.mlp, planted.theta_P)
    assert reduced_eigenpairs(
        lambda v_P: other.H_PP @ v_P, found, planted.hessian(found), k=5, rtol=1e-3,
        max_products=500, generator=torch.Generator(),
    ) is None  # fmt: skip


def test_too_many_pairs_are_not_there():
    """Zeros between equal units of two layers are in no part, so these pairs are left to others."""
    for name in ("two layers", "three layers"):
        planted = plant(CASES[name])
        assert planted.solve(planted.mlp.dim - 1) is None


@pytest.mark.parametrize("name", ["one layer", "one class", "the second of two"])
def test_parts_that_fill_the_space_give_all_pairs(name: str):
    planted = plant(CASES[name])
    k = planted.mlp.dim - 1

    check_pairs(planted.solve(k), planted, k)


def test_a_budget_that_is_spent_gives_no_result():
    planted = plant(CASES["two layers"])

    assert planted.solve(20, max_products=20) is None


# ------------------------------------------------------------------- units that are nearly equal


def nearly(distance: float) -> tuple[Problem, Quotient]:
    """A network whose units were equal before each moved by a distance."""
    planted = plant(CASES["two layers"])
    draw = torch.Generator().manual_seed(45)
    moved_P = planted.theta_P.clone()
    for tensor in planted.mlp.split(moved_P).values():
        shift = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        tensor.add_(shift, alpha=distance / 9)
    found = quotient(planted.mlp, moved_P, within=2 * distance)
    assert found.mlp.widths == CASES["two layers"].widths
    return problem(planted.mlp, moved_P), found


def rms(residuals: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(residuals))))


@pytest.mark.parametrize("distance", [1e-6, 1e-4])
def test_residuals_tell_how_far_from_equal_the_units_were(distance: float):
    """The root of the sum of their squares, of the outliers and of the rest apart.

    It stands at every pair, for one may have it all. It is a draw of signs: right in the mean, and
    within a small factor each time.
    """
    planted, found = nearly(distance)
    ratios: list[list[float]] = []
    for seed in range(20):
        pairs = planted.solve(20, found, rtol=0.1, generator=torch.Generator().manual_seed(seed))
        assert pairs is not None
        V_KP = torch.from_numpy(pairs.vectors_KP)
        rest_KP = V_KP @ planted.H_PP - torch.from_numpy(pairs.values_K)[:, None] * V_KP
        true_K = rest_KP.norm(dim=1).numpy()
        outlying_K = np.abs(pairs.values_K) > 3 * abs(pairs.values_K[-1])
        assert 0 < outlying_K.sum() < 20
        groups = (outlying_K, ~outlying_K)
        ratios.append([rms(pairs.residuals_K[g]) / np.linalg.norm(true_K[g]) for g in groups])
        assert pairs.residuals_K.min() > 0.001 * distance

    assert np.min(ratios) > 0.25
    assert np.max(ratios) < 3
    np.testing.assert_allclose(np.mean(np.square(ratios), axis=0), 1, atol=0.5)


def test_units_farther_apart_than_the_tolerance_allows_give_no_result():
    planted, found = nearly(1e-3)

    assert planted.solve(20, found, rtol=0.1) is not None
    assert planted.solve(20, found, rtol=1e-5) is None


@pytest.mark.parametrize("narrow", [0, 32])
def test_a_few_units_a_layer_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch, narrow: int):
    """More of them, as any layer is here at first, vector by vector; the pairs are the same."""
    monkeypatch.setattr("spectra.curvature.reduction._NARROW", narrow)
    planted = plant(CASES["two layers"])
    dimensions: set[int] = set()

    def counted(product: MatVec) -> MatVec:
        def matvec(v: Tensor) -> Tensor:
            if v.shape[-1] < planted.mlp.dim:
                dimensions.add(v.ndim)
            return product(v)

        return matvec

    pairs = planted.solve(20, counted=counted)

    check_pairs(pairs, planted, 20)
    assert dimensions == ({2} if narrow else {1, 2})  # small parts are always taken in one block


def test_classes_of_two_units_are_not_asked_for_a_few_pairs_first(
    monkeypatch: pytest.MonkeyPatch,
):
    """As many as they must give: one search of the differences, and one of the quotient."""
    asked: list[int] = []

    def watched(product: MatVec, *, k: int, **how: object) -> EigenPairs:
        asked.append(k)
        return leading_eigenpairs(product, k=k, **how)

    monkeypatch.setattr("spectra.curvature.reduction.leading_eigenpairs", watched)
    planted = plant(Case((8, 5, 3), [(2, 2, 2, 2, 2)]))

    pairs = planted.solve(20)

    check_pairs(pairs, planted, 20)
    assert asked == [20, 20]
