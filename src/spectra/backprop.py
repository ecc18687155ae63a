"""The chain rule of an MLP, or of a stack of them, written out once.

Automatic differentiation records a graph at every step of a training loop; at batch 64 that
costs more than the arithmetic. With a_i = h_{i−1} W_iᵀ + b_i, h_i = φ(a_i), h_0 the inputs, and
p the softmax of the scores a_L:

    δ_L = (p − onehot(y)) / N,    e_i = δ_{i+1} W_{i+1},    δ_i = e_i ∘ φ'(a_i)
    ∂L/∂W_i = δ_iᵀ h_{i−1},       ∂L/∂b_i = Σ_n δ_i

A training step and the Hessian product take their signals from here; tests hold them against
automatic differentiation. What is done with the first layer's inputs is left to the caller, who
knows how they lie in memory. Scores and δ_L lie transposed, (C, N): with a few classes the
matrix products are several times faster that way round.

Shapes are written for one network; those of a stack have the number M of its networks in front.

Letters: N examples of a batch, H units of a layer, C classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spectra.activations import ACTIVATIONS
from spectra.mlp import Mlp


class Forward(NamedTuple):
    """a_1..a_{L−1} and h_1..h_{L−1} by layer, each (N, H), and the scores a_L."""

    pre: Sequence[Tensor]
    hidden: Sequence[Tensor]
    scores_CN: Tensor


class Signal(NamedTuple):
    """What reaches layer i + 1 from above: δ, and below the last layer the e it comes from."""

    layer: int
    delta_NH: Tensor
    error_NH: Tensor | None


class Layers:
    """The layers of a network as views of its parameters, read anew at every call.

    Args:
        mlp: The architecture.
        theta_P: The parameters; an optimiser may change them in place between calls. For a stack,
            (M, P).

    Attributes:
        weights: W_1..W_L, (outputs, inputs).
        biases: b_1..b_L, (outputs,).
        transposed: The weights, (inputs, outputs).
        rows: The biases, (1, outputs).
        activation: φ.
        product: The matrix product AB, of each network in a stack.
        affine: The same on top of a first argument, C + AB.
    """

    def __init__(self, mlp: Mlp, theta_P: Tensor) -> None:
        tensors = list(mlp.split(theta_P).values())
        self.weights, self.biases = tensors[0::2], tensors[1::2]
        self.activation = ACTIVATIONS[mlp.activation]
        # Views made once: in a training step at batch 64, making them again takes as long as
        # some of the products. For the same reason a lone network is not a stack of one.
        self.transposed = [weight.mT for weight in self.weights]
        self.rows = [bias.unsqueeze(-2) for bias in self.biases]
        self.product = torch.mm if theta_P.ndim == 1 else torch.bmm
        self.affine = torch.addmm if theta_P.ndim == 1 else torch.baddbmm
        self._scores_bias_C1 = self.biases[-1].unsqueeze(-1)

    def forward(self, a_NH: Tensor) -> Forward:
        """Go up from the first layer's pre-activations a_1; without hidden layers, scores."""
        last = len(self.weights) - 1
        pre: list[Tensor] = []
        hidden: list[Tensor] = []
        if not last:
            return Forward(pre, hidden, a_NH.mT)
        value = self.activation.value
        for i in range(1, last):
            h_NH = value(a_NH)
            pre.append(a_NH)
            hidden.append(h_NH)
            a_NH = self.affine(self.rows[i], h_NH, self.transposed[i])
        h_NH = value(a_NH)
        pre.append(a_NH)
        hidden.append(h_NH)
        scores_CN = self.affine(self._scores_bias_C1, self.weights[last], h_NH.mT)
        return Forward(pre, hidden, scores_CN)

    def loss_signal(self, scores_CN: Tensor, onehot_NC: Tensor, examples: int) -> Tensor:
        """δ_L (N, C) of a mean cross-entropy over so many examples, the batch among them."""
        number = _tensor_of(examples, scores_CN.dtype)
        return torch.softmax(scores_CN, dim=-2).sub_(onehot_NC.mT).div_(number).mT

    def onehot(self, labels: Tensor) -> Tensor:
        """Labels of any shape with a last dimension (C,) of ones and zeros, as the parameters."""
        classes = self.weights[-1].shape[-2]
        eye_CC = torch.eye(classes, dtype=self.weights[-1].dtype, device=labels.device)
        return eye_CC.index_select(0, labels.reshape(-1)).view(*labels.shape, -1)

    def signals(self, forward: Forward, delta_NC: Tensor) -> Iterator[Signal]:
        """Go down from δ_L to the first layer."""
        delta = delta_NC
        yield Signal(len(self.weights) - 1, delta, None)
        for i in range(len(self.weights) - 2, -1, -1):
            error = self.product(delta, self.weights[i + 1])
            delta = self.activation.pull(error, forward.pre[i], forward.hidden[i])
            yield Signal(i, delta, error)


@cache
def _tensor_of(number: int, dtype: torch.dtype) -> Tensor:
    """A number as division takes it at once: to make a tensor of it takes twice as long."""
    return torch.tensor(number, dtype=dtype)


def write_gradients(gradients: Layers, layer: int, delta_NH: Tensor, below_NI: Tensor) -> None:
    """Write ∂L/∂W_i = δ_iᵀ h_{i−1} and ∂L/∂b_i into the gradient that is laid out in layers."""
    gradients.product(delta_NH.mT, below_NI, out=gradients.weights[layer])
    torch.sum(delta_NH, -2, out=gradients.biases[layer])
