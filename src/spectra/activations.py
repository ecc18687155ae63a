"""Activations φ with their first two derivatives, elementwise.

Each derivative may use both the pre-activation a and the value h = φ(a): whichever is cheaper.
ReLU's second derivative is zero everywhere, its first is 0 at 0, as in automatic
differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """φ, φ'(a, h), φ''(a, h) and e, a, h -> e φ'(a), each keeping the shape of its arguments.

    The last is what back-propagation needs; PyTorch has it in one pass over memory.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]


def _normal_density(a: Tensor) -> Tensor:
    return torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)


def _normal_distribution(a: Tensor) -> Tensor:
    return (1 + torch.erf(a / math.sqrt(2))) / 2


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(
        torch.sigmoid,
        lambda _a, h: h * (1 - h),
        lambda _a, h: h * (1 - h) * (1 - 2 * h),
        lambda e, _a, h: torch.ops.aten.sigmoid_backward.default(e, h),
    ),
    "tanh": Activation(
        torch.tanh,
        lambda _a, h: 1 - h * h,
        lambda _a, h: -2 * h * (1 - h * h),
        lambda e, _a, h: torch.ops.aten.tanh_backward.default(e, h),
    ),
    "relu": Activation(
        torch.relu,
        lambda _a, h: (h > 0).to(h.dtype),
        lambda _a, h: torch.zeros_like(h),
        lambda e, _a, h: torch.ops.aten.threshold_backward.default(e, h, 0),
    ),
    # The exact form x Φ(x), torch.nn.GELU's default.
    "gelu": Activation(
        functional.gelu,
        lambda a, _h: _normal_distribution(a) + a * _normal_density(a),
        lambda a, _h: _normal_density(a) * (2 - a.square()),
        lambda e, a, _h: torch.ops.aten.gelu_backward.default(e, a),
    ),
}
