"""The network: layout of θ, equality with `torch.nn`, and what a `state_dict` must be."""

from __future__ import annotations

import itertools
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import oracles
from spectra.activations import ACTIVATIONS
from spectra.errors import WeightsError
from spectra.mlp import Mlp, from_state_dict

PAPER = Mlp((784, 128, 128, 10))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sequential(widths: tuple[int, ...], activation: str, dtype: torch.dtype) -> nn.Sequential:
    """PyTorch's own network of the family."""
    parts: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        parts += [nn.Linear(fan_in, fan_out, dtype=dtype), oracles.MODULES[activation]()]
    return nn.Sequential(*parts[:-1])


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in module.state_dict().values()])


def test_the_paper_network_has_118282_parameters():
    """100,480 + 16,512 + 1,290, and nn.Sequential counts the same."""
    assert PAPER.dim == 100_480 + 16_512 + 1_290 == 118_282
    assert PAPER.layers == 3
    assert flat(sequential(PAPER.widths, "sigmoid", torch.float32)).numel() == PAPER.dim


def test_shapes_are_those_of_linear_layers_in_order():
    assert list(PAPER.shapes.items()) == [
        ("fc1.weight", (128, 784)),
        ("fc1.bias", (128,)),
        ("fc2.weight", (128, 128)),
        ("fc2.bias", (128,)),
        ("fc3.weight", (10, 128)),
        ("fc3.bias", (10,)),
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(5, 3), (5, 4, 3), (5, 4, 3, 3), (5, 2, 4, 3, 3)])
def test_logits_equal_those_of_an_nn_sequential(activation: str, widths: tuple[int, ...]):
    """The flat order is `state_dict` order: no other gives these scores."""
    torch.manual_seed(0)
    reference = sequential(widths, activation, torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64, generator=draw())

    actual = Mlp(widths, activation).logits(flat(reference), x)

    torch.testing.assert_close(actual, reference(x).detach(), rtol=1e-13, atol=1e-14)


def test_split_gives_views_in_flat_order():
    """Writing through the parts rewrites θ, from its first entry to its last."""
    mlp = Mlp((3, 2, 2))
    theta = torch.zeros(mlp.dim)
    start = 0
    for part in mlp.split(theta).values():
        part.copy_(torch.arange(start, start + part.numel()).view(part.shape))
        start += part.numel()

    assert torch.equal(theta, torch.arange(mlp.dim, dtype=torch.float32))


@pytest.mark.parametrize("leading", [(1,), (4,), (2, 3)], ids=str)
def test_split_of_a_stack_gives_views_of_every_network(leading: tuple[int, ...]):
    """As splitting each alone does; writing through a part rewrites the stack."""
    mlp = Mlp((3, 4, 2))
    theta = torch.randn(*leading, mlp.dim, generator=draw(), dtype=torch.float64)

    parts = mlp.split(theta)

    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        name: (*leading, *shape) for name, shape in mlp.shapes.items()
    }
    for index in itertools.product(*map(range, leading)):
        for name, alone in mlp.split(theta[index].clone()).items():
            assert torch.equal(parts[name][index], alone)
    for part in parts.values():
        part.zero_()
    assert not theta.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_round_trips_bit_for_bit(dtype: torch.dtype):
    mlp = Mlp((5, 4, 3), "tanh")
    theta = mlp.initial(draw(), dtype)

    again, theta_again = from_state_dict(mlp.state_dict(theta), "tanh")

    assert again == mlp
    assert theta_again.dtype == dtype
    assert torch.equal(theta_again, theta)


def test_state_dict_is_a_copy():
    mlp = Mlp((5, 4, 3))
    theta = mlp.initial(draw(), torch.float32)
    state = mlp.state_dict(theta)
    before = {name: tensor.clone() for name, tensor in state.items()}

    theta.zero_()

    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all(not tensor.requires_grad for tensor in state.values())


def test_initial_is_linear_s_own_distribution():
    """Uniform in ±1/√fan_in for weights and biases: bound kept, nearly reached, and centred."""
    parts = PAPER.split(PAPER.initial(draw(), torch.float64))

    for i, fan_in in enumerate((784, 128, 128), start=1):
        bound = 1 / math.sqrt(fan_in)
        for kind in ("weight", "bias"):
            values = parts[f"fc{i}.{kind}"]
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.6 * bound
        weight = parts[f"fc{i}.weight"]
        deviation = bound / math.sqrt(3)
        assert abs(float(weight.std()) / deviation - 1) < 0.05
        assert abs(float(weight.mean())) < 5 * deviation / math.sqrt(weight.numel())


def test_initial_depends_on_its_generator_alone():
    mlp = Mlp((5, 4, 3))
    first = mlp.initial(draw(1), torch.float32)
    torch.manual_seed(99)

    assert torch.equal(mlp.initial(draw(1), torch.float32), first)
    assert not torch.equal(mlp.initial(draw(2), torch.float32), first)
    assert torch.isfinite(first).all()


def test_foreign_names_are_accepted():
    """What an nn.Sequential, or a wrapped module, calls its layers does not matter."""
    module = sequential((5, 4, 3), "relu", torch.float32)
    wrapped = nn.ModuleDict({"module": nn.Module()})
    wrapped["module"].fc1, wrapped["module"].out = module[0], module[2]

    for state in (module.state_dict(), wrapped.state_dict()):
        mlp, theta = from_state_dict(state, "relu")
        assert mlp == Mlp((5, 4, 3), "relu")
        assert torch.equal(theta, flat(module))
    assert next(iter(module.state_dict())) == "0.weight"
    assert next(iter(wrapped.state_dict())) == "module.fc1.weight"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_become_float32(dtype: torch.dtype):
    state = {name: t.to(dtype) for name, t in Mlp((5, 4, 3)).state_dict(torch.rand(39)).items()}

    _, theta = from_state_dict(state, "sigmoid")

    assert theta.dtype == torch.float32
    torch.testing.assert_close(theta[:20], state["fc1.weight"].float().reshape(-1), rtol=0, atol=0)


GOOD = Mlp((5, 4, 3)).state_dict(torch.linspace(-1, 1, 39))


def without(*names: str) -> dict[str, object]:
    return {name: tensor for name, tensor in GOOD.items() if name not in names}


def reordered(*names: str) -> dict[str, object]:
    return {name: GOOD[name] for name in names}


BROKEN: list[tuple[str, dict[str, object], list[str]]] = [
    ("empty", {}, ["empty", "fc1.weight"]),
    ("no first bias", without("fc1.bias"), ["fc1.weight", "fc2.weight"]),
    ("no last bias", without("fc2.bias"), ["fc2.weight"]),
    ("no weight", without("fc1.weight"), ["fc1.bias", "fc2.weight"]),
    (
        "bias first",
        reordered("fc1.bias", "fc1.weight", "fc2.weight", "fc2.bias"),
        ["fc1.bias", "fc1.weight"],
    ),
    ("bias too long", {**GOOD, "fc1.bias": torch.zeros(5)}, ["fc1.weight", "fc1.bias"]),
    ("bias a matrix", {**GOOD, "fc1.bias": torch.zeros(4, 1)}, ["fc1.weight", "fc1.bias"]),
    ("weight a vector", {**GOOD, "fc2.weight": torch.zeros(12)}, ["fc2.weight"]),
    ("no chain", {**GOOD, "fc2.weight": torch.zeros(3, 7)}, ["fc2.weight", "7", "4"]),
    ("convolution", {**GOOD, "fc1.weight": torch.zeros(4, 1, 3, 3)}, ["fc1.weight"]),
    ("not a number", {**GOOD, "fc1.bias": torch.full((4,), math.nan)}, ["fc1.bias", "NaN"]),
    ("infinity", {**GOOD, "fc2.weight": torch.full((3, 4), math.inf)}, ["fc2.weight"]),
    ("integers", {**GOOD, "fc2.bias": torch.zeros(3, dtype=torch.int64)}, ["fc2.bias", "dtype"]),
    ("no tensor", {**GOOD, "fc2.bias": [0.0, 0.0, 0.0]}, ["fc2.bias", "list"]),
    ("a module's state inside", {"model": GOOD}, ["model", "dict"]),
    ("foreign key", {**GOOD, "norm.scale": torch.zeros(3)}, ["norm.scale"]),
]


@pytest.mark.parametrize(("state", "named"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_is_no_network_is_refused_by_name(state: dict[str, object], named: list[str]):
    with pytest.raises(WeightsError) as caught:
        from_state_dict(state, "sigmoid")

    for part in named:
        assert re.search(rf"(?<![\w.]){re.escape(part)}(?![\w.])", str(caught.value)), caught.value
