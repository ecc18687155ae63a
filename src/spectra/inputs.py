"""The data matrix X, known by its products with the first layer of a network.

Four fifths of the pixels of a handwritten digit are background. On a CPU the columns of X that
are mostly background are therefore taken by what differs from it: with S = X − c for the
background value c,

    X Vᵀ = S Vᵀ + c 1 (V 1)ᵀ,        Dᵀ X = Dᵀ S + c (Dᵀ 1) 1ᵀ,

exact, not an approximation. A product with S is a sum of rows of a small table, one for each
non-zero, which `embedding_bag` does faster than the dense product. Columns that are often off
the background, those in the middle of the picture, stay dense. Inputs that are constant over the
data cost nothing. On a GPU the dense product of all columns wins.

For that the weights of the first layer lie transposed and in the order of the two kinds of
columns, the `Table`, laid out once a product. A training step takes its rows densely instead: to
list the non-zeros of a random batch costs what the sparse product saves.

Letters: N examples, n of a chunk, D inputs, O of them often off the background and S seldom,
H units of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spectra import narrow

CHUNK = 1500
"""Examples a chunk on a CPU: some 0.8 MB for each 128-wide activation in float32."""
GPU_CHUNK = 1 << 17
"""Examples a chunk on a GPU, which large operations keep busy."""
SELDOM = 0.35
"""Share of a column's entries off the background below which its non-zeros are faster."""
SPARSE_BELOW = 0.5
"""Share of all entries off the background above which listing non-zeros is not worth it."""


@dataclass(frozen=True)
class Table:
    """A first layer (V, u) as products with chunks take it, or what chunks add up to.

    In the former the background's share c V 1 of the seldom columns is part of the bias.
    """

    often_OH: Tensor
    seldom_SH: Tensor
    bias_H: Tensor


@dataclass(frozen=True)
class Columns:
    """Which columns of X are taken how.

    Attributes:
        often_O: Columns multiplied densely, ascending.
        seldom_S: Columns multiplied by their non-zeros, ascending.
        background: c, the value that S is relative to.
    """

    often_O: Tensor
    seldom_S: Tensor
    background: float

    def table(self, weight_HD: Tensor, bias_H: Tensor) -> Table:
        """Lay out a first layer."""
        weight_DH = weight_HD.t()
        if not len(self.seldom_S):
            return Table(weight_DH, weight_DH[:0], bias_H)
        seldom_SH = weight_DH[self.seldom_S]
        if self.background:
            bias_H = torch.add(bias_H, seldom_SH.sum(0), alpha=self.background)
        return Table(weight_DH[self.often_O], seldom_SH, bias_H)

    def empty(self, like_H: Tensor) -> Table:
        """Zeros for as many units as a bias has, in its dtype and on its device."""
        hidden = len(like_H)
        return Table(
            like_H.new_zeros(len(self.often_O), hidden),
            like_H.new_zeros(len(self.seldom_S), hidden),
            like_H.new_zeros(hidden),
        )

    def add_to(self, sums: Table, weight_HD: Tensor, bias_H: Tensor) -> None:
        """Add what chunks have added up, Dᵀ S and Dᵀ 1, to a weight's and a bias's result."""
        bias_H += sums.bias_H
        if not len(self.seldom_S):
            weight_HD += sums.often_OH.t()
            return
        seldom_SH = torch.add(sums.seldom_SH, sums.bias_H, alpha=self.background)
        weight_HD.index_add_(1, self.often_O, sums.often_OH.t())
        weight_HD.index_add_(1, self.seldom_S, seldom_SH.t())


@dataclass(frozen=True)
class Entries:
    """The non-zeros of a matrix row by row: columns, values, and where each row begins."""

    columns: Tensor
    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Entries:
        """List a matrix."""
        rows, columns = torch.nonzero(matrix, as_tuple=True)
        counts = torch.bincount(rows, minlength=len(matrix))
        starts = torch.cumsum(counts, 0) - counts
        return cls(columns.int(), matrix[rows, columns].contiguous(), starts.int())

    def times(self, table: Tensor) -> Tensor:
        """The product of the matrix with a table of as many rows as it has columns."""
        return functional.embedding_bag(
            self.columns, table, self.starts, mode="sum", per_sample_weights=self.values
        )


@dataclass(frozen=True)
class Chunk:
    """Some rows: the often columns of X dense, the non-zeros of S listed both ways."""

    often_nO: Tensor
    by_example: Entries | None = None
    by_column: Entries | None = None

    def times(self, table: Table) -> Tensor:
        """X Vᵀ + u, of shape (n, H)."""
        product_nH = narrow.product(self.often_nO, table.often_OH, table.bias_H)
        if self.by_example is not None:
            product_nH += self.by_example.times(table.seldom_SH)
        return product_nH

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """Add this chunk's part of Dᵀ S and Dᵀ 1."""
        sums.bias_H.add_(d_nH.sum(0))
        narrow.add_outer(sums.often_OH, self.often_nO, d_nH)
        if self.by_column is not None:
            sums.seldom_SH.add_(self.by_column.times(d_nH))


@dataclass(frozen=True)
class Inputs:
    """All rows of X, in chunks of which only the last may be smaller."""

    columns: Columns
    chunks: Sequence[Chunk]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What belongs to the rows of X, such as their labels, in the same chunks."""
        return torch.split(rows, [len(chunk.often_nO) for chunk in self.chunks])


def inputs_of(x_ND: Tensor, chunk: int | None = None) -> Inputs:
    """Divide the data: by columns where their non-zeros are fewer, by rows into chunks.

    Args:
        x_ND: The data, all of it.
        chunk: Examples a chunk; what suits the device unless given.
    """
    chunk = chunk or (CHUNK if x_ND.device.type == "cpu" else GPU_CHUNK)
    columns = _columns_of(x_ND)
    if not len(columns.seldom_S):
        return Inputs(columns, [Chunk(x_nD) for x_nD in x_ND.split(chunk)])
    often_NO = x_ND[:, columns.often_O]
    seldom = (x_nD[:, columns.seldom_S] - columns.background for x_nD in x_ND.split(chunk))
    return Inputs(
        columns,
        [
            Chunk(often_nO, Entries.of(s_nS), Entries.of(s_nS.t().contiguous()))
            for often_nO, s_nS in zip(often_NO.split(chunk), seldom, strict=True)
        ],
    )


def _columns_of(x_ND: Tensor) -> Columns:
    every_D = torch.arange(x_ND.shape[1], device=x_ND.device)
    if x_ND.device.type == "cpu" and len(x_ND):
        background = float(x_ND.min())
        off_D = (x_ND != background).float().mean(0)
        if float(off_D.mean()) < SPARSE_BELOW:
            return Columns(every_D[off_D >= SELDOM], every_D[off_D < SELDOM], background)
    return Columns(every_D, every_D[:0], 0.0)
