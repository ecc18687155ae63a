"""What a curvature operator is, and the reference one: double automatic differentiation.

A curvature operator is a symmetric matrix that is never formed: a function v -> Hv and its
dimension. `AutodiffHessian` is the Hessian of a mean loss by Pearlmutter's identity

    H v = ∇_θ ⟨∇_θ L(θ), v⟩,

exact to round-off. The inner gradient and its graph do not depend on v, so they are built once
and only the outer differentiation is repeated: a product then costs about half of what
differentiating twice from scratch does, for the memory of one retained graph.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
(1994) 147-160.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from spectra.errors import NonFiniteError

MatVec = Callable[[Tensor], Tensor]
"""`v_P -> (Hv)_P`: symmetric, linear and deterministic."""


class Hessian(Protocol):
    """A mean loss at a point θ, with its gradient and its curvature as products.

    Attributes:
        dim: P.
        loss: The mean loss at θ.
        gradient_P: Its gradient.
        products: How many products have been computed.
    """

    dim: int
    loss: float
    gradient_P: Tensor
    products: int

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv, of v's shape (P,)."""


def check_finite(hessian: Hessian) -> None:
    """Refuse a point at which there is nothing to differentiate.

    Raises:
        NonFiniteError: The loss or its gradient is NaN or infinite.
    """
    if not (math.isfinite(hessian.loss) and torch.isfinite(hessian.gradient_P).all()):
        raise NonFiniteError(
            "the loss or its gradient is not finite at these weights; their scale is too "
            "large for the dtype, try runtime.dtype: float64"
        )


LossSum = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(θ_P, inputs, targets) -> scalar`: a loss summed over the examples of a chunk."""


class AutodiffHessian:
    """The Hessian of a mean loss at θ_P, as products.

    Args:
        loss_sum: The loss of a chunk, summed over its examples, so that a ragged last chunk
            has its right weight.
        theta_P: Where the Hessian is taken.
        chunks: (inputs, targets) pairs that together are the data; kept, so they must fit.

    Attributes:
        dim: P.
        examples: N, over which the loss is averaged.
        products: How many products have been computed.
        loss: L(θ), the mean loss.
        gradient_P: ∇L(θ).

    Raises:
        ValueError: There are no examples.
        NonFiniteError: The loss or its gradient is NaN or infinite at θ.
    """

    def __init__(
        self, loss_sum: LossSum, theta_P: Tensor, chunks: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        self._theta_P = theta_P.detach().clone().requires_grad_()
        self.dim = self._theta_P.numel()
        self.examples = 0
        self.products = 0
        self._gradients: list[Tensor] = []
        total = 0.0
        for inputs, targets in chunks:
            value = loss_sum(self._theta_P, inputs, targets)
            # autograd.grad, unlike backward(create_graph=True), leaves no reference cycle.
            (gradient_P,) = torch.autograd.grad(value, self._theta_P, create_graph=True)
            self._gradients.append(gradient_P)
            self.examples += len(targets)
            total += float(value.detach())
        if self.examples == 0:
            raise ValueError("a Hessian of a mean loss needs at least one example, got none")
        self.loss = total / self.examples
        self.gradient_P = torch.stack(self._gradients).detach().sum(0) / self.examples
        check_finite(self)

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv, of v's shape (P,), dtype and device."""
        self.products += 1
        result_P = torch.zeros_like(v_P)
        for gradient_P in self._gradients:
            (part_P,) = torch.autograd.grad(
                gradient_P, self._theta_P, grad_outputs=v_P, retain_graph=True
            )
            result_P += part_P
        return result_P / self.examples
