"""The difference parts of a network with equal units: what they do against each other.

For a class of m equal units in layer i, with x the change of a unit's weights and bias and y that
of the weights leaving it, the Hessian on vectors α ⊗ (x, y) with Σ α = 0 is

    [ H̃ᵀ diag(b) H̃    H̃ᵀ diag(s) Δ ]        H̃ = (h_{i−1}, 1),  Δ = δ_{i+1},
    [ Δᵀ diag(s) H̃          0       ]        s = φ'(a_i),  b = φ''(a_i) ∘ e_i of one unit,

for what units do against each other cancels in everything above them, to first order. All its
classes' matrices in a layer are one operator, block diagonal; each eigenvector of a block stands
for m − 1 copies in the space of all parameters, one for each of Helmert's contrasts α.

Letters: P parameters, p of a layer's differences, G classes of two or more units, F inputs of a
layer, Y units of the next, n examples of a chunk, B vectors of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spectra import narrow
from spectra.chunks import Chunk, Rows, Table
from spectra.curvature.equal_units import Quotient
from spectra.curvature.mlp_operator import MlpHessian, summed
from spectra.inputs import Columns


class Differences:
    """The difference parts of one layer's classes, block diagonal: `v -> Dv`.

    Args:
        hessian: That of the quotient network, for what it has cached.
        quotient: The classes.
        layer: Hidden layer, from 0.

    Attributes:
        classes_G: The classes of two or more units.
        counts: How many units they have.
        dim: G (F + 1 + Y).
    """

    def __init__(self, hessian: MlpHessian, quotient: Quotient, layer: int) -> None:
        self._layer, self._quotient = layer, quotient
        below, own, above = quotient.layers[layer : layer + 3]
        self.classes_G = torch.nonzero(own.counts_G > 1)[:, 0]
        counts_G = own.counts_G[self.classes_G]
        self.counts = [int(count) for count in counts_G]
        self._scale_F = below.counts_G.sqrt()
        self._sizes = (len(below.counts_G), 1, len(above.counts_G))
        self.dim = len(self.classes_G) * sum(self._sizes)
        self._columns = Columns(len(below.counts_G)) if layer else hessian.columns
        self._of_each = hessian.of_each
        self._shares = [
            [
                _Part(
                    Chunk(cached.hidden[layer - 1]) if layer else cached.inputs,
                    cached.slopes[layer][:, self.classes_G],
                    cached.bends[layer][:, self.classes_G] / counts_G,
                    cached.deltas[layer] * above.counts_G.rsqrt(),
                )
                for cached in share
            ]
            for share in hessian.shares
        ]

    def split(self, v_Bp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X (B, G, F), the biases' changes (B, G) and y (B, G, Y) of B vectors."""
        blocks_BGx = v_Bp.view(len(v_Bp), len(self.classes_G), -1)
        x_BGF, u_BG1, y_BGY = blocks_BGx.split(self._sizes, dim=2)
        return x_BGF, u_BG1[:, :, 0], y_BGY

    def __call__(self, v_p: Tensor) -> Tensor:
        """The product Dv, of v's shape (p,); or those of a block of vectors (B, p)."""
        return self.block(v_p) if v_p.ndim == 2 else self.block(v_p[None])[0]

    def block(self, v_Bp: Tensor) -> Tensor:
        """The products of B vectors (B, p): their first layers are taken as one."""
        return summed(self._of_each(partial(self._share, v_Bp), self._shares))

    @torch.no_grad()
    def _share(self, v_Bp: Tensor, parts: Sequence[_Part]) -> Tensor:
        """The part of B products that some chunks contribute."""
        result_Bp = torch.zeros_like(v_Bp)
        x_BGF, u_BG, y_BGY = self.split(v_Bp)
        rx_BGF, ru_BG, ry_BGY = self.split(result_Bp)
        table = self._columns.table((x_BGF * self._scale_F).flatten(0, 1), u_BG.flatten())
        sums = self._columns.empty(table.bias)
        for below, slopes_nG, bends_nG, deltas_nY in parts:
            signals: list[Tensor] = []
            ra = below.times(table).chunk(len(v_Bp), dim=1)
            for ra_nG, y_GY, ry_GY in zip(ra, y_BGY, ry_BGY, strict=True):
                narrow.add_outer(ry_GY, slopes_nG * ra_nG, deltas_nY)
                y_nG = narrow.product(deltas_nY, y_GY.t())
                signals.append(slopes_nG * y_nG + bends_nG * ra_nG)
            below.add_under(torch.cat(signals, dim=1), sums)
        firsts = sums.rows_EH.chunk(len(v_Bp), dim=1)
        for first_EG, rx_GF, ru_G in zip(firsts, rx_BGF, ru_BG, strict=True):
            self._columns.add_to(Table(first_EG), rx_GF, ru_G)
        rx_BGF *= self._scale_F
        return result_Bp

    def lift(self, x_F1Y: Tensor, index: int, copy: int) -> Tensor:
        """Copy 0..m−2 of the eigenvector of the class with that index, for all parameters."""
        x_F1Y = x_F1Y.to(self._scale_F)
        below, own, above = self._quotient.layers[self._layer : self._layer + 3]
        units = torch.nonzero(own.of_unit_H == self.classes_G[index])[:, 0][: copy + 2]
        alpha = x_F1Y.new_ones(copy + 2)
        alpha[-1] = -(copy + 1)
        alpha /= math.sqrt((copy + 1) * (copy + 2))
        x_F, u, y_Y = x_F1Y.split(self._sizes)
        whole = self._quotient.whole
        result_P = x_F1Y.new_zeros(whole.dim)
        tensors = list(whole.split(result_P).values())
        weight, bias, leaving = tensors[2 * self._layer : 2 * self._layer + 3]
        weight[units] = torch.outer(alpha, (x_F / self._scale_F)[below.of_unit_H])
        bias[units] = alpha * u
        leaving[:, units] = torch.outer((y_Y * above.counts_G.rsqrt())[above.of_unit_H], alpha)
        return result_P


class _Part(NamedTuple):
    """Of a chunk: what the layer is given, s and b of its classes, Δ of the next layer's."""

    below: Rows
    slopes_nG: Tensor
    bends_nG: Tensor
    deltas_nY: Tensor
