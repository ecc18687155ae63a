"""Some examples of X, known by their products with the first layer of a network.

A chunk is taken as it is, or divided: the columns that are often off the background dense, the
non-zeros of the others listed, by example for X Vᵀ and by column for Dᵀ X. Such a product is a sum
of rows of a small table, one for each non-zero, which `embedding_bag` does faster than the dense
product.

For that the weights of the first layer lie transposed, the `Table`, laid out once a product, with
the bias as one more row; where columns are divided, the dense ones are joined by one of ones, so
that the bias costs no pass of its own.

Letters: n examples, D inputs, E = D + 1 with the bias, O of them dense in a chunk whose columns are
divided, H units of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spectra import narrow

_SUM = 0
"""The mode of `torch.embedding_bag` that adds up."""


@dataclass(frozen=True)
class Table:
    """A first layer (V, u) as products with chunks take it, or what chunks add up to.

    The bias is the last row; in the former, the background's share c V 1 is part of it.
    """

    rows_EH: Tensor

    @property
    def weight(self) -> Tensor:
        """The rows of the inputs."""
        return self.rows_EH[:-1]

    @property
    def bias(self) -> Tensor:
        """That of the bias."""
        return self.rows_EH[-1]


@dataclass(frozen=True)
class Entries:
    """The non-zeros of a matrix row by row: columns, values, and where each row begins."""

    columns: Tensor
    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Entries:
        """List a contiguous matrix on the CPU."""
        # PyTorch's own search for non-zeros takes four times as long.
        places = torch.from_numpy(np.flatnonzero(matrix.numpy() != 0))
        width = matrix.shape[1]
        starts = torch.searchsorted(places, width * torch.arange(len(matrix)), out_int32=True)
        return cls((places % width).int(), matrix.view(-1)[places], starts)

    @classmethod
    def one_after_other(cls, parts: Sequence[Entries], counts: Sequence[int] = ()) -> Entries:
        """Put matrices below each other; each has its own columns where their counts are given."""
        lengths = torch.tensor([0, *(len(part.values) for part in parts)]).cumsum(0).tolist()
        starts = [part.starts + length for part, length in zip(parts, lengths[:-1], strict=True)]
        columns = [part.columns for part in parts]
        if counts:
            before = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
            columns = [part + shift for part, shift in zip(columns, before, strict=True)]
        return cls(torch.cat(columns), torch.cat([p.values for p in parts]), torch.cat(starts))

    def valued_as_in(self, matrix: Tensor) -> Entries:
        """The entries at the same places of another matrix."""
        total = self.starts.new_tensor([len(self.values)])
        counts = torch.diff(torch.cat([self.starts, total]))
        rows = torch.repeat_interleave(torch.arange(len(matrix), device=counts.device), counts)
        return Entries(self.columns, matrix[rows, self.columns.long()], self.starts)

    def times(self, table: Tensor) -> Tensor:
        """The product of the matrix with a table of as many rows as it has columns."""
        rows = table
        if table.stride() != (table.shape[1], 1):
            # Other strides, also that of a single column, cost three to twenty times as much.
            rows = table.contiguous().view(-1).view(table.shape)
        # The checks of `functional.embedding_bag` take as long as a small product.
        return torch.embedding_bag(
            rows, self.columns, self.starts, mode=_SUM, per_sample_weights=self.values
        )[0]


class Rows(Protocol):
    """Some examples as products with a first layer take them."""

    @property
    def count(self) -> int:
        """How many, n."""
        ...

    def times(self, table: Table) -> Tensor:
        """X Vᵀ + u, of shape (n, H)."""
        ...

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """Add these examples' part of Dᵀ S and Dᵀ 1."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Some rows of X as they are."""

    x_nD: Tensor

    @property
    def count(self) -> int:
        """See `Rows`."""
        return len(self.x_nD)

    @property
    def dtype(self) -> torch.dtype:
        """That of the inputs."""
        return self.x_nD.dtype

    def times(self, table: Table) -> Tensor:
        """See `Rows`."""
        return narrow.product(self.x_nD, table.weight, table.bias)

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """See `Rows`."""
        sums.bias.add_(d_nH.sum(0))
        narrow.add_outer(sums.weight, self.x_nD, d_nH)


@dataclass(frozen=True)
class DividedChunk:
    """Some rows of S: the often columns dense, the non-zeros of the others listed both ways.

    Attributes:
        often_nO: The dense columns, and one of ones.
        often_O: Which rows of a table they go with, ascending: the last is the bias.
        by_example: The non-zeros of the other columns, and
        by_column: the same by columns, those without any included.
    """

    often_nO: Tensor
    often_O: Tensor
    by_example: Entries
    by_column: Entries

    @property
    def count(self) -> int:
        """See `Rows`."""
        return len(self.often_nO)

    @property
    def dtype(self) -> torch.dtype:
        """That of the inputs."""
        return self.often_nO.dtype

    def times(self, table: Table) -> Tensor:
        """See `Rows`."""
        product_nH = self.by_example.times(table.rows_EH)
        often_OH = table.rows_EH.index_select(0, self.often_O)
        return narrow.add_product(product_nH, self.often_nO, often_OH)

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """See `Rows`."""
        sums.rows_EH.index_add_(0, self.often_O, narrow.outer(self.often_nO, d_nH))
        sums.weight.add_(self.by_column.times(d_nH))


@dataclass(frozen=True)
class Chunks:
    """Chunks one after the other, taken as one."""

    members: Sequence[Rows]

    @property
    def count(self) -> int:
        """How many rows, n."""
        return sum(chunk.count for chunk in self.members)

    def times(self, table: Table) -> Tensor:
        """See `Rows`."""
        return torch.cat([chunk.times(table) for chunk in self.members])

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """See `Rows`."""
        parts = d_nH.split([chunk.count for chunk in self.members])
        for chunk, part_nH in zip(self.members, parts, strict=True):
            chunk.add_under(part_nH, sums)


@dataclass(frozen=True)
class DividedChunks:
    """Divided chunks one after the other, taken as one: their non-zeros are in one list.

    Attributes:
        members: The chunks, for their dense columns.
        counts: Rows of each, and
        widths: dense columns of each.
        often_O: Which rows of a table they go with, chunk after chunk.
        by_example: The non-zeros of the other columns of all chunks, and
        by_column: the same by chunk and column.
    """

    members: Sequence[DividedChunk]
    counts: Sequence[int]
    widths: Sequence[int]
    often_O: Tensor
    by_example: Entries
    by_column: Entries

    @classmethod
    def of(cls, members: Sequence[DividedChunk]) -> DividedChunks:
        """Put the non-zeros of some chunks into one list."""
        counts = [chunk.count for chunk in members]
        return cls(
            members,
            counts,
            [len(chunk.often_O) for chunk in members],
            torch.cat([chunk.often_O for chunk in members]),
            Entries.one_after_other([chunk.by_example for chunk in members]),
            Entries.one_after_other([chunk.by_column for chunk in members], counts),
        )

    @property
    def count(self) -> int:
        """See `Rows`."""
        return sum(self.counts)

    def times(self, table: Table) -> Tensor:
        """See `Rows`."""
        product_nH = self.by_example.times(table.rows_EH)
        parts = product_nH.split(self.counts)
        often = table.rows_EH.index_select(0, self.often_O).split(self.widths)
        for chunk, part_nH, often_OH in zip(self.members, parts, often, strict=True):
            narrow.add_product(part_nH, chunk.often_nO, often_OH)
        return product_nH

    def add_under(self, d_nH: Tensor, sums: Table) -> None:
        """See `Rows`."""
        parts = zip(self.members, d_nH.split(self.counts), strict=True)
        often_OH = torch.cat([narrow.outer(chunk.often_nO, part_nH) for chunk, part_nH in parts])
        sums.rows_EH.index_add_(0, self.often_O, often_OH)
        by_chunk = self.by_column.times(d_nH).unflatten(0, (len(self.members), -1))
        sums.weight.add_(by_chunk.sum(0))


def one_of(chunks: Sequence[Chunk | DividedChunk]) -> Rows:
    """Some chunks as one; all of them are of one kind."""
    divided = [chunk for chunk in chunks if isinstance(chunk, DividedChunk)]
    return DividedChunks.of(divided) if divided else Chunks(chunks)


def with_ones(s_nO: Tensor) -> Tensor:
    """Columns, and one of ones behind them."""
    return torch.cat([s_nO, s_nO.new_ones(len(s_nO), 1)], dim=1)
