"""The data matrix X, known by its products with the first layer of a network.

Four fifths of the pixels of a handwritten digit are background. On a CPU products are therefore
taken by what differs from it: with S = X − c for the background value c,

    X Vᵀ = S Vᵀ + c 1 (V 1)ᵀ,        Dᵀ X = Dᵀ S + c (Dᵀ 1) 1ᵀ,

exact, not an approximation. A product with columns of S that are mostly zero is a sum of rows of a
small table, one for each non-zero, which `embedding_bag` does faster than the dense product.
Columns that are often off the background, those in the middle of the picture, stay dense. Which
those are is decided for every chunk of examples; the examples are put in an order, by label and by
how much of them is off the background, in which those of a chunk have more of their background in
common. Inputs that are constant over the data cost nothing. On a GPU the dense product of all
columns wins.

For that the weights of the first layer lie transposed, the `Table`, laid out once a product. Random
mini-batches of training have a way of their own, in `minibatches`.

Letters: N examples, n of a chunk, D inputs, O of them often off the background in a chunk, H units
of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spectra import narrow, runtime

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
_SUM = 0
"""The mode of `torch.embedding_bag` that adds up."""


@dataclass(frozen=True)
class Table:
    """A first layer (V, u) as products with chunks take it, or what chunks add up to.

    In the former the background's share c V 1 is part of the bias.
    """

    weight_DH: Tensor
    bias_H: Tensor


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
        weight_DH = weight_HD.t()
        if not self.listed:
            return Table(weight_DH, bias_H)
        weight_DH = weight_DH.contiguous()
        return Table(weight_DH, torch.add(bias_H, weight_DH.sum(0), alpha=self.background))

    def empty(self, like_H: Tensor) -> Table:
        """Zeros for as many units as a bias has, in its dtype and on its device."""
        return Table(like_H.new_zeros(self.count, len(like_H)), torch.zeros_like(like_H))

    def add_to(self, sums: Table, weight_HD: Tensor, bias_H: Tensor) -> None:
        """Add what chunks have added up, Dᵀ S and Dᵀ 1, to a weight's and a bias's result."""
        bias_H += sums.bias_H
        weight_DH = sums.weight_DH
        if self.background:
            weight_DH = torch.add(weight_DH, sums.bias_H, alpha=self.background)
        weight_HD += weight_DH.t()


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

    def valued_as_in(self, matrix: Tensor) -> Entries:
        """The entries at the same places of another matrix."""
        total = self.starts.new_tensor([len(self.values)])
        counts = torch.diff(torch.cat([self.starts, total]))
        rows = torch.repeat_interleave(torch.arange(len(matrix), device=counts.device), counts)
        return Entries(self.columns, matrix[rows, self.columns.long()], self.starts)

    def times(self, table: Tensor) -> Tensor:
        """The product of the matrix with a table of as many rows as it has columns."""
        # Other strides, also that of a single column, cost three to twenty times as much.
        rows = table.contiguous().view(-1).view(table.shape)
        # The checks of `functional.embedding_bag` take as long as a small product.
        return torch.embedding_bag(
            rows, self.columns, self.starts, mode=_SUM, per_sample_weights=self.values
        )[0]


@dataclass(frozen=True)
class Chunk:
    """Some rows: the often columns of S dense, the non-zeros of the others listed both ways.

    Attributes:
        often_nO: The dense columns.
        often_O: Which they are, ascending; all if None.
        by_example: The non-zeros of the others, and
        by_column: the same by columns, those without any included.
    """

    often_nO: Tensor
    often_O: Tensor | None = None
    by_example: Entries | None = None
    by_column: Entries | None = None

    @property
    def count(self) -> int:
        """How many rows, n."""
        return len(self.often_nO)

    def times(self, table: Table) -> Tensor:
        """X Vᵀ + u, of shape (n, H)."""
        often_OH = table.weight_DH if self.often_O is None else table.weight_DH[self.often_O]
        product_nH = narrow.product(self.often_nO, often_OH, table.bias_H)
        if self.by_example is not None:
            product_nH += self.by_example.times(table.weight_DH)
        return product_nH

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """Add this chunk's part of Dᵀ S and Dᵀ 1."""
        sums.bias_H.add_(d_nH.sum(0))
        if self.often_O is None:
            narrow.add_outer(sums.weight_DH, self.often_nO, d_nH)
        else:
            often_OH = d_nH.new_zeros(len(self.often_O), d_nH.shape[1])
            narrow.add_outer(often_OH, self.often_nO, d_nH)
            sums.weight_DH.index_add_(0, self.often_O, often_OH)
        if self.by_column is not None:
            sums.weight_DH.add_(self.by_column.times(d_nH))


@dataclass(frozen=True)
class Chunks:
    """Chunks one after the other, taken as one."""

    members: Sequence[Chunk]

    @property
    def count(self) -> int:
        """How many rows in all."""
        return sum(chunk.count for chunk in self.members)

    def times(self, table: Table) -> Tensor:
        """See `Chunk`."""
        return torch.cat([chunk.times(table) for chunk in self.members])

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """See `Chunk`."""
        parts = d_nH.split([chunk.count for chunk in self.members])
        for chunk, part_nH in zip(self.members, parts, strict=True):
            chunk.add_under(part_nH, sums)


@dataclass(frozen=True)
class Inputs:
    """All rows of X, in chunks of which only the last may be smaller.

    Attributes:
        columns: How their columns are taken.
        chunks: The rows.
        order_N: Where the rows of the chunks, one after the other, stand in X; as there if None.
    """

    columns: Columns
    chunks: Sequence[Chunk]
    order_N: Tensor | None = None

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What belongs to the rows of X, such as their labels, in the same chunks."""
        sizes = [chunk.count for chunk in self.chunks]
        if self.order_N is None:
            return torch.split(rows, sizes)
        return tuple(rows[members_n] for members_n in torch.split(self.order_N, sizes))

    def together(self, widest: int, threads: int) -> list[Chunk | Chunks]:
        """The chunks put together for a network so narrow that calls take longer than arithmetic.

        Args:
            widest: The units of its widest layer above the inputs.
            threads: Among how many the chunks are shared out evenly.
        """
        groups = threads * -(-len(self.chunks) // (threads * max(1, _TOGETHER // widest)))
        size = -(-len(self.chunks) // groups)
        if size == 1:
            return list(self.chunks)
        return [Chunks(self.chunks[i : i + size]) for i in range(0, len(self.chunks), size)]


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
        off_N = torch.cat([(x_nD != background).sum(1) for x_nD in x_ND.split(chunk)])
        if float(off_N.sum()) < SPARSE_BELOW * x_ND.numel():
            key_N = off_N if labels_N is None else labels_N * (x_ND.shape[1] + 1) + off_N
            order_N = torch.argsort(key_N, stable=True)
            listed = partial(_listed, x_ND, background)
            each = runtime.own_threads(threads).map if threads > 1 else map
            chunks = list(each(listed, order_N.split(chunk)))
            return Inputs(Columns(x_ND.shape[1], background, listed=True), chunks, order_N)
    return Inputs(Columns(x_ND.shape[1]), [Chunk(x_nD) for x_nD in x_ND.split(chunk)])


def _listed(x_ND: Tensor, background: float, members_n: Tensor) -> Chunk:
    """A chunk of some rows by its often columns and the non-zeros of the others."""
    x_nD = x_ND[members_n]
    s_nD = x_nD - background
    often_D = (x_nD != background).sum(0) >= SELDOM * len(x_nD)
    often_O = torch.nonzero(often_D)[:, 0]
    often_nO = s_nD[:, often_O]
    s_nD[:, often_O] = 0
    return Chunk(often_nO, often_O, Entries.of(s_nD), Entries.of(s_nD.t().contiguous()))
