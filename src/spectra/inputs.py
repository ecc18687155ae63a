"""The data matrix X, known by its products with the first layer of a network.

Four fifths of the pixels of a handwritten digit are background. On a CPU products are therefore
taken by what differs from it: with S = X − c for the background value c,

    X Vᵀ = S Vᵀ + c 1 (V 1)ᵀ,        Dᵀ X = Dᵀ S + c (Dᵀ 1) 1ᵀ,

exact, not an approximation. The rows are taken in `chunks`; in each, columns that are often off the
background, those in the middle of the picture, are dense and the non-zeros of the others listed.
Which those are is decided for every chunk of examples; the examples are put in an order, by label
and by how much of them is off the background, in which those of a chunk have more of their
background in common. Columns that are background in all of them cost nothing; other constant ones
are dense like any that is often off it. On a GPU the dense product of all columns wins. Random
mini-batches of training have a way of their own, in `minibatches`.

Letters: N examples, n of a chunk, D inputs, O of them dense in a chunk whose columns are divided,
H units of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spectra import runtime
from spectra.chunks import Chunk, DividedChunk, Entries, Rows, Table, one_of, with_ones

CHUNK = 1500
"""Examples a chunk on a CPU: some 0.8 MB for each 128-wide activation in float32."""
GPU_CHUNK = 1 << 17
"""Examples a chunk on a GPU, which large operations keep busy."""
SELDOM = 0.42
"""Share of a column's entries off the background below which its non-zeros are faster."""
SPARSE_BELOW = 0.5
"""Share of all entries off the background above which listing non-zeros is not worth it."""
_TOGETHER = 128
"""Units by chunks that are put together: activations of a narrow network are as large then as those
of one chunk of a 128-wide one."""


@dataclass(frozen=True)
class Columns:
    """How the columns of X are taken.

    Attributes:
        count: D.
        background: c, the value that S is relative to.
        listed: Whether non-zeros are listed; all columns are dense and c is zero if not.
    """

    count: int
    background: float = 0.0
    listed: bool = False

    def table(self, weight_HD: Tensor, bias_H: Tensor) -> Table:
        """Lay out a first layer."""
        table = Table(torch.cat([weight_HD.t(), bias_H[None]]))
        if self.background:
            table.bias.add_(table.weight.sum(0), alpha=self.background)
        return table

    def empty(self, like_H: Tensor) -> Table:
        """Zeros for as many units as a bias has, in its dtype and on its device."""
        return Table(like_H.new_zeros(self.count + 1, len(like_H)))

    def add_to(self, sums: Table, weight_HD: Tensor, bias_H: Tensor) -> None:
        """Add what chunks have added up, Dᵀ S and Dᵀ 1, to a weight's and a bias's result."""
        bias_H += sums.bias
        weight_DH = sums.weight
        if self.background:
            weight_DH = torch.add(weight_DH, sums.bias, alpha=self.background)
        weight_HD += weight_DH.t()


@dataclass(frozen=True)
class Inputs:
    """All rows of X, in chunks of which only the last may be smaller.

    Attributes:
        columns: How their columns are taken.
        chunks: The rows.
        order_N: Where the rows of the chunks, one after the other, stand in X; as there if None.
    """

    columns: Columns
    chunks: Sequence[Chunk | DividedChunk]
    order_N: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows."""
        return self.chunks[0].dtype

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What belongs to the rows of X, such as their labels, in the same chunks."""
        sizes = [chunk.count for chunk in self.chunks]
        if self.order_N is None:
            return torch.split(rows, sizes)
        return tuple(rows[members_n] for members_n in torch.split(self.order_N, sizes))

    def together(self, widest: int, threads: int) -> list[Rows]:
        """The chunks put together for a network so narrow that calls take longer than arithmetic.

        Args:
            widest: The units of its widest layer above the inputs.
            threads: Among how many the chunks are shared out evenly.
        """
        groups = threads * -(-len(self.chunks) // (threads * max(1, _TOGETHER // widest)))
        size = -(-len(self.chunks) // groups)
        if size == 1:
            return list(self.chunks)
        return [one_of(self.chunks[i : i + size]) for i in range(0, len(self.chunks), size)]


def inputs_of(
    x_ND: Tensor, labels_N: Tensor | None = None, *, chunk: int | None = None, threads: int = 1
) -> Inputs:
    """Divide the data by rows into chunks, and their columns where that is faster.

    Args:
        x_ND: The data, all of it.
        labels_N: Their labels, integers, by which rows are put together.
        chunk: Examples a chunk; what suits the device unless given.
        threads: Chunks divided at a time on a CPU, each by a thread of its own.
    """
    chunk = chunk or (CHUNK if x_ND.device.type == "cpu" else GPU_CHUNK)
    if x_ND.device.type == "cpu" and len(x_ND):
        background = float(x_ND.min())
        each = runtime.own_threads(threads).map if threads > 1 else map
        off_N = torch.cat(list(each(partial(_off, background), x_ND.split(chunk))))
        if float(off_N.sum()) < SPARSE_BELOW * x_ND.numel():
            key_N = off_N if labels_N is None else labels_N * (x_ND.shape[1] + 1) + off_N
            order_N = torch.argsort(key_N, stable=True)
            chunks = list(each(partial(_divided, x_ND, background), order_N.split(chunk)))
            return Inputs(Columns(x_ND.shape[1], background, listed=True), chunks, order_N)
    return Inputs(Columns(x_ND.shape[1]), [Chunk(x_nD) for x_nD in x_ND.split(chunk)])


def _off(background: float, x_nD: Tensor) -> Tensor:
    """How many entries of each row (n,) are off the background, which is the least of all."""
    return (x_nD - background).sign().sum(1).long()


def _divided(x_ND: Tensor, background: float, members_n: Tensor) -> DividedChunk:
    """A chunk of some rows by its often columns and the non-zeros of the others."""
    s_nD = x_ND.index_select(0, members_n).sub_(background)
    often_D = s_nD.sign().sum(0) >= SELDOM * len(s_nD)
    often_O = torch.nonzero(often_D)[:, 0]
    often_nO = with_ones(s_nD.index_select(1, often_O))
    s_nD.index_fill_(1, often_O, 0)
    often_O = torch.cat([often_O, often_O.new_tensor([s_nD.shape[1]])])
    return DividedChunk(often_nO, often_O, Entries.of(s_nD), Entries.of(s_nD.t().contiguous()))
