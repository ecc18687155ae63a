"""Loss, gradient and products at a point once more, in float64 and by another way.

What a solver says of its eigenpairs rests on the products it was given. Products computed by other
code, in higher precision, from the same weights and the same data say whether that was right.
Data and weights are taken as they are, float32 numbers being float64 numbers too, so the two
operators differ by round-off only. There are two ways, and a spectrum is recomputed by the one it
was not solved with: differentiating twice, and the formulas written out.

The data go through in chunks, each converted when it is its turn; its graph, or what the formulas
cache of it, serves all B vectors and is let go. That is what makes a pass over 60,000 digits fit
into memory. Each thread takes its own share of the chunks, and the shares are added in their order.

Letters: P parameters, N examples, n of a chunk, B vectors.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
(1994) 147-160.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spectra import runtime
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import LossSum
from spectra.mlp import Mlp
from spectra.objective import cross_entropy_sum

CHUNK = 1000
"""Examples at a time on a CPU: the fastest of 500 to 4,000 for seven vectors."""
GPU_CHUNK = 20_000
"""Examples at a time on a GPU: 1,000 take eight times as long, 60,000 as little and a GiB more."""


class Recomputed(NamedTuple):
    """L(θ), ∇L(θ) and the products H v of B vectors, in float64."""

    loss: float
    gradient_P: Tensor
    images_BP: Tensor


Part = Callable[[Tensor, Tensor, Tensor], tuple[float, Tensor, Tensor]]
"""`(inputs, labels, v_BP)` -> loss, gradient and products, summed over a chunk's examples."""


def recomputed(
    part: Part,
    inputs_ND: Tensor,
    labels_N: Tensor,
    v_BP: Tensor,
    *,
    threads: int = 1,
    chunk: int | None = None,
    on_chunk: Callable[[], None] = lambda: None,
) -> Recomputed:
    """One pass over the data.

    Args:
        part: How a chunk is computed: `by_differentiation` or `by_formulas`.
        inputs_ND: All inputs, in any precision.
        labels_N: All labels.
        v_BP: The vectors, in float64.
        threads: Shares of the data, each of a thread of its own on a CPU.
        chunk: Examples at a time; what suits the device unless given.
        on_chunk: Called before every chunk, from any thread.

    Raises:
        ValueError: There are no examples.
    """
    if not len(labels_N):
        raise ValueError("a Hessian of a mean loss needs at least one example, got none")
    chunk = chunk or (CHUNK if v_BP.device.type == "cpu" else GPU_CHUNK)
    chunks = list(zip(inputs_ND.split(chunk), labels_N.split(chunk), strict=True))

    def share(members: Sequence[tuple[Tensor, Tensor]]) -> Recomputed:
        loss, gradient_P, images_BP = 0.0, v_BP.new_zeros(v_BP.shape[1]), torch.zeros_like(v_BP)
        for x_nD, y_n in members:
            on_chunk()
            more, gradient_part_P, images_part_BP = part(x_nD.double(), y_n, v_BP)
            loss += more
            gradient_P += gradient_part_P
            images_BP += images_part_BP
        return Recomputed(loss, gradient_P, images_BP)

    on_cpu = v_BP.device.type == "cpu"
    parts = runtime.of_each(share, runtime.shares(chunks, threads), alone=on_cpu)
    examples = len(labels_N)
    return Recomputed(
        sum(found.loss for found in parts) / examples,
        torch.stack([found.gradient_P for found in parts]).sum(0) / examples,
        torch.stack([found.images_BP for found in parts]).sum(0) / examples,
    )


def by_differentiation(loss_sum: LossSum, theta_P: Tensor) -> Part:
    """Differentiate the loss of a chunk twice, the graph of the gradient kept for all vectors.

    Args:
        loss_sum: The loss of a chunk, summed over its examples.
        theta_P: The point, in any precision.
    """

    def part(x_nD: Tensor, y_n: Tensor, v_BP: Tensor) -> tuple[float, Tensor, Tensor]:
        point_P = theta_P.detach().double().requires_grad_()
        with torch.enable_grad():
            value = loss_sum(point_P, x_nD, y_n)
            (gradient_P,) = torch.autograd.grad(value, point_P, create_graph=True)
            images = [
                torch.autograd.grad(gradient_P, point_P, grad_outputs=v_P, retain_graph=True)[0]
                for v_P in v_BP
            ]
        images_BP = torch.stack(images) if images else torch.zeros_like(v_BP)
        return float(value.detach()), gradient_P.detach(), images_BP

    return part


def by_formulas(mlp: Mlp, theta_P: Tensor) -> Part:
    """The product written out for these networks, `MlpHessian`, on a chunk at a time."""
    theta_P = theta_P.detach().double()

    def part(x_nD: Tensor, y_n: Tensor, v_BP: Tensor) -> tuple[float, Tensor, Tensor]:
        hessian = MlpHessian(mlp, theta_P, x_nD, y_n, here=True)
        examples = len(y_n)
        images_BP = hessian.block(v_BP) if len(v_BP) else torch.zeros_like(v_BP)
        return hessian.loss * examples, hessian.gradient_P * examples, images_BP * examples

    return part


def other_way(mlp: Mlp, theta_P: Tensor, solved_with: str) -> Part:
    """The way that a spectrum was not solved with, "fused" or "autodiff"."""
    if solved_with == "fused":
        return by_differentiation(partial(_loss_sum, mlp), theta_P)
    return by_formulas(mlp, theta_P)


def _loss_sum(mlp: Mlp, theta_P: Tensor, x_nD: Tensor, y_n: Tensor) -> Tensor:
    return cross_entropy_sum(mlp.logits(theta_P, x_nD), y_n)
