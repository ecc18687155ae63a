"""The gradient of the mean cross-entropy of an MLP, by hand-derived back-propagation.

Automatic differentiation records a graph at every step of a training loop; at batch 64 that
costs more than the arithmetic. Here the chain rule is written out once, into buffers that are
views of one flat gradient, and tests hold it against automatic differentiation.

With a_i = h_{i−1} W_iᵀ + b_i, h_i = φ(a_i), h_0 the inputs, and p the softmax of the scores:

    δ_L = (p − onehot(y)) / N,    δ_i = (δ_{i+1} W_{i+1}) ∘ φ'(a_i)
    ∂L/∂W_i = δ_iᵀ h_{i−1},       ∂L/∂b_i = Σ_n δ_i

Letters: N examples of a batch, D inputs, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.activations import ACTIVATIONS
from spectra.mlp import Mlp


class Backprop:
    """Gradients of one network, whose parameters are read anew at every call.

    Args:
        mlp: The network.
        theta_P: Its parameters; an optimiser may change them in place between calls.

    Attributes:
        gradient_P: The flat gradient that a call writes.
    """

    def __init__(self, mlp: Mlp, theta_P: Tensor) -> None:
        self.gradient_P = torch.empty_like(theta_P)
        tensors = list(mlp.split(theta_P).values())
        buffers = list(mlp.split(self.gradient_P).values())
        self._weights, self._biases = tensors[0::2], tensors[1::2]
        self._weight_gradients, self._bias_gradients = buffers[0::2], buffers[1::2]
        self._activation = ACTIVATIONS[mlp.activation]
        self._onehot = torch.eye(mlp.widths[-1], dtype=theta_P.dtype, device=theta_P.device)

    def __call__(self, inputs_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Write and return ∇ of the mean cross-entropy of a batch; the buffer is reused."""
        act = self._activation
        last = len(self._weights) - 1
        a: list[Tensor] = []
        h = [inputs_ND]
        for i, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            a.append(torch.addmm(bias, h[i], weight.t()))
            if i < last:
                h.append(act.value(a[i]))
        delta = torch.softmax(a[last], dim=1)
        delta.sub_(self._onehot.index_select(0, labels_N)).div_(len(labels_N))
        for i in range(last, -1, -1):
            torch.mm(delta.t(), h[i], out=self._weight_gradients[i])
            torch.sum(delta, 0, out=self._bias_gradients[i])
            if i > 0:
                delta = torch.mm(delta, self._weights[i]).mul_(act.slope(a[i - 1], h[i]))
        return self.gradient_P
