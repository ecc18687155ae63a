"""The chain rule of a stack of MLPs, written out once.

Automatic differentiation records a graph at every step of a training loop; at batch 64 that
costs more than the arithmetic. With a_i = h_{i−1} W_iᵀ + b_i, h_i = φ(a_i), h_0 the inputs, and
p the softmax of the scores a_L:

    δ_L = (p − onehot(y)) / N,    e_i = δ_{i+1} W_{i+1},    δ_i = e_i ∘ φ'(a_i)
    ∂L/∂W_i = δ_iᵀ h_{i−1},       ∂L/∂b_i = Σ_n δ_i

A training step and the Hessian product take their signals from here; tests hold them against
automatic differentiation. What is done with the first layer's inputs is left to the caller, who
knows how they lie in memory. Scores and δ_L lie transposed, (C, N): with a few classes the
matrix products are several times faster that way round.

Letters: M networks, N examples of a batch, H units of a layer, C classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectra.activations import ACTIVATIONS
from spectra.mlp import Mlp


class Forward(NamedTuple):
    """a_1..a_{L−1} and h_1..h_{L−1} by layer, each (M, N, H), and the scores a_L."""

    pre: Sequence[Tensor]
    hidden: Sequence[Tensor]
    scores_MCN: Tensor


class Signal(NamedTuple):
    """What reaches layer i + 1 from above: δ, and below the last layer the e it comes from."""

    layer: int
    delta_MNH: Tensor
    error_MNH: Tensor | None


class Layers:
    """The layers of M networks as views of their parameters, read anew at every call.

    Args:
        mlp: The architecture.
        theta_MP: The parameters; an optimiser may change them in place between calls.

    Attributes:
        weights: W_1..W_L, (M, outputs, inputs).
        biases: b_1..b_L, (M, outputs).
        transposed: The weights, (M, inputs, outputs).
        rows: The biases, (M, 1, outputs).
        activation: φ.
    """

    def __init__(self, mlp: Mlp, theta_MP: Tensor) -> None:
        tensors = list(mlp.split(theta_MP).values())
        self.weights, self.biases = tensors[0::2], tensors[1::2]
        self.activation = ACTIVATIONS[mlp.activation]
        # Views made once: in a training step at batch 64, making them again takes as long as
        # some of the products.
        self.transposed = [weight.mT for weight in self.weights]
        self.rows = [bias[:, None] for bias in self.biases]
        self._scores_bias_MC1 = self.biases[-1][:, :, None]

    def forward(self, a_MNH: Tensor) -> Forward:
        """Go up from the first layer's pre-activations a_1; without hidden layers, scores."""
        last = len(self.weights) - 1
        pre: list[Tensor] = []
        hidden: list[Tensor] = []
        if not last:
            return Forward(pre, hidden, a_MNH.mT)
        value = self.activation.value
        for i in range(1, last):
            h_MNH = value(a_MNH)
            pre.append(a_MNH)
            hidden.append(h_MNH)
            a_MNH = torch.baddbmm(self.rows[i], h_MNH, self.transposed[i])
        h_MNH = value(a_MNH)
        pre.append(a_MNH)
        hidden.append(h_MNH)
        scores_MCN = torch.baddbmm(self._scores_bias_MC1, self.weights[last], h_MNH.mT)
        return Forward(pre, hidden, scores_MCN)

    def loss_signal(self, scores_MCN: Tensor, onehot_MNC: Tensor, examples: int) -> Tensor:
        """δ_L (M, N, C) of a mean cross-entropy over so many examples, the batch among them."""
        return torch.softmax(scores_MCN, dim=1).sub_(onehot_MNC.mT).div_(examples).mT

    def onehot(self, labels: Tensor) -> Tensor:
        """Labels of any shape with a last dimension (C,) of ones and zeros, as the parameters."""
        classes = self.weights[-1].shape[1]
        eye_CC = torch.eye(classes, dtype=self.weights[-1].dtype, device=labels.device)
        return eye_CC.index_select(0, labels.reshape(-1)).view(*labels.shape, -1)

    def signals(self, forward: Forward, delta_MNC: Tensor) -> Iterator[Signal]:
        """Go down from δ_L to the first layer."""
        delta = delta_MNC
        yield Signal(len(self.weights) - 1, delta, None)
        for i in range(len(self.weights) - 2, -1, -1):
            error = torch.bmm(delta, self.weights[i + 1])
            delta = self.activation.pull(error, forward.pre[i], forward.hidden[i])
            yield Signal(i, delta, error)
