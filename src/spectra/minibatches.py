"""The first layer of networks in training, over mini-batches in random order.

With a wide input the first layer is most of a step: a_1 = x W₁ᵀ + b₁ on the way up, δ₁ᵀ x and Σ δ₁
on the way down. Four fifths of the pixels of a handwritten digit are background, and on a CPU those
are skipped here as in `inputs`. Columns that are often off the background stay dense, with a column
of ones among them by which the bias is one weight more. The entries of the others that are off the
background, less the background, are listed: by example for the way up, by column for the way down.
The background itself is an example more in each batch, the first, with all that the others miss.
Listing one random batch after the other would cost what it saves; many batches are listed at once,
by counting, and the next ones by another thread while these are learnt from.

For that the parameters of the first layer lie transposed and in the order (often, bias, seldom)
while they are trained. Optimisers and penalties of this package act on each parameter by itself, so
they need not know.

Letters: N examples, n of many batches, B of a batch, D inputs, O of them often off the background
and one that is always 1, S the others, H units of the first layer, C classes, P parameters. A stack
of M networks has M in front, but is not taken by columns: that is done on a CPU, where networks are
trained one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from spectra import runtime
from spectra.backprop import Layers, write_gradients
from spectra.chunks import Entries
from spectra.inputs import CHUNK, SPARSE_BELOW
from spectra.mlp import Mlp

_SELDOM = 0.3
"""Share of a column's entries off the background below which they are listed."""
_TOGETHER = 4096
"""Examples of the batches that are listed at once: the lists stay in cache."""


class Batch(Protocol):
    """A mini-batch on its way through the first layer."""

    def onehot(self) -> Tensor:
        """The labels as ones and zeros, (B, C)."""

    def up(self) -> Tensor:
        """a_1, (B, H)."""

    def down(self, delta_BH: Tensor) -> None:
        """Write the gradients of W₁ and b₁; `up` has been called before."""


class FirstLayer(Protocol):
    """The first layer and its gradient, as views of all parameters and all gradients."""

    def batches(self, order_N: Tensor, size: int) -> Iterator[Batch]:
        """The examples in some order, by batches; only the last may be smaller."""


class Rows(Protocol):
    """The inputs as training takes them."""

    def placed(self, theta_P: Tensor, hidden: int) -> Tensor:
        """The parameters as they lie in training, for `hidden` units; a copy."""

    def restored(self, placed_P: Tensor, hidden: int) -> Tensor:
        """The parameters as they lie everywhere else."""

    def pieces(self, placed_P: Tensor, hidden: int) -> list[Tensor]:
        """A vector that lies as in training, in the pieces that gradients come in."""

    def first_layer(
        self,
        mlp: Mlp,
        placed_P: Tensor,
        gradient_P: Tensor,
        pieces: list[Tensor],
        onehot_NC: Tensor,
    ) -> FirstLayer:
        """The first layer of a network.

        Args:
            mlp: Its architecture.
            placed_P: The parameters as they lie in training.
            gradient_P: Their gradient, of which the first layer's is written here.
            pieces: The gradient in pieces. In place of one there may be a new tensor after every
                batch, rather than a copy of it in the gradient.
            onehot_NC: The labels as ones and zeros.
        """


def rows_of(x_ND: Tensor) -> Rows:
    """The inputs by often and seldom columns on a CPU where that is faster, else as they are."""
    if x_ND.device.type != "cpu" or not len(x_ND):
        return WholeRows(x_ND)
    background = float(x_ND.min())
    off_D = torch.stack([(x_nD != background).sum(0) for x_nD in x_ND.split(CHUNK)]).sum(0)
    often_D = off_D >= _SELDOM * len(x_ND)
    if bool(often_D.all()) or float(off_D.sum()) >= SPARSE_BELOW * x_ND.numel():
        return WholeRows(x_ND)
    often_O, seldom_S = torch.nonzero(often_D)[:, 0], torch.nonzero(~often_D)[:, 0]
    ones_N1 = x_ND.new_ones(len(x_ND), 1)
    listed = [_csr(x_nD[:, seldom_S] - background) for x_nD in x_ND.split(CHUNK)]
    listed.append(_csr(x_ND.new_full((1, len(seldom_S)), background)))
    return SplitRows(
        often_O,
        seldom_S,
        torch.cat([x_ND[:, often_O], ones_N1], dim=1),
        sparse.vstack(listed, format="csr"),
    )


def _csr(matrix: Tensor) -> sparse.csr_array:
    """The non-zeros of a matrix, as SciPy keeps them."""
    listed = Entries.of(matrix)
    starts = np.append(listed.starts.numpy(), np.int32(len(listed.values)))
    return sparse.csr_array(
        (listed.values.numpy(), listed.columns.numpy(), starts), shape=tuple(matrix.shape)
    )


@dataclass(frozen=True)
class WholeRows:
    """Dense rows (N, D), for a network or a stack; parameters lie in training as elsewhere."""

    x_ND: Tensor

    def placed(self, theta_P: Tensor, hidden: int) -> Tensor:
        """See `Rows`."""
        return theta_P.clone()

    def restored(self, placed_P: Tensor, hidden: int) -> Tensor:
        """See `Rows`."""
        return placed_P

    def pieces(self, placed_P: Tensor, hidden: int) -> list[Tensor]:
        """See `Rows`."""
        return [placed_P]

    def first_layer(
        self,
        mlp: Mlp,
        placed_P: Tensor,
        gradient_P: Tensor,
        pieces: list[Tensor],
        onehot_NC: Tensor,
    ) -> FirstLayer:
        """See `Rows`."""
        return _WholeLayer(self, Layers(mlp, placed_P), Layers(mlp, gradient_P), onehot_NC)


@dataclass(frozen=True)
class SplitRows:
    """Rows by columns: the often ones and ones dense (N, O), the others listed (N + 1, S).

    Attributes:
        often_O: Which inputs are dense, ascending, and
        seldom_S: which are listed.
        dense_NO: The former, and at the end a column of ones.
        listed_NS: What the latter differ from the background by; in the last row, the background.
    """

    often_O: Tensor
    seldom_S: Tensor
    dense_NO: Tensor
    listed_NS: sparse.csr_array

    def placed(self, theta_P: Tensor, hidden: int) -> Tensor:
        """See `Rows`."""
        return theta_P[self._places(len(theta_P), hidden)]

    def restored(self, placed_P: Tensor, hidden: int) -> Tensor:
        """See `Rows`."""
        theta_P = torch.empty_like(placed_P)
        theta_P[self._places(len(placed_P), hidden)] = placed_P
        return theta_P

    def pieces(self, placed_P: Tensor, hidden: int) -> list[Tensor]:
        """See `Rows`."""
        often, seldom = self.dense_NO.shape[1] * hidden, len(self.seldom_S) * hidden
        return list(placed_P.split([often, seldom, len(placed_P) - often - seldom]))

    def first_layer(
        self,
        mlp: Mlp,
        placed_P: Tensor,
        gradient_P: Tensor,
        pieces: list[Tensor],
        onehot_NC: Tensor,
    ) -> FirstLayer:
        """See `Rows`."""
        hidden = mlp.widths[1]
        often_OH, seldom_SH = (p.view(-1, hidden) for p in self.pieces(placed_P, hidden)[:2])
        often_gradient_OH = self.pieces(gradient_P, hidden)[0].view(-1, hidden)
        return _SplitLayer(self, often_OH, seldom_SH, often_gradient_OH, pieces, onehot_NC)

    def batches_of(
        self, order_n: NDArray[np.int64], size: int
    ) -> Iterator[tuple[Entries, Entries]]:
        """The listed entries of each batch by example and by column, the background first."""
        count, columns = len(order_n), len(self.seldom_S)
        batches, lines = -(-count // size), size + 1
        rows = self.listed_NS[np.insert(order_n, np.arange(0, count, size), len(self.dense_NO))]
        # The columns of one batch after the other, as if they were different ones.
        batch_n = np.arange(count + batches, dtype=np.int32) // lines
        apart = rows.indices + np.repeat(columns * batch_n, np.diff(rows.indptr))
        shape = (count + batches, batches * columns)
        by_column = sparse.csr_array((rows.data, apart, rows.indptr), shape=shape).tocsc()
        ends = [*rows.indptr[:-1:lines], rows.indptr[-1]]
        return zip(
            _divided(rows.indices, rows.data, rows.indptr, ends, lines),
            _divided(by_column.indices % lines, by_column.data, by_column.indptr, ends, columns),
            strict=True,
        )

    def _places(self, parameters: int, hidden: int) -> Tensor:
        """Where each parameter in training stands everywhere else."""
        inputs = len(self.often_O) + len(self.seldom_S)
        weight_DH = torch.arange(inputs * hidden).view(hidden, inputs).t()
        bias_H = inputs * hidden + torch.arange(hidden)
        above = torch.arange((inputs + 1) * hidden, parameters)
        often_OH, seldom_SH = weight_DH[self.often_O], weight_DH[self.seldom_S]
        return torch.cat([often_OH.flatten(), bias_H, seldom_SH.flatten(), above])


def _divided(
    places: NDArray[np.int32],
    values: NDArray[np.floating],
    starts: NDArray[np.int32],
    ends: list[int],
    lines: int,
) -> Iterator[Entries]:
    """Listed entries of one batch after the other, each of so many lines, by batches."""
    sizes = np.diff(ends).tolist()
    starts = starts[:-1] - np.repeat(ends[:-1], lines)[: len(starts) - 1]
    columns, begins = (torch.from_numpy(a.astype(np.int32, copy=False)) for a in (places, starts))
    return map(
        Entries, columns.split(sizes), torch.from_numpy(values).split(sizes), begins.split(lines)
    )


@dataclass(frozen=True)
class _WholeLayer:
    rows: WholeRows
    layers: Layers
    gradients: Layers
    onehot_NC: Tensor

    def batches(self, order_N: Tensor, size: int) -> Iterator[Batch]:
        return (_WholeBatch(self, order_B) for order_B in order_N.split(size, dim=-1))


class _WholeBatch:
    def __init__(self, first: _WholeLayer, order_B: Tensor) -> None:
        self._first, self._order_B = first, order_B

    def onehot(self) -> Tensor:
        return torch.embedding(self._first.onehot_NC, self._order_B)

    def up(self) -> Tensor:
        self._x_BD = torch.embedding(self._first.rows.x_ND, self._order_B)
        layers = self._first.layers
        return layers.affine(layers.rows[0], self._x_BD, layers.transposed[0])

    def down(self, delta_BH: Tensor) -> None:
        write_gradients(self._first.gradients, 0, delta_BH, self._x_BD)


class _SplitLayer:
    def __init__(
        self,
        rows: SplitRows,
        often_OH: Tensor,
        seldom_SH: Tensor,
        often_gradient_OH: Tensor,
        pieces: list[Tensor],
        onehot_NC: Tensor,
    ) -> None:
        self.often_OH, self.seldom_SH = often_OH, seldom_SH
        self.often_gradient_OH, self.pieces = often_gradient_OH, pieces
        self.bias_gradient_1H = often_gradient_OH[-1:]
        self._rows, self._onehot_NC = rows, onehot_NC

    def batches(self, order_N: Tensor, size: int) -> Iterator[Batch]:
        together = order_N.split(max(1, _TOGETHER // size) * size)
        for batches in runtime.ahead(partial(self._gathered, size), together):
            yield from batches

    @torch.inference_mode()
    def _gathered(self, size: int, order_n: Tensor) -> list[_SplitBatch]:
        """Some batches, with what they are made of side by side in memory."""
        dense = torch.embedding(self._rows.dense_NO, order_n).split(size)
        onehot = torch.embedding(self._onehot_NC, order_n).split(size)
        listed = self._rows.batches_of(order_n.numpy(), size)
        return [
            _SplitBatch(self, x_BO, onehot_BC, *entries)
            for x_BO, onehot_BC, entries in zip(dense, onehot, listed, strict=True)
        ]


class _SplitBatch:
    def __init__(
        self,
        first: _SplitLayer,
        x_BO: Tensor,
        onehot_BC: Tensor,
        by_example: Entries,
        by_column: Entries,
    ) -> None:
        self._first, self._x_BO, self._onehot_BC = first, x_BO, onehot_BC
        self._by_example, self._by_column = by_example, by_column

    def onehot(self) -> Tensor:
        return self._onehot_BC

    def up(self) -> Tensor:
        listed_BH = self._by_example.times(self._first.seldom_SH)
        a_BH = listed_BH[1:].add_(listed_BH[0])
        return a_BH.addmm_(self._x_BO, self._first.often_OH)

    def down(self, delta_BH: Tensor) -> None:
        first = self._first
        torch.mm(self._x_BO.t(), delta_BH, out=first.often_gradient_OH)
        # What the background is multiplied by is the sum of all, as it is for the bias.
        with_sum_BH = torch.cat([first.bias_gradient_1H, delta_BH])
        first.pieces[1] = self._by_column.times(with_sum_BH).view(-1)
