"""Networks that the fused product knows are found by what they compute, and others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import oracles
from spectra.curvature.batch_loss import BatchLoss, Loss
from spectra.curvature.batches import Batches
from spectra.curvature.fully_connected import FullyConnected, fully_connected
from spectra.errors import UsageError

N, D, C = 9, 12, 3


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(51)
    x = torch.randn(N, 1, 3, 4, generator=draw, dtype=dtype)
    return x, torch.randint(0, C, (N,), generator=draw)


def recognised(
    model: nn.Module, given: object = None, loss: Loss = functional.cross_entropy
) -> FullyConnected:
    batches = Batches(data() if given is None else given)
    return fully_connected(model, BatchLoss(loss), batches, memory=1 << 20)


class Functional(nn.Module):
    """Layers made in another order than they are used in, and an activation that is no module."""

    def __init__(self, *, backwards: bool = False, skip: bool = False) -> None:
        super().__init__()
        if backwards:
            self.second, self.first = nn.Linear(D, C), nn.Linear(D, D)
        else:
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, C)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        x = x.flatten(1)
        h = torch.tanh(self.first(x))
        return self.second(h + x if self.skip else h)


def stack(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(D, 5), *middle, nn.Linear(5, C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", oracles.MODULES)
def test_a_nested_network_is_found_with_its_activation(activation: str, dtype: torch.dtype):
    """Its scores are those of the oracle with the weights in the order found."""
    act = oracles.MODULES[activation]
    model = nn.Sequential(
        nn.Flatten(),
        nn.Identity(),
        nn.Sequential(nn.Linear(D, 5), act()),
        nn.Sequential(nn.Sequential(nn.Linear(5, 4)), act()),
        nn.Linear(4, C),
    ).to(dtype)
    x, y = data(dtype)

    found = recognised(model, (x, y))

    assert found.mlp.activation == activation
    assert found.mlp.widths == (D, 5, 4, C)
    assert found.inputs_ND.shape == (N, D)
    assert found.theta_P.dtype == dtype
    actual = oracles.logits(found.mlp.widths, activation, found.theta_P, found.inputs_ND)
    torch.testing.assert_close(actual, model(x))
    assert torch.equal(found.theta_P, torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (Functional, (D, D, C)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(D, C)), (D, C)),
        (lambda: stack(nn.Dropout(0.5), nn.Tanh()).eval(), (D, 5, C)),
        (lambda: stack(nn.Threshold(0, 0)), (D, 5, C)),
    ],
    ids=["functional", "linear", "resting dropout", "relu by another name"],
)
def test_other_ways_to_write_one_are_found_too(
    make: Callable[[], nn.Module], widths: tuple[int, ...]
):
    assert recognised(make()).mlp.widths == widths


@pytest.mark.parametrize(
    "make",
    [
        lambda: stack(nn.GELU("tanh")),
        lambda: stack(nn.LeakyReLU(1e-4)),
        lambda: stack(nn.ReLU6()),
        lambda: stack(nn.Hardtanh()),
        lambda: stack(nn.Tanh(), nn.Tanh()),
        stack,
        lambda: nn.Sequential(stack(nn.Tanh()), nn.Softmax(1)),
        lambda: Functional(skip=True),
        lambda: nn.Sequential(nn.ZeroPad2d((1, -1, 0, 0)), stack(nn.Tanh())),
        lambda: stack(nn.Tanh(), nn.LayerNorm(5, elementwise_affine=False)),
    ],
)
def test_networks_that_only_look_alike_are_not_taken(make: Callable[[], nn.Module]):
    with pytest.raises(UsageError, match="not affine maps with one of sigmoid, tanh, relu, gelu"):
        recognised(make())


def test_a_clamp_that_only_the_data_reach_is_seen():
    """Random probes stay below it; the network on its data does not."""
    model = stack(nn.ReLU(), nn.Hardtanh(-1e4, 1e4))
    x, y = data()

    assert recognised(model, (x, y)).mlp.activation == "relu"
    with pytest.raises(UsageError, match="not affine maps"):
        recognised(model, (1e6 * x, y))


def test_an_order_that_is_not_that_of_the_vector_is_refused():
    """Layers registered backwards: the chain of shapes does not close, so nothing is permuted."""
    with pytest.raises(UsageError, match="no chain of affine maps"):
        recognised(Functional(backwards=True))


class Shared(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """The value."""
        return self.layer(torch.tanh(self.layer(x.flatten(1))))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(2, C)), "no chain of affine"),
        (nn.Sequential(nn.Flatten(), nn.Linear(D, C, bias=False)), "no chain of affine maps"),
        (stack(nn.BatchNorm1d(5)).eval(), "no chain of affine maps"),
        (Shared(), "not affine maps"),
        (stack(nn.Tanh()).double(), "inputs are torch.float32 and parameters torch.float64"),
        (nn.Sequential(nn.Linear(4, C)), r"an example has shape \(1, 3, 4\), not 4 inputs"),
        (nn.Sequential(nn.Flatten(), nn.Linear(D, 1)), r"labels are not all in 0\.\.0"),
        (stack(nn.Dropout(0.5)), "draws random numbers"),
    ],
)
def test_networks_are_refused_with_the_reason(model: nn.Module, message: str):
    with pytest.raises(UsageError, match=message):
        recognised(model)


def test_a_frozen_layer_is_not_taken():
    model = stack(nn.Tanh())
    model[1].bias.requires_grad_(False)

    with pytest.raises(UsageError, match="frozen"):
        recognised(model)


X, Y = data()


@pytest.mark.parametrize(
    ("given", "loss", "message"),
    [
        ([((X,), Y)], functional.cross_entropy, "data as tensors"),
        ([(X, Y), (X.double(), Y)], functional.cross_entropy, "data as tensors"),
        ([(X, Y), (X[:, 0], Y)], functional.cross_entropy, "data as tensors"),
        ([(X, Y[:3])], functional.cross_entropy, "data as tensors"),
        ((X[:0], Y[:0]), functional.cross_entropy, "data as tensors"),
        ((X, Y.int()), functional.cross_entropy, "integer labels"),
        ((X, functional.one_hot(Y, C).float()), functional.cross_entropy, "integer labels"),
        ((X, torch.where(Y == 1, -100, Y)), functional.cross_entropy, r"not all in 0\.\.2"),
        ((X, Y), nn.CrossEntropyLoss(ignore_index=1), "not a plain cross-entropy"),
        ((X, Y), nn.MSELoss(), "not a plain cross-entropy"),
        ((Y, Y), functional.cross_entropy, "no second dimension"),
    ],
)
def test_data_and_losses_are_refused_with_the_reason(given: object, loss: Loss, message: str):
    with pytest.raises(UsageError, match=message):
        recognised(stack(nn.Tanh()), given, loss)
