"""Small networks of every kind on images of 6×6, their operators and dense Hessians.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import oracles
from spectra.curvature.batch_loss import BatchLoss, Loss
from spectra.curvature.batches import Batches
from spectra.curvature.module_operator import ModuleHessian

N = 10


class Square(torch.autograd.Function):
    """a², for a derivative to be written by hand."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(a)
        return a.square()


class Attention(nn.Module):
    """A transformer's layer, whose fused kernels could be differentiated only once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        return self.head(self.layer(x.reshape(len(x), 9, 4)).mean(1))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        return self.head(self.cell(x.reshape(len(x), 6, 6))[0][:, -1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": convolutional,
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ELU(), nn.Linear(3, 3)),
    "normed": lambda: nn.Sequential(
        nn.Flatten(), weight_norm(nn.Linear(36, 2)), nn.Softplus(), nn.Linear(2, 3)
    ),
    "attention": Attention,
    "recurrent": Recurrent,
}


class Apply(nn.Module):
    """A module around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        """The value."""
        return self.function(a)


def problem(network: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A random network in float64, ten 6×6 images, and labels."""
    torch.manual_seed(41)
    model = NETWORKS[network]().double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x = torch.randn(N, 1, 6, 6, dtype=torch.float64)
    return model, x, torch.randint(0, 3, (N,))


def operator(
    model: nn.Module, loss: Loss, data: object, *, batch_size: int | None = None, **settings: object
) -> ModuleHessian:
    return ModuleHessian(
        model,
        BatchLoss(loss),
        Batches(data, batch_size=batch_size),
        **settings,  # type: ignore[arg-type]
    )


def columns(hessian: ModuleHessian) -> Tensor:
    return hessian.block(torch.eye(hessian.dim, dtype=hessian.gradient_P.dtype))


def dense(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Hessian of all the data as one batch."""
    output, theta_P = oracles.module_output(model, x)

    def whole(theta: Tensor) -> Tensor:
        return loss(output(theta), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        H_PP = torch.autograd.functional.hessian(whole, theta_P)
        return float(whole(theta_P)), oracles.gradient(whole, theta_P), H_PP
