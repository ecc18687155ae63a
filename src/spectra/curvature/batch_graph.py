"""What the products of a curvature matrix need of one batch, as graphs of autograd.

For the Hessian it is the gradient with the graph that made it, to be differentiated again. For
the Gauss-Newton matrix Jᵀ (∇²_z S) J it is three: of the output z, of the gradient ∇_z S, and
of Jᵀu, whose derivative after u gives J: reverse mode alone, which every operation has, where
forward mode is missing from some.

Letters: P parameters, B vectors of a block.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from spectra.curvature.batch_loss import BatchLoss
from spectra.curvature.batches import Batch
from spectra.curvature.point import Point
from spectra.errors import UsageError


class Graph(Protocol):
    """The sum S of the losses of a batch.

    Attributes:
        total: S.
        divisor: What S is divided by to make a mean.
        gradient_P: ∇S.
        broken: Whether an operation on the way to ∇S forbids to be differentiated again, upon
            which PyTorch leaves its part out without a word.
    """

    total: float
    divisor: float
    gradient_P: Tensor

    @property
    def broken(self) -> bool: ...  # noqa: D102 - see above

    def products(self, v_BP: Tensor, *, batched: bool) -> Tensor:
        """The matrix of S applied to B vectors, together or one after the other."""


class HessianGraph:
    """∇S of a batch, ready to be differentiated again."""

    def __init__(self, point: Point, loss: BatchLoss, batch: Batch) -> None:
        value, self.divisor = loss(point(batch[0]), batch)
        self.total = float(value.detach())
        self._theta_P = point.theta_P
        # autograd.grad, unlike backward(create_graph=True), leaves no reference cycle.
        (self._gradient_P,) = torch.autograd.grad(value, self._theta_P, create_graph=True)
        self.gradient_P = self._gradient_P.detach()

    @property
    def broken(self) -> bool:
        """See `Graph`."""
        return _broken(self._gradient_P)

    def products(self, v_BP: Tensor, *, batched: bool) -> Tensor:
        """See `Graph`."""
        return _pull(self._gradient_P, self._theta_P, v_BP, batched)


class GaussNewtonGraph:
    """z(θ), Jᵀu and ∇_z S of a batch, each ready to be differentiated."""

    def __init__(self, point: Point, loss: BatchLoss, batch: Batch) -> None:
        self._theta_P = point.theta_P
        self._z = point(batch[0])
        if not isinstance(self._z, Tensor):
            raise UsageError(
                f"the network returns a {type(self._z).__name__}; the Gauss-Newton matrix needs "
                "one tensor"
            )
        self._output = self._z.detach().requires_grad_()
        value, self.divisor = loss(self._output, batch)
        self.total = float(value.detach())
        (self._slope,) = torch.autograd.grad(value, self._output, create_graph=True)
        self._u = torch.zeros_like(self._output, requires_grad=True)
        (self._pulled_P,) = torch.autograd.grad(self._z, self._theta_P, self._u, create_graph=True)
        self.gradient_P = _pull(self._z, self._theta_P, self._slope.detach()[None], False)[0]

    @property
    def broken(self) -> bool:
        """See `Graph`."""
        return _broken(self._pulled_P, self._slope)

    def products(self, v_BP: Tensor, *, batched: bool) -> Tensor:
        """See `Graph`."""
        jv_B = _pull(self._pulled_P, self._u, v_BP, batched)
        curved_B = _pull(self._slope, self._output, jv_B, batched)
        return _pull(self._z, self._theta_P, curved_B, batched)


def _broken(*outputs: Tensor) -> bool:
    """Whether the graph behind some tensors holds the node that `once_differentiable` leaves."""
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return False


def _pull(outputs: Tensor, inputs: Tensor, rows_B: Tensor, batched: bool) -> Tensor:
    """∂outputs/∂inputs applied from the left to each of B rows; zero where nothing depends."""
    zero = torch.zeros_like(inputs, requires_grad=False)
    if not outputs.requires_grad:
        return zero.expand(len(rows_B), *zero.shape)
    if batched:
        (part_B,) = torch.autograd.grad(
            outputs, inputs, rows_B, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return zero.expand(len(rows_B), *zero.shape) if part_B is None else part_B
    parts = [
        torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)[0]
        for row in rows_B
    ]
    return torch.stack([zero if part is None else part for part in parts])
