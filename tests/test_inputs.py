"""Products with the data matrix: sparse ones equal dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from backgrounds import BACKGROUND, EDGES, mostly_background
from spectra.chunks import Rows
from spectra.inputs import Inputs, inputs_of


@pytest.mark.parametrize("background", [0.0, -0.4242])
@pytest.mark.parametrize("chunk", [1, 7, 40, 100], ids=str)
def test_products_equal_those_of_the_matrix(chunk: int, background: float):
    """Often and seldom columns, ragged last chunks, empty rows and constant columns."""
    x = mostly_background(40, 9, background)
    x[:, 4] += 0.5  # off the background everywhere
    draw = torch.Generator().manual_seed(2)
    weight, delta = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((5, 9), (40, 5)))
    bias = torch.randn(5, generator=draw, dtype=torch.float64)

    inputs = inputs_of(x, chunk=chunk)
    table, sums = inputs.columns.table(weight, bias), inputs.columns.empty(bias)
    product = torch.cat([part.times(table) for part in inputs.chunks])
    for part, d_nH in zip(inputs.chunks, inputs.split(delta), strict=True):
        part.add_under(d_nH, sums)
    under, total = torch.ones_like(weight), torch.ones_like(bias)
    inputs.columns.add_to(sums, under, total)

    assert inputs.columns.listed
    expected = torch.cat(inputs.split(x @ weight.T + bias))
    torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(under, delta.T @ x + 1, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(total, delta.sum(0) + 1, rtol=1e-13, atol=1e-13)


def products(
    inputs: Inputs,
    weight: Tensor,
    bias: Tensor,
    delta: Tensor,
    parts: Sequence[Rows] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """X Vᵀ + u, Dᵀ X and Dᵀ 1 by way of the chunks, or of some put together."""
    columns = inputs.columns
    table, sums = columns.table(weight, bias), columns.empty(bias)
    parts = inputs.chunks if parts is None else parts
    rows = torch.cat(inputs.split(torch.arange(len(delta))))
    up = torch.empty_like(delta)
    for part, members in zip(parts, rows.split([part.count for part in parts]), strict=True):
        up[members] = part.times(table)
        part.add_under(delta[members], sums)
    under, total = torch.zeros_like(weight), torch.zeros_like(bias)
    columns.add_to(sums, under, total)
    return up, under, total


@pytest.mark.parametrize(
    ("widest", "threads", "members"),
    [
        (128, 2, [1] * 10), (1000, 1, [1] * 10), (64, 2, [2] * 5), (40, 1, [3, 3, 3, 1]),
        (40, 2, [3, 3, 3, 1]), (10, 1, [10]), (10, 2, [5, 5]), (1, 3, [4, 4, 2]), (1, 20, [1] * 10),
    ],
)  # fmt: skip
def test_a_narrow_network_takes_chunks_together(widest: int, threads: int, members: list[int]):
    """As many as have the activations of one 128-wide chunk, shared out evenly; the same sums."""
    x = mostly_background(40, 9, BACKGROUND)
    inputs = inputs_of(x, chunk=4)

    parts = inputs.together(widest, threads)

    assert [part.count for part in parts] == [4 * count for count in members]
    check(inputs, x, parts)


def layer(d: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """V, u and D for n examples of d inputs."""
    draw = torch.Generator().manual_seed(2)
    shapes = ((5, d), (5,), (n, 5))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
                 for shape in shapes)  # fmt: skip


def check(inputs: Inputs, x: Tensor, parts: Sequence[Rows] | None = None) -> None:
    weight, bias, delta = layer(x.shape[1], len(x))
    up, under, total = products(inputs, weight, bias, delta, parts)
    torch.testing.assert_close(up, x @ weight.T + bias, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(under, delta.T @ x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(total, delta.sum(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("name", EDGES)
def test_there_is_nothing_that_cannot_be_divided(name: str, chunk: int):
    """Neither kind of columns has to be there."""
    x = EDGES[name]
    inputs = inputs_of(x, chunk=chunk)

    assert sum(part.count for part in inputs.chunks) == len(x)
    check(inputs, x)


def test_a_product_only_reads():
    """The data, the layer and the table stay as they were."""
    x = mostly_background(12, 9, BACKGROUND)
    x[:, 4] += 0.5
    inputs = inputs_of(x, chunk=12)
    weight, bias, _ = layer(9, 12)
    table = inputs.columns.table(weight, bias)
    held = [x.clone(), weight.clone(), bias.clone(), table.bias.clone()]
    (members,) = inputs.split(torch.arange(12))

    product = inputs.chunks[0].times(table)

    expected = (x @ weight.T + bias)[members]
    torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-13)
    for tensor, copy in zip([x, weight, bias, table.bias], held, strict=True):
        assert torch.equal(tensor, copy)


def test_float32_stays_float32_within_its_round_off(digits: tuple[Tensor, Tensor]):
    """Real digits, where the background of 784 columns cancels against their values."""
    x, _ = digits
    weight, bias, delta = layer(784, len(x))

    inputs = inputs_of(x.float(), chunk=1000)
    up, under, total = products(inputs, weight.float(), bias.float(), delta.float())

    assert {up.dtype, under.dtype, total.dtype} == {torch.float32}
    for actual, expected in (
        (up, x @ weight.T + bias), (under, delta.T @ x), (total, delta.sum(0))
    ):  # fmt: skip
        assert (actual.double() - expected).norm() < 1e-6 * expected.norm()


def test_columns_are_divided_by_how_often_they_are_off_the_background():
    """At the share that decides and just below it; every column is one or the other."""
    x = torch.zeros(100, 4)
    for column, count in enumerate((41, 42, 0, 90)):
        x[:count, column] = 1.0

    inputs = inputs_of(x)

    assert inputs.columns.listed
    assert inputs.columns.background == 0
    assert inputs.chunks[0].often_O.tolist() == [1, 3, 4]
    assert inputs.chunks[0].by_example.columns.unique().tolist() == [0]


def test_rows_are_put_together_by_label_and_by_what_is_off_the_background():
    """Rows alike in both stay in their order, and chunks of other labels have other columns."""
    x = torch.zeros(8, 8)
    labels = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
    for row, count in enumerate((3, 2, 1, 3, 3, 1, 2, 2)):
        first = 4 * int(labels[row])
        x[row, first : first + count] = 1.0

    inputs = inputs_of(x, labels, chunk=4)

    assert inputs.order_N.tolist() == [5, 1, 7, 3, 2, 6, 0, 4]
    assert [part.tolist() for part in inputs.split(labels)] == [[0] * 4, [1] * 4]
    assert [part.often_O.tolist() for part in inputs.chunks] == [[0, 1, 8], [4, 5, 6, 8]]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads: int):
    """Chunks divided at a time come out as one after the other, in their order."""
    x = mostly_background(40, 9, BACKGROUND)
    labels = torch.arange(40) % 3
    alone, beside = (inputs_of(x, labels, chunk=7, threads=count) for count in (1, threads))

    assert torch.equal(beside.order_N, alone.order_N)
    assert len(beside.chunks) == len(alone.chunks) == 6
    for one, other in zip(beside.chunks, alone.chunks, strict=True):
        assert torch.equal(one.often_nO, other.often_nO)
        assert torch.equal(one.often_O, other.often_O)
        for kind in ("by_example", "by_column"):
            for field in ("columns", "values", "starts"):
                assert torch.equal(
                    getattr(getattr(one, kind), field), getattr(getattr(other, kind), field)
                )


def test_the_sparse_form_is_chosen_for_digits_and_not_for_noise(digits: tuple[Tensor, Tensor]):
    x, labels = digits
    noise = torch.randn(100, 20, generator=torch.Generator().manual_seed(3))

    inputs = inputs_of(x, labels, chunk=1000)

    assert max(len(part.often_O) for part in inputs.chunks) < 300
    assert len(inputs.chunks) == 3
    assert not inputs_of(noise, chunk=40).columns.listed
