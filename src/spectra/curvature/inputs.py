"""Products with the data matrix X of a network's first layer, dense or sparse.

Four fifths of the pixels of a handwritten digit are background. With S = X − c the difference
to that background value c, a product with X is one with the sparse S and a correction of rank
one,

    X Vᵀ = S Vᵀ + c 1 (V 1)ᵀ,        Dᵀ X = Dᵀ S + c (Dᵀ 1) 1ᵀ,

exact, not an approximation. On a CPU both products are sums of rows of a small table, one for
each non-zero, which `embedding_bag` does at several times the speed of the dense product as
long as the table stays in the cache: hence the chunks of examples, each with its non-zeros
listed by example and by input. Inputs that are constant over a chunk cost nothing. On a GPU the
dense product wins.

Letters: n examples of a chunk, D inputs, H units of the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

SPARSE_BELOW = 0.4
"""Share of entries off the background below which the sparse products are faster."""


class Inputs(Protocol):
    """A chunk X (n, D) of the data, known by its products."""

    def times(self, v_HD: Tensor) -> Tensor:
        """The product X Vᵀ, of shape (n, H)."""

    def under(self, d_nH: Tensor) -> Tensor:
        """The product Dᵀ X, of shape (H, D)."""


@dataclass(frozen=True)
class DenseInputs:
    """X as it is."""

    x_nD: Tensor

    def times(self, v_HD: Tensor) -> Tensor:
        """See `Inputs`."""
        return self.x_nD @ v_HD.t()

    def under(self, d_nH: Tensor) -> Tensor:
        """See `Inputs`."""
        return d_nH.t() @ self.x_nD


@dataclass(frozen=True)
class _Lists:
    """The non-zeros of a matrix row by row: columns, values, and where each row begins."""

    columns: Tensor
    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Lists:
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
class SparseInputs:
    """X as a background value and the non-zeros of the rest, listed both ways."""

    by_example: _Lists
    by_input: _Lists
    background: float

    @classmethod
    def of(cls, x_nD: Tensor, background: float) -> SparseInputs:
        """Split a chunk into its background and the rest."""
        rest_nD = x_nD - background
        rest_nD[x_nD == background] = 0
        return cls(_Lists.of(rest_nD), _Lists.of(rest_nD.t().contiguous()), background)

    def times(self, v_HD: Tensor) -> Tensor:
        """See `Inputs`."""
        product_nH = self.by_example.times(v_HD.t().contiguous())
        return product_nH.add_(v_HD.sum(1), alpha=self.background)

    def under(self, d_nH: Tensor) -> Tensor:
        """See `Inputs`."""
        product_DH = self.by_input.times(d_nH)
        return product_DH.add_(d_nH.sum(0), alpha=self.background).t()


def inputs_of(x_ND: Tensor, chunk: int) -> list[Inputs]:
    """The data in chunks, sparse where that is faster: on a CPU, with a common background."""
    background = float(x_ND.min())
    share = float((x_ND != background).float().mean())
    if x_ND.device.type == "cpu" and share < SPARSE_BELOW:
        return [SparseInputs.of(x_nD, background) for x_nD in x_ND.split(chunk)]
    return [DenseInputs(x_nD) for x_nD in x_ND.split(chunk)]
