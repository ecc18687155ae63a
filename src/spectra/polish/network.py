"""A network on its data as a landscape: evaluated in float64, multiplied as fast as it goes.

Losses and gradients stream over the chunks of the data in float64, one chunk of a thread at a time,
so that nothing of the size of the data is held twice. The Hessian's products come from
`MlpHessian` in the dtype of the data, prepared at the first of them: points that are only tried
never pay for it.

In the coordinates of a network whose equal units are merged, z with θ = lift(z) and ‖θ‖ = ‖z‖, the
gradient and the Hessian of the whole are those of the quotient between its diagonal scalings; see
`equal_units`. A landscape with hundreds of coordinates takes the place of one with 10⁵.

Letters: N examples, n of a chunk, P coordinates, p parameters of the network evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spectra import runtime
from spectra.chunks import Chunk, DividedChunk, Entries, with_ones
from spectra.curvature.equal_units import Quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.inputs import Columns, Inputs
from spectra.mlp import Mlp


@dataclass(frozen=True)
class Labelled:
    """Examples as products take them, and how many threads share the work on a CPU.

    Attributes:
        inputs: The inputs, divided.
        labels_N: All labels.
        threads: Shares of the chunks, each with a thread of its own.
        exact_ND: The inputs before they were divided. In float32 what is listed of a column, its
            difference from the background, is rounded, which moves a gradient by some 1e-9; with
            these, evaluations in float64 are of the very data.
    """

    inputs: Inputs
    labels_N: Tensor
    threads: int = 1
    exact_ND: Tensor | None = None


class NetworkLandscape:
    """The mean cross-entropy of a network as a function of all its parameters.

    Args:
        mlp: The network.
        data: The examples; their dtype is that of the products.
        scale_P: What the parameters are of the coordinates, θ = scale ∘ x; 1 unless given.

    Attributes:
        dim: P.
        evaluation: Price of a loss with its gradient, in products.
        preparation: Price of preparing products at a point.

    Prices were measured with two threads: 2.1 and 1.6 on the whole of 784-128-128-10, 2.7 and 1.6
    on quotients of it.
    """

    evaluation = 2.5
    preparation = 1.5

    def __init__(self, mlp: Mlp, data: Labelled, scale_P: Tensor | None = None) -> None:
        self.dim = mlp.dim
        self._mlp, self._data = mlp, data
        self._scale_P = None if scale_P is None else scale_P.double()

    @classmethod
    def merged(cls, quotient: Quotient, data: Labelled) -> NetworkLandscape:
        """That of a network with its equal units merged, in coordinates of the same lengths."""
        return cls(quotient.mlp, data, quotient.scale_p)

    def at(self, x_P: Tensor) -> NetworkLocal:
        """The landscape near x."""
        return NetworkLocal(self._mlp, self._data, x_P, self._scale_P)


class NetworkLocal:
    """The mean cross-entropy of a network near a point.

    Attributes:
        loss: L_CE, summed in float64.
        gradient_P: Its gradient, in float64.
    """

    def __init__(self, mlp: Mlp, data: Labelled, x_P: Tensor, scale_P: Tensor | None) -> None:
        self._mlp, self._data, self._scale_P = mlp, data, scale_P
        self._theta_P = x_P.double() if scale_P is None else scale_P * x_P.double()
        self.loss, gradient_P = evaluated(mlp, self._theta_P, data)
        if scale_P is not None:
            gradient_P = scale_P * gradient_P
        self.gradient_P = gradient_P
        self._hessian: MlpHessian | None = None

    @property
    def hessian(self) -> MlpHessian:
        """The Hessian of the network evaluated, in the dtype of the data."""
        if self._hessian is None:
            dtype = self._data.inputs.dtype
            with runtime.threads(1):
                self._hessian = MlpHessian(
                    self._mlp, self._theta_P.to(dtype), self._theta_P[:0], self._data.labels_N,
                    threads=self._data.threads, inputs=self._data.inputs,
                )  # fmt: skip
        return self._hessian

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product H_CE v."""
        hessian = self.hessian
        if self._scale_P is None:
            return hessian(v_P.to(hessian.gradient_P.dtype)).to(v_P.dtype)
        inner_P = (self._scale_P * v_P).to(hessian.gradient_P.dtype)
        return (self._scale_P * hessian(inner_P)).to(v_P.dtype)


def evaluated(mlp: Mlp, theta_P: Tensor, data: Labelled) -> tuple[float, Tensor]:
    """The mean cross-entropy at θ (float64) and its gradient, streamed over the data.

    Raises:
        NonFiniteError: The loss or its gradient is NaN or infinite.
    """
    inputs = data.inputs
    rows_N = torch.arange(len(data.labels_N), device=theta_P.device)
    parts = list(zip(inputs.chunks, inputs.split(rows_N), strict=True))
    on_cpu = theta_P.device.type == "cpu"
    shares = runtime.shares(parts, data.threads if on_cpu else 1)
    sums = runtime.of_each(partial(_share, mlp, theta_P, data), shares, alone=on_cpu)
    examples = len(data.labels_N)
    gradient_P = torch.stack([gradient_P for _, gradient_P in sums]).sum(0).div_(examples)
    return sum(loss for loss, _ in sums) / examples, gradient_P


def _share(
    mlp: Mlp, theta_P: Tensor, data: Labelled, parts: Sequence[tuple[Chunk | DividedChunk, Tensor]]
) -> tuple[float, Tensor]:
    """Sums of loss and gradient over some chunks, each given with its rows."""
    loss, gradient_P = 0.0, torch.zeros_like(theta_P)
    columns = data.inputs.columns
    for chunk, rows_n in parts:
        exact_nD = None if data.exact_ND is None else data.exact_ND[rows_n]
        one = Inputs(columns, [_double(chunk, exact_nD, columns)])
        labels_n = data.labels_N[rows_n]
        local = MlpHessian(mlp, theta_P, theta_P[:0], labels_n, inputs=one, here=True)
        loss += local.loss * len(labels_n)
        gradient_P.add_(local.gradient_P, alpha=len(labels_n))
    return loss, gradient_P


def _double(
    chunk: Chunk | DividedChunk, exact_nD: Tensor | None, columns: Columns
) -> Chunk | DividedChunk:
    """A chunk in float64, its differences from the background taken anew where that can be."""
    if isinstance(chunk, Chunk):
        return Chunk(chunk.x_nD.double())
    if exact_nD is None:
        return replace(
            chunk, often_nO=chunk.often_nO.double(),
            by_example=_in_double(chunk.by_example), by_column=_in_double(chunk.by_column),
        )  # fmt: skip
    s_nD = exact_nD.double() - columns.background
    return DividedChunk(
        with_ones(s_nD[:, chunk.often_O[:-1]]), chunk.often_O,
        chunk.by_example.valued_as_in(s_nD), chunk.by_column.valued_as_in(s_nD.t()),
    )  # fmt: skip


def _in_double(listed: Entries) -> Entries:
    return replace(listed, values=listed.values.double())
