"""The first layer over random mini-batches against the dense products it stands for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backgrounds import BACKGROUND, EDGES, mostly_background
from spectra import minibatches
from spectra.backprop import Layers
from spectra.minibatches import Batch, Rows, SplitRows, WholeRows, rows_of
from spectra.mlp import Mlp


def data(background: float = BACKGROUND) -> Tensor:
    """Forty examples of nine inputs, one of them off the background everywhere."""
    x = mostly_background(40, 9, background)
    x[:, 4] += 0.5
    return x


def some(mlp: Mlp, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, a δ₁ of every example, and labels as ones and zeros."""
    draw = torch.Generator().manual_seed(3)
    theta_P, delta_NH = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(x_ND.dtype)
        for shape in ((mlp.dim,), (len(x_ND), mlp.widths[1]))
    )
    labels_N = torch.randint(0, mlp.widths[-1], (len(x_ND),), generator=draw)
    return theta_P, delta_NH, Layers(mlp, theta_P).onehot(labels_N)


class Pass:
    """A pass over data in some order, batch by batch, with what comes out."""

    def __init__(self, rows: Rows, mlp: Mlp, x_ND: Tensor, order_N: Tensor, size: int) -> None:
        self._rows, self._mlp = rows, mlp
        theta_P, self._delta_NH, onehot_NC = some(mlp, x_ND)
        self._order_N, self._size = order_N, size
        self._gradient_P = torch.full_like(theta_P, torch.nan)
        self._pieces = rows.pieces(self._gradient_P, mlp.widths[1])
        self._first = rows.first_layer(
            mlp, rows.placed(theta_P, mlp.widths[1]), self._gradient_P, self._pieces, onehot_NC
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Batch, Tensor, Tensor, Tensor]]:
        """Examples, batch, a_1, and the gradients of the first layer's weight and bias."""
        batches = self._first.batches(self._order_N, self._size)
        for order_B, batch in zip(self._order_N.split(self._size), batches, strict=True):
            a_BH = batch.up()
            batch.down(self._delta_NH[order_B])
            gradient_P = torch.cat([piece.view(-1) for piece in self._pieces])
            restored_P = self._rows.restored(gradient_P, self._mlp.widths[1])
            weight, bias, *above = self._mlp.split(restored_P).values()
            assert all(part.isnan().all() for part in above)
            yield order_B, batch, a_BH, weight, bias


def check(x_ND: Tensor, order_N: Tensor, size: int, tolerance: float = 1e-13) -> None:
    """Every batch's products equal those with the rows of x, in float64."""
    mlp = Mlp((x_ND.shape[1], 5, 4, 3))
    theta_P, delta_NH, onehot_NC = (value.double() for value in some(mlp, x_ND))
    weight_HD, bias_H, *_ = mlp.split(theta_P).values()
    seen = []
    for order_B, batch, a_BH, weight, bias in Pass(rows_of(x_ND), mlp, x_ND, order_N, size):
        x_BD, delta_BH = x_ND[order_B].double(), delta_NH[order_B]
        assert {a_BH.dtype, weight.dtype, bias.dtype} == {x_ND.dtype}
        assert torch.equal(batch.onehot().double(), onehot_NC[order_B])
        for actual, expected in (
            (a_BH, x_BD @ weight_HD.T + bias_H),
            (weight, delta_BH.T @ x_BD),
            (bias, delta_BH.sum(0)),
        ):
            assert (actual.double() - expected).abs().max() <= tolerance * (
                1 + expected.abs().max()
            )
        seen.append(order_B)
    assert torch.equal(torch.cat(seen), order_N)


@pytest.mark.parametrize("background", [0.0, BACKGROUND])
@pytest.mark.parametrize("size", [1, 7, 8, 40, 64])
@pytest.mark.parametrize("together", [1, 20, 4096])
def test_products_equal_those_of_the_rows(
    together: int, size: int, background: float, monkeypatch: pytest.MonkeyPatch
):
    """Batches that divide the data and ragged ones, listed one by one, some or all at once."""
    monkeypatch.setattr(minibatches, "_TOGETHER", together)
    x_ND = data(background)
    assert isinstance(rows_of(x_ND), SplitRows)

    check(x_ND, torch.randperm(40, generator=torch.Generator().manual_seed(4)), size)


def test_an_order_may_leave_out_examples_and_repeat_them():
    check(data(), torch.tensor([3, 3, 39, 0, 3, 20, 0]), 3)


@pytest.mark.parametrize("name", EDGES)
def test_there_is_nothing_that_cannot_be_divided(name: str):
    """Neither kind of columns has to be there, nor any entry off the background."""
    x_ND = EDGES[name]

    check(x_ND, torch.arange(len(x_ND)).flip(0), 3)


def test_digits_in_float32_come_out_within_its_round_off(digits: tuple[Tensor, Tensor]):
    """The background of 784 columns, which cancels against their values."""
    x_ND = digits[0].float()
    assert isinstance(rows_of(x_ND), SplitRows)

    check(x_ND, torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(5)), 64, 3e-6)


def test_columns_are_listed_where_few_entries_are_off_the_background():
    rows = rows_of(data())

    assert isinstance(rows, SplitRows)
    off_D = (data() != BACKGROUND).double().mean(0)
    assert rows.often_O.tolist() == torch.nonzero(off_D >= 0.3)[:, 0].tolist()
    assert sorted([*rows.often_O.tolist(), *rows.seldom_S.tolist()]) == list(range(9))
    assert 4 in rows.often_O.tolist()
    assert rows.listed_NS.nnz == int((data() != BACKGROUND)[:, rows.seldom_S].sum()) + len(
        rows.seldom_S
    )


def test_rows_stay_whole_where_most_entries_are_off_the_background():
    draw = torch.Generator().manual_seed(6)

    assert isinstance(rows_of(torch.rand(40, 9, generator=draw)), WholeRows)
    assert isinstance(rows_of(torch.empty(0, 9)), WholeRows)


@pytest.mark.parametrize("widths", [(9, 3), (9, 5, 3), (9, 5, 4, 3)], ids=str)
def test_parameters_are_put_back_where_they_were(widths: tuple[int, ...]):
    """Every one, once, and those above the first layer are not moved."""
    mlp, rows = Mlp(widths), rows_of(data())
    theta_P = torch.arange(mlp.dim, dtype=torch.float64)

    placed_P = rows.placed(theta_P, widths[1])

    assert placed_P.sort().values.tolist() == theta_P.tolist()
    assert not torch.equal(placed_P, theta_P)
    first = 10 * widths[1]
    assert torch.equal(placed_P[first:], theta_P[first:])
    assert torch.equal(rows.restored(placed_P, widths[1]), theta_P)


def test_a_network_without_hidden_layers_has_its_scores_from_the_first():
    x_ND, mlp = data(), Mlp((9, 3))
    theta_P, delta_NH, _ = some(mlp, x_ND)
    weight_HD, bias_H = mlp.split(theta_P).values()

    for order_B, _, a_BH, weight, _ in Pass(rows_of(x_ND), mlp, x_ND, torch.arange(40), 16):
        torch.testing.assert_close(a_BH, x_ND[order_B] @ weight_HD.T + bias_H)
        torch.testing.assert_close(weight, delta_NH[order_B].T @ x_ND[order_B])
