"""A pass of an optimiser over the data: the parameters of networks in training, step by step.

On a GPU every operation of a step is done for all networks of a stack at once, which is what keeps
it busy at batch 64. A CPU is busy with one, and takes their passes in turn. There is one step,
written for a network and for a stack.

Letters: M networks, P parameters, N examples, n of some batches, B of a batch, C classes. Shapes in
a step are those of a network; a stack's have M in front.

Source: D. P. Kingma, J. Ba, Adam: a method for stochastic optimization (ICLR 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spectra.backprop import Layers, write_gradients
from spectra.minibatches import Batch, Rows
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.streams import Aside, Graph

_PIECES = 36
"""Tensors that one launch of PyTorch's fused Adam takes on a GPU."""
_TOGETHER = 8
"""Steps of a GPU's graph: the start of one costs as much as two of their kernels."""


@dataclass(frozen=True)
class Optimisation:
    """How to descend and when to stop; the fields are those of the `train` parameters.

    `threads` are those of a step and of an evaluation. At batch 64 a second one gains little on an
    idle machine and costs a factor of ten where another program wants the core: every one of the
    small operations of a step then waits for a thread that is not running.
    """

    optimizer: str = "adam"
    lr: float = 0.0015
    momentum: float = 0.9
    batch_size: int = 64
    max_epochs: int = 50
    patience: int = 5
    monitor: str = "objective"
    threads: int = 1


class Descent(Protocol):
    """Networks in training."""

    def parameters(self) -> Tensor:
        """θ of all, (M, P)."""

    def one_pass(self, orders: Sequence[Tensor]) -> None:
        """A step for every batch of each member's order of the examples."""

    def only(self, stay: Sequence[int]) -> Descent:
        """Some members only; the others are gone."""


def descent_of(
    mlp: Mlp,
    theta_MP: Tensor,
    rows: Rows,
    labels_N: Tensor,
    penalties: Sequence[L2Penalty],
    how: Optimisation,
) -> Descent:
    """Networks at the start of their training.

    Args:
        mlp: Their architecture.
        theta_MP: Where they start; not changed.
        rows: The inputs that all learn from.
        labels_N: Their labels.
        penalties: A member's penalty each; the reference points, if any, are the same.
        how: The optimiser.
    """
    kind = _Together if theta_MP.is_cuda else _InTurn
    return kind(mlp, theta_MP, rows, labels_N, penalties, how)


class _InTurn:
    """Networks in training one after the other."""

    def __init__(
        self,
        mlp: Mlp,
        theta_MP: Tensor,
        rows: Rows,
        labels_N: Tensor,
        penalties: Sequence[L2Penalty],
        how: Optimisation,
    ) -> None:
        self._alone = [
            _Descent(mlp, theta_P, rows, labels_N, penalty.shift, penalty.reference_P, how)
            for theta_P, penalty in zip(theta_MP, penalties, strict=True)
        ]

    def parameters(self) -> Tensor:
        """θ of all, (M, P)."""
        return torch.stack([descent.parameters() for descent in self._alone])

    def only(self, stay: Sequence[int]) -> _InTurn:
        """Some members only."""
        self._alone = [self._alone[i] for i in stay]
        return self

    def one_pass(self, orders: Sequence[Tensor]) -> None:
        """A step for every batch of each member's order of the examples."""
        for descent, order_N in zip(self._alone, orders, strict=True):
            descent.one_pass(order_N)


class _Together:
    """Networks in training, every operation for all of them at once."""

    def __init__(
        self,
        mlp: Mlp,
        theta_MP: Tensor,
        rows: Rows,
        labels_N: Tensor,
        penalties: Sequence[L2Penalty],
        how: Optimisation,
    ) -> None:
        self._mlp, self._rows, self._labels_N = mlp, rows, labels_N
        self._penalties, self._how = penalties, how
        shifts = [penalty.shift for penalty in penalties]
        alike = len(set(shifts)) == 1
        shift = shifts[0] if alike else theta_MP.new_tensor(shifts)[:, None]
        reference_P = penalties[0].reference_P
        self._descent = _Descent(mlp, theta_MP, rows, labels_N, shift, reference_P, how)

    def parameters(self) -> Tensor:
        """θ of all, (M, P)."""
        return self._descent.parameters()

    def only(self, stay: Sequence[int]) -> _Together:
        """Some members only."""
        penalties = [self._penalties[i] for i in stay]
        rest = _Together(
            self._mlp, self.parameters()[stay], self._rows, self._labels_N, penalties, self._how
        )
        rest._descent.go_on_from(self._descent, stay)
        return rest

    def one_pass(self, orders: Sequence[Tensor]) -> None:
        """A step for every batch of each member's order of the examples."""
        self._descent.one_pass(torch.stack(list(orders)))


class _Descent:
    """The parameters of a network or a stack in training, with gradients and moments.

    PyTorch's fused optimiser kernels are called directly: at batch 64 the optimiser objects
    around them take longer than the kernels. Where all members have one strength, the penalty is
    the kernels' `weight_decay`, which adds the same 2c θ without another pass over memory.

    On a GPU some steps are captured once as a graph and replayed: nothing is launched one by one
    and the host is asked nothing until the epoch is over. What only the optimiser waits for, such
    as the gradients of a layer, is computed beside the signals that go on down. The optimiser is
    given the parameters in pieces: it has one block of threads for each 65,536 entries of a
    tensor, two for a whole small network.

    Args:
        mlp: The architecture.
        theta_P: Where to start.
        rows: The inputs.
        labels_N: Their labels.
        shift: 2c, or for a stack (M, 1) where its members' are different.
        reference_P: What the penalty pulls towards, if not zero.
        how: The optimiser.
    """

    def __init__(
        self,
        mlp: Mlp,
        theta_P: Tensor,
        rows: Rows,
        labels_N: Tensor,
        shift: float | Tensor,
        reference_P: Tensor | None,
        how: Optimisation,
    ) -> None:
        self._how, self._rows, self._hidden = how, rows, mlp.widths[1]
        self._shift = shift
        self._theta_P = self._rows.placed(theta_P.detach(), self._hidden)
        self._gradient_P = torch.zeros_like(self._theta_P)
        self._moments = [torch.zeros_like(self._theta_P) for _ in range(2)]
        self._steps = torch.zeros((), device=theta_P.device)
        # Adding one by way of NumPy takes a tenth of the time.
        self._count = partial(self._steps.add_, 1)
        if not theta_P.is_cuda:
            self._count = partial(np.add, self._steps.numpy(), 1, out=self._steps.numpy())
        self._pieces = [
            self._divided(tensor) for tensor in (self._theta_P, self._gradient_P, *self._moments)
        ]
        self._pull: list[Tensor] = []
        if reference_P is not None:
            pull_P = -shift * self._rows.placed(reference_P, self._hidden)
            self._pull = self._divided(pull_P.expand_as(self._theta_P).contiguous())
        # The first layer may lie otherwise in these: it is left to `_first`.
        self._layers, self._gradients = Layers(mlp, self._theta_P), Layers(mlp, self._gradient_P)
        self._first = self._rows.first_layer(
            mlp, self._theta_P, self._gradient_P, self._pieces[1],
            self._layers.onehot(labels_N),
        )  # fmt: skip
        self._graph: Graph[None] | None = None
        self._aside = Aside(theta_P.device)

    def parameters(self) -> Tensor:
        """θ, (P,) or for a stack (M, P)."""
        return self._rows.restored(self._theta_P, self._hidden)

    def go_on_from(self, other: _Descent, stay: Sequence[int]) -> None:
        """Take over the moments of some members of a stack, and its number of steps."""
        for held_MP, moment_MP in zip(self._moments, other._moments, strict=True):
            held_MP.copy_(moment_MP[stay])
        self._steps.copy_(other._steps)

    @torch.inference_mode()
    def one_pass(self, order_N: Tensor) -> None:
        """A step for every batch of an order of the examples."""
        if not self._theta_P.is_cuda:
            self._steps_of(order_N)
            return
        together = _TOGETHER * self._how.batch_size
        for order_n in order_N.to(self._theta_P.device).split(together, dim=-1):
            if order_n.shape[-1] == together:
                self._replay(order_n)
            else:
                self._steps_of(order_n)

    def _divided(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of all parameters in the pieces that the optimiser is given.

        On a GPU they are as many as one launch of its kernel can share out, and begin at multiples
        of four, where a thread can read four floats at once.
        """
        if not tensor.is_cuda:
            return self._rows.pieces(tensor, self._hidden)
        return list(tensor.view(-1).split(4 * math.ceil(tensor.numel() / (4 * _PIECES))))

    def _steps_of(self, order_n: Tensor) -> None:
        for batch in self._first.batches(order_n, self._how.batch_size):
            self._step(batch)

    def _replay(self, order_n: Tensor) -> None:
        if self._graph is None:
            self._graph = Graph(
                self._steps_of, order_n, urgent=True,
                unchanged=[self._theta_P, self._steps, *self._moments],
            )  # fmt: skip
        self._graph.replay(order_n)

    def _step(self, batch: Batch) -> None:
        """A step of the optimiser on L_eff of one batch a member."""
        how = self._how
        self._aside.do(self._count)
        self._differentiate(batch)
        if self._pull:
            torch._foreach_add_(self._pieces[1], self._pull)
        decay = self._shift
        if isinstance(decay, Tensor):
            self._gradient_P.addcmul_(self._theta_P, decay)
            decay = 0.0
        theta, gradient, first, second = self._pieces
        if how.optimizer == "adam":
            torch._fused_adam_(
                theta, gradient, first, second, [], [self._steps] * len(theta),
                lr=how.lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            torch._fused_sgd_(
                theta, gradient, first if how.momentum else [],
                weight_decay=decay, momentum=how.momentum, lr=how.lr, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip

    def _differentiate(self, batch: Batch) -> None:
        """Write the gradients of the mean cross-entropy of one batch a member."""
        layers = self._layers
        onehot_BC = self._aside.do(batch.onehot)
        forward = layers.forward(batch.up())
        self._aside.join()
        delta_BC = layers.loss_signal(forward.scores_CN, onehot_BC, onehot_BC.shape[-2])
        for layer, delta_BH, _ in layers.signals(forward, delta_BC):
            if layer:
                below_BI = forward.hidden[layer - 1]
                self._aside.do(partial(write_gradients, self._gradients, layer, delta_BH, below_BI))
            else:
                batch.down(delta_BH)
        self._aside.join()
