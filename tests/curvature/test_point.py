"""A network as a function of θ, frozen in time, and left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectra.curvature.point import Point, split, trainable
from spectra.errors import UsageError


class Tied(nn.Module):
    """An encoder whose transpose decodes, and a buffer that counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(4, 3)
        self.back = nn.Linear(3, 4)
        self.again = self.code
        self.back.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """The value."""
        self.calls += 1
        return scale * self.back(torch.tanh(self.again(x)))


def test_theta_is_the_trainable_parameters_once_in_their_order():
    model = Tied()
    point = Point(model)

    assert list(trainable(model)) == ["code.weight", "code.bias", "back.bias"]
    expected = [model.code.weight.flatten(), model.code.bias, model.back.bias]
    assert torch.equal(point.theta_P, torch.cat(expected))
    parts = split(point.theta_P, {n: p.shape for n, p in trainable(model).items()})
    assert all(torch.equal(parts[name], p) for name, p in trainable(model).items())


def test_the_output_is_the_networks_whatever_happens_to_it_later():
    model = Tied()
    x = torch.randn(5, 4)
    before = model(x)
    state = copy.deepcopy(model.state_dict())
    point = Point(model)

    assert torch.equal(point(x), before)
    assert torch.equal(point((x,)), before)
    assert torch.equal(point({"x": x, "scale": 2.0}), 2 * before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7.0)
    assert torch.equal(point(x), before)


def test_other_parameters_give_another_output():
    model = Tied()
    point, x = Point(model), torch.randn(5, 4)
    other_P = torch.linspace(-1, 1, len(point.theta_P))

    actual = point(x, other_P)

    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(other_P, trainable(model).values())
    torch.testing.assert_close(actual, model(x))


def test_weights_read_past_the_point_are_seen():
    model = Tied()
    point, x = Point(model), torch.randn(5, 4)

    assert not point.reads_itself(point(x).sum())
    assert point.reads_itself(point(x).sum() + model.code.bias.square().sum())
    assert not point.reads_itself(point(x).sum() + model.back.weight.sum())


def bare(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *modules)


def half_and_half() -> nn.Module:
    model = bare(nn.Linear(4, 4))
    model[1].double()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bare(nn.Dropout(0.5)), r"'1' \(Dropout\) draws .* model.eval\(\)"),
        (lambda: bare(nn.AlphaDropout(0.1)), "draws random numbers"),
        (lambda: bare(nn.RReLU()), "draws random numbers"),
        (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), "^MultiheadAttention draws"),
        (lambda: nn.LSTM(4, 4, num_layers=2, dropout=0.1), "draws random numbers"),
        (lambda: bare(nn.BatchNorm1d(4)), r"'1' \(BatchNorm1d\) normalises .* model.eval\(\)"),
        (
            lambda: bare(nn.BatchNorm1d(4, track_running_stats=False)).eval(),
            "track_running_stats=True",
        ),
        (nn.ReLU, "no parameter with requires_grad"),
        (lambda: bare().requires_grad_(False), "no parameter with requires_grad"),
        (lambda: bare().half(), r"torch.float16 on cpu; .* model.float\(\)"),
        (half_and_half, "torch.float32 on cpu, torch.float64 on cpu"),
        (lambda: nn.LazyLinear(3), "'weight' has no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_what_is_no_function_of_its_weights_is_refused(make: Callable[[], nn.Module], message: str):
    with pytest.raises(UsageError, match=message) as caught:
        Point(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.Dropout(0.5).eval(),
        nn.BatchNorm1d(4).eval(),
        nn.LayerNorm(4),
        nn.LSTM(4, 4, num_layers=1),
    ],
    ids=str,
)
def test_what_is_at_rest_is_taken(module: nn.Module):
    assert Point(bare(module)).theta_P.requires_grad


def test_training_mode_switched_on_later_is_refused_too():
    model = bare(nn.Dropout(0.5)).eval()
    point = Point(model)
    model.train()

    with pytest.raises(UsageError, match="eval"):
        point(torch.zeros(2, 4))


def test_data_of_another_dtype_are_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r"torch.float32 and its inputs are torch.float64"):
        Point(bare())(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shape"):
        Point(bare())(torch.zeros(2, 5))


def test_a_compiled_network_is_taken_as_it_was_written():
    model = bare(nn.Tanh())

    point = Point(torch.compile(model))

    assert torch.equal(point(torch.ones(2, 4)), model(torch.ones(2, 4)))
