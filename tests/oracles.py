"""Independent references: networks written out, dense Hessians, planted spectra.

Nothing here imports `spectra`: what the tests compare with must not share its code.

Letters: P parameters, N examples, J vectors of a basis.
"""

from __future__ import annotations

import copy
import gzip
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

SAMPLE = Path(__file__).parents[1] / "sample"

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "tanh": lambda a: 1 - 2 / (torch.exp(2 * a) + 1),
    "relu": lambda a: torch.where(a > 0, a, torch.zeros_like(a)),
    "gelu": lambda a: a * (1 + torch.erf(a / math.sqrt(2))) / 2,
}

MODULES = {
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
}


def logits(widths: Sequence[int], activation: str, theta_P: Tensor, inputs_ND: Tensor) -> Tensor:
    """An MLP with weights and biases cut out of θ by counting: W (out, in), b, W, b, ..."""
    h, at = inputs_ND, 0
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        weight = theta_P[at : at + fan_in * fan_out].reshape(fan_out, fan_in)
        bias = theta_P[at + fan_in * fan_out : at + (fan_in + 1) * fan_out]
        at += (fan_in + 1) * fan_out
        h = h @ weight.T + bias
        if i < len(widths) - 2:
            h = FORMULAS[activation](h)
    assert at == theta_P.numel()
    return h


def mean_loss(
    widths: Sequence[int],
    activation: str,
    inputs_ND: Tensor,
    labels_N: Tensor,
    *,
    c: float = 0.0,
    reference_P: Tensor | float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """θ -> mean(log Σ exp z − z_y) + c ‖θ − ref‖²."""

    def loss(theta_P: Tensor) -> Tensor:
        z_NC = logits(widths, activation, theta_P, inputs_ND)
        right_N = z_NC.gather(1, labels_N[:, None])[:, 0]
        penalty = c * ((theta_P - reference_P) ** 2).sum()
        return (torch.logsumexp(z_NC, 1) - right_N).mean() + penalty

    return loss


@dataclass(frozen=True)
class Case:
    """A small network, and how often each of its hidden units is repeated."""

    widths: tuple[int, ...]
    copies: Sequence[Sequence[int]]


REPEATED = {
    "one layer": Case((4, 3, 3), [(1, 2, 3)]),
    "one class": Case((4, 1, 3), [(5,)]),
    "two layers": Case((4, 3, 2, 3), [(1, 2, 3), (5, 2)]),
    "the second of two": Case((4, 3, 2, 3), [(1, 1, 1), (3, 2)]),
    "three layers": Case((3, 2, 2, 2, 3), [(2, 1), (3, 2), (1, 2)]),
}


def repeated(
    widths: Sequence[int], theta_p: Tensor, copies: Sequence[Sequence[int]], *, seed: int = 0
) -> tuple[tuple[int, ...], Tensor, list[Tensor]]:
    """A network in which unit g of hidden layer i occurs `copies[i][g]` times, shuffled.

    Copies share what leaves the unit, so the function computed stays the same.

    Returns:
        widths, θ_P, and which unit each hidden unit is a copy of, by layer.
    """
    draw = torch.Generator().manual_seed(seed)
    origins = [torch.arange(widths[0])]
    for counts in copies:
        origin_H = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        origins.append(origin_H[torch.randperm(len(origin_H), generator=draw)])
    origins.append(torch.arange(widths[-1]))
    every = [torch.ones(widths[0]), *map(torch.tensor, copies)]
    parts, at = [], 0
    for (fan_in, fan_out), below_H, above_H, counts_G in zip(
        pairwise(widths), origins[:-1], origins[1:], every, strict=True
    ):
        weight = theta_p[at : at + fan_in * fan_out].reshape(fan_out, fan_in) / counts_G
        bias = theta_p[at + fan_in * fan_out : at + (fan_in + 1) * fan_out]
        at += (fan_in + 1) * fan_out
        parts += [weight[above_H][:, below_H].reshape(-1), bias[above_H]]
    assert at == theta_p.numel()
    return tuple(map(len, origins)), torch.cat(parts), origins[1:-1]


def module_output(
    model: torch.nn.Module, inputs: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """θ -> output of a module whose trainable parameters are θ one after the other, and its θ."""
    # A copy: functional_call leaves its tensors behind in a module that occurs twice.
    model = copy.deepcopy(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def output(theta_P: Tensor) -> Tensor:
        weights, at = {}, 0
        for name, p in trained.items():
            weights[name] = theta_P[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        assert at == theta_P.numel()
        return torch.func.functional_call(model, weights, (inputs,))

    return output, torch.cat([p.detach().reshape(-1) for p in trained.values()])


def gradient(loss: Callable[[Tensor], Tensor], theta_P: Tensor) -> Tensor:
    """∇L by automatic differentiation."""
    theta_P = theta_P.detach().clone().requires_grad_()
    (gradient_P,) = torch.autograd.grad(loss(theta_P), theta_P)
    return gradient_P


def dense_hessian(loss: Callable[[Tensor], Tensor], theta_P: Tensor) -> Tensor:
    """The Hessian as a matrix, forward over reverse, which no product of `spectra` uses."""
    return torch.func.hessian(loss)(theta_P)


def gauss_newton(
    widths: Sequence[int], activation: str, theta_P: Tensor, inputs_ND: Tensor
) -> Callable[[Tensor], Tensor]:
    """`v -> Jᵀ (diag p − p pᵀ) J v / N` from the Jacobian of the scores, for v of (..., P)."""

    def scores(theta_P: Tensor) -> Tensor:
        return logits(widths, activation, theta_P, inputs_ND)

    J_NCP = torch.func.jacrev(scores)(theta_P)
    p_NC = torch.softmax(scores(theta_P), dim=1)

    def product(v_P: Tensor) -> Tensor:
        change_NC = torch.einsum("ncp,...p->...nc", J_NCP, v_P)
        curved_NC = p_NC * (change_NC - (p_NC * change_NC).sum(-1, keepdim=True))
        return torch.einsum("ncp,...nc->...p", J_NCP, curved_NC) / len(inputs_ND)

    return product


def forward_over_reverse(
    loss: Callable[[Tensor], Tensor], theta_P: Tensor
) -> Callable[[Tensor], Tensor]:
    """`v -> Hv` as the directional derivative of the gradient."""
    return lambda v_P: torch.func.jvp(torch.func.grad(loss), (theta_P,), (v_P,))[1]


def leading_values(product: Callable[[Tensor], Tensor], dim: int, k: int) -> np.ndarray:
    """The `k` eigenvalues of largest magnitude to float64 round-off, sorted by magnitude."""
    operator = LinearOperator(
        (dim, dim),
        matvec=lambda v: product(torch.from_numpy(v.reshape(-1).copy())).numpy(),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(dim)
    values = eigsh(operator, k=k, which="LM", tol=1e-10, v0=start, return_eigenvectors=False)
    return values[np.argsort(-np.abs(values))]


def planted(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Tensor:
    """A float64 symmetric matrix with the given eigenvalues and random eigenvectors."""
    draw = torch.Generator().manual_seed(seed)
    size = len(values)
    q_PP, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    matrix_PP = (q_PP * torch.as_tensor(np.asarray(values), dtype=torch.float64)) @ q_PP.T
    return (matrix_PP + matrix_PP.T) / 2


def bulk(count: int, low: float = 0.0, high: float = 0.1) -> np.ndarray:
    """Evenly spread eigenvalues below the outliers of a planted spectrum."""
    return np.linspace(low, high, count)


def lanczos_without_reorthogonalisation(
    matrix_PP: Tensor, start_P: Tensor, steps: int
) -> np.ndarray:
    """Ritz values of the three-term recurrence as Lanczos published it, ghosts and all."""
    previous_P, q_P = torch.zeros_like(start_P), start_P / start_P.norm()
    diagonal, off_diagonal = [], []
    beta = torch.tensor(0.0)
    for _ in range(steps):
        w_P = matrix_PP @ q_P - beta * previous_P
        alpha = w_P @ q_P
        w_P = w_P - alpha * q_P
        beta = w_P.norm()
        diagonal.append(float(alpha))
        off_diagonal.append(float(beta))
        previous_P, q_P = q_P, w_P / beta
    tridiagonal = np.diag(diagonal) + np.diag(off_diagonal[:-1], 1) + np.diag(off_diagonal[:-1], -1)
    return np.linalg.eigvalsh(tridiagonal)


def sample_digits(part: str = "train") -> tuple[Tensor, Tensor]:
    """The digits in sample/: inputs (N, 784) normalised in float64, and labels."""
    images = gzip.decompress((SAMPLE / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((SAMPLE / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels_ND = np.frombuffer(images, np.uint8).reshape(-1, 784)
    inputs_ND = torch.from_numpy((pixels_ND / 255 - 0.1307) / 0.3081)
    return inputs_ND, torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64))


def class_covariance(labels_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The class priors p and the matrix diag p − ppᵀ."""
    priors_C = np.bincount(labels_N.numpy(), minlength=10) / len(labels_N)
    return priors_C, np.diag(priors_C) - np.outer(priors_C, priors_C)
