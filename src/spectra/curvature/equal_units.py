"""Hidden units that have become equal, and the smaller network that computes the same.

Under L2 regularisation the hidden units of a trained network coalesce: from some strength on a
layer of 128 consists of a few classes of units whose weights, in and out, are the same.
Exchanging units of a class leaves the network and its loss unchanged, so the Hessian commutes
with those permutations and splits exactly (Schur) into

- the symmetric part, on vectors that are equal across each class: the Hessian of the quotient
  network, in which a class of m units is one unit that counts m times, and
- for each class of m units a difference part, on vectors α ⊗ x with Σ α = 0 over the class: one
  small matrix whose every eigenvalue occurs m − 1 times.

Everything else is zero. This file finds the classes and maps between the two networks; what is
computed with them is in `reduction`.

With unit vectors as coordinates of the symmetric part, a weight between classes of m and m'
units is z/√(m m') in each of its m m' copies. In the quotient network it enters as z √(m'/m),
m' being on the side of the inputs: the diagonal `scale_p`.

Letters: P parameters, p of the quotient network, H units of a layer, G classes of them.

Source: J.-P. Serre, Linear Representations of Finite Groups (Springer, 1977), ch. 2; M. Golubitsky,
I. Stewart, D. Schaeffer, Singularities and Groups in Bifurcation Theory II (Springer, 1988),
ch. XII on the block structure of equivariant linear maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spectra.mlp import Mlp

ROUND_OFF = 16
"""Multiples of eps within which units are equal in any case; see `quotient`."""


@dataclass(frozen=True)
class Classes:
    """The classes of a layer's units: the class of each unit, and how many units each has."""

    of_unit_H: Tensor
    counts_G: Tensor

    @classmethod
    def apart(cls, units: int, like: Tensor) -> Classes:
        """Every unit in a class of its own."""
        every_H = torch.arange(units, device=like.device)
        return cls(every_H, like.new_ones(units))


@dataclass(frozen=True)
class Quotient:
    """A network whose equal units are merged.

    Attributes:
        whole: The network as it is.
        layers: Classes by layer, those of the inputs first and of the scores last; both apart.
    """

    whole: Mlp
    layers: Sequence[Classes]

    @cached_property
    def mlp(self) -> Mlp:
        """The quotient network's architecture."""
        widths = tuple(len(classes.counts_G) for classes in self.layers)
        return Mlp(widths, self.whole.activation)

    def merge(self, theta_P: Tensor) -> Tensor:
        """Parameters of the quotient network, which computes what the whole one does."""
        parts: list[Tensor] = []
        tensors = list(self.whole.split(theta_P).values())
        for i, (weight, bias) in enumerate(zip(tensors[0::2], tensors[1::2], strict=True)):
            below, above = self.layers[i : i + 2]
            rows = _summed(weight, above, 0) / above.counts_G[:, None]
            parts += [_summed(rows, below, 1).reshape(-1), _summed(bias, above, 0) / above.counts_G]
        return torch.cat(parts)

    @cached_property
    def scale_p(self) -> Tensor:
        """What the quotient network's parameters are of the symmetric part's coordinates."""
        parts: list[Tensor] = []
        for below, above in zip(self.layers[:-1], self.layers[1:], strict=True):
            share = above.counts_G.rsqrt()
            parts += [torch.outer(share, below.counts_G.sqrt()).reshape(-1), share]
        return torch.cat(parts)

    def lift(self, z_p: Tensor) -> Tensor:
        """A vector of the symmetric part in the space of all parameters, of the same length."""
        parts: list[Tensor] = []
        tensors = list(self.mlp.split(z_p).values())
        for i, (weight, bias) in enumerate(zip(tensors[0::2], tensors[1::2], strict=True)):
            below, above = self.layers[i : i + 2]
            share = above.counts_G.rsqrt()
            spread = weight * torch.outer(share, below.counts_G.rsqrt())
            parts += [
                spread[above.of_unit_H][:, below.of_unit_H].reshape(-1),
                (bias * share)[above.of_unit_H],
            ]
        return torch.cat(parts)


def quotient(mlp: Mlp, theta_P: Tensor, within: float = 0.0) -> Quotient:
    """Find the equal units of every hidden layer.

    Args:
        mlp: The network.
        theta_P: Its parameters.
        within: Distance between the weights of units that count as equal, relative to the
            weights of the unit or to 1, whichever is larger: weights far below 1 move
            pre-activations, which are of order 1, by no more. Never below round-off.
    """
    tensors = list(mlp.split(theta_P).values())
    layers = [Classes.apart(mlp.widths[0], theta_P)]
    for i in range(mlp.layers - 1):
        weight, bias, leaving = tensors[2 * i : 2 * i + 3]
        layers.append(_classes(torch.cat([weight, bias[:, None], leaving.t()], dim=1), within))
    return Quotient(mlp, [*layers, Classes.apart(mlp.widths[-1], theta_P)])


def _classes(units_HF: Tensor, within: float) -> Classes:
    """Group units by all their weights, each class around its first unit."""
    within = max(within, ROUND_OFF * torch.finfo(units_HF.dtype).eps)
    limit_H = within * units_HF.norm(dim=1).clamp(min=1)
    apart_HH = torch.cdist(units_HF, units_HF, compute_mode="donot_use_mm_for_euclid_dist")
    equal_HH = (apart_HH <= limit_H[:, None]).cpu()
    of_unit_H = torch.full((len(units_HF),), -1)
    count = 0
    for unit in range(len(units_HF)):
        if of_unit_H[unit] < 0:
            of_unit_H[equal_HH[unit] & (of_unit_H < 0)] = count
            of_unit_H[unit] = count
            count += 1
    counts_G = torch.bincount(of_unit_H, minlength=count)
    return Classes(of_unit_H.to(units_HF.device), counts_G.to(units_HF))


def _summed(tensor: Tensor, classes: Classes, dim: int) -> Tensor:
    """Sums over the units of each class along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = len(classes.counts_G)
    return tensor.new_zeros(shape).index_add_(dim, classes.of_unit_H, tensor)
