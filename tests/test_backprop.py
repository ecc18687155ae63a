"""Back-propagation by hand against automatic differentiation of networks written out.

`Layers` leaves the first layer's products to its caller, so the tests do them: a_1 going up,
the gradient of W_1 and b_1 going down.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from spectra.activations import ACTIVATIONS
from spectra.backprop import Forward, Layers
from spectra.mlp import Mlp

WIDTHS = [(5, 3), (5, 4, 3), (5, 4, 2, 3), (5, 4, 6, 4, 3)]
every_depth = pytest.mark.parametrize("widths", WIDTHS, ids=str)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def problem(
    widths: tuple[int, ...], models: int, examples: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Different weights, different examples and different labels for every network."""
    draw = torch.Generator().manual_seed(len(widths))
    theta_MP = 0.7 * torch.randn(models, Mlp(widths).dim, generator=draw, dtype=torch.float64)
    x_MND = torch.randn(models, examples, 5, generator=draw, dtype=torch.float64)
    labels_MN = torch.randint(0, 3, (models, examples), generator=draw)
    return theta_MP.to(dtype), x_MND.to(dtype), labels_MN


def up(layers: Layers, x_MND: Tensor) -> Forward:
    first = torch.einsum("mnd,mhd->mnh", x_MND, layers.weights[0]) + layers.biases[0][:, None]
    return layers.forward(first)


def gradients(layers: Layers, x_MND: Tensor, labels_MN: Tensor, examples: int) -> Tensor:
    """∇ of Σ_n CE_n / examples for every network of the stack, flat: (M, P)."""
    forward = up(layers, x_MND)
    below = [x_MND, *forward.hidden]
    parts: list[Tensor] = []
    for signal in layers.signals(
        forward, layers.loss_signal(forward.scores_CN, layers.onehot(labels_MN), examples)
    ):
        weight = torch.einsum("mno,mni->moi", signal.delta_NH, below[signal.layer])
        parts = [weight.flatten(1), signal.delta_NH.sum(1), *parts]
    return torch.cat(parts, dim=1)


def by_autograd(
    widths: tuple[int, ...], activation: str, theta_MP: Tensor, x_MND: Tensor, labels_MN: Tensor
) -> Tensor:
    return torch.stack(
        [
            oracles.gradient(oracles.mean_loss(widths, activation, x, y), theta_P)
            for theta_P, x, y in zip(theta_MP, x_MND, labels_MN, strict=True)
        ]
    )


@every_depth
@every_activation
@pytest.mark.parametrize("models", [1, 3])
def test_gradients_equal_autograd(models: int, activation: str, widths: tuple[int, ...]):
    """Batches of 4, 4 and the ragged 3 of every network at once, to float64 round-off."""
    theta_MP, x_MND, labels_MN = problem(widths, models)
    layers = Layers(Mlp(widths, activation), theta_MP)

    for x, y in zip(x_MND.split(4, dim=1), labels_MN.split(4, dim=1), strict=True):
        expected_MP = by_autograd(widths, activation, theta_MP, x, y)
        assert (expected_MP.abs().amax(1) > 1e-3).all()
        actual_MP = gradients(layers, x, y, examples=y.shape[1])
        torch.testing.assert_close(actual_MP, expected_MP, **EXACT)


@every_depth
def test_scores_are_those_of_the_network_written_out(widths: tuple[int, ...]):
    """And what is kept on the way up is a and φ(a), layer by layer."""
    theta_MP, x_MND, _ = problem(widths, 3)

    forward = up(Layers(Mlp(widths, "gelu"), theta_MP), x_MND)

    for m in range(3):
        expected_NC = oracles.logits(widths, "gelu", theta_MP[m], x_MND[m])
        torch.testing.assert_close(forward.scores_CN[m].T, expected_NC, **EXACT)
    assert [tuple(a.shape) for a in forward.pre] == [(3, 11, width) for width in widths[1:-1]]
    for a, h in zip(forward.pre, forward.hidden, strict=True):
        torch.testing.assert_close(h, oracles.FORMULAS["gelu"](a), **EXACT)


def test_networks_of_a_stack_do_not_see_each_other():
    """A network gone to NaN leaves its neighbours' scores and gradients as they were."""
    widths = (5, 4, 2, 3)
    theta_MP, x_MND, labels_MN = problem(widths, 3)
    alone_MP = gradients(Layers(Mlp(widths), theta_MP), x_MND, labels_MN, 11)

    theta_MP[1] = torch.nan
    broken_MP = gradients(Layers(Mlp(widths), theta_MP), x_MND, labels_MN, 11)

    assert broken_MP[1].isnan().all()
    assert torch.equal(broken_MP[[0, 2]], alone_MP[[0, 2]])


def test_parameters_changed_in_place_are_seen():
    """An optimiser steps on θ itself; the next gradient is that of the new θ."""
    widths = (5, 4, 2, 3)
    theta_MP, x_MND, labels_MN = problem(widths, 3)
    layers = Layers(Mlp(widths), theta_MP)
    before_MP = gradients(layers, x_MND, labels_MN, 11)

    theta_MP.add_(0.3)

    expected_MP = by_autograd(widths, "sigmoid", theta_MP, x_MND, labels_MN)
    torch.testing.assert_close(gradients(layers, x_MND, labels_MN, 11), expected_MP, **EXACT)
    assert ((expected_MP - before_MP).abs().amax(1) > 1e-3).all()


@every_depth
def test_arguments_are_left_alone(widths: tuple[int, ...]):
    """Parameters, pre-activations, scores and labels are read, never written."""
    theta_MP, x_MND, labels_MN = problem(widths, 2)
    layers = Layers(Mlp(widths, "relu"), theta_MP)
    first = torch.einsum("mnd,mhd->mnh", x_MND, layers.weights[0]) + layers.biases[0][:, None]
    forward = layers.forward(first)
    delta_MNC = layers.loss_signal(forward.scores_CN, layers.onehot(labels_MN), 11)
    held = [theta_MP, labels_MN, first, delta_MNC, *forward.pre, *forward.hidden]
    held.append(forward.scores_CN)
    copies = [tensor.clone() for tensor in held]

    layers.loss_signal(forward.scores_CN, layers.onehot(labels_MN), 11)
    list(layers.signals(forward, delta_MNC))

    assert all(torch.equal(t, copy) for t, copy in zip(held, copies, strict=True))


def test_the_loss_signal_is_the_softmax_less_the_label_over_the_examples():
    """Rows sum to nothing; a label's entry is p − 1; `examples` may be more than the batch."""
    draw = torch.Generator().manual_seed(1)
    scores_MCN = 3 * torch.randn(2, 4, 7, generator=draw, dtype=torch.float64)
    labels_MN = torch.randint(0, 4, (2, 7), generator=draw)
    layers = Layers(Mlp((5, 4)), torch.zeros(2, Mlp((5, 4)).dim, dtype=torch.float64))

    delta_MNC = layers.loss_signal(scores_MCN, layers.onehot(labels_MN), 100)

    assert delta_MNC.shape == (2, 7, 4)
    torch.testing.assert_close(delta_MNC.sum(2), torch.zeros(2, 7).double(), atol=1e-17, rtol=0)
    for m, n in [(m, n) for m in range(2) for n in range(7)]:
        p_C = scores_MCN[m, :, n].exp() / scores_MCN[m, :, n].exp().sum()
        p_C[labels_MN[m, n]] -= 1
        torch.testing.assert_close(delta_MNC[m, n], p_C / 100, **EXACT)


@every_depth
def test_signals_go_down_layer_by_layer_with_the_error_they_come_from(widths: tuple[int, ...]):
    """δ is e φ'(a), and e is ∂L/∂h, by automatic differentiation; at the top there is none."""
    theta_MP, x_MND, labels_MN = problem(widths, 1)
    layers = Layers(Mlp(widths, "tanh"), theta_MP)
    forward = up(layers, x_MND)

    signals = list(
        layers.signals(forward, layers.loss_signal(forward.scores_CN, layers.onehot(labels_MN), 11))
    )

    last = len(widths) - 2
    assert [signal.layer for signal in signals] == list(range(last, -1, -1))
    assert [signal.error_NH is None for signal in signals] == [True] + [False] * last
    for signal in signals[1:]:
        h_NH = forward.hidden[signal.layer][0]
        rest_P = theta_MP[0, Mlp(widths[: signal.layer + 2]).dim :]
        loss = _loss_from(widths[signal.layer + 1 :], rest_P, labels_MN[0])
        assert signal.error_NH is not None
        torch.testing.assert_close(signal.error_NH[0], oracles.gradient(loss, h_NH), **EXACT)
        slope_NH = 1 - h_NH.square()
        torch.testing.assert_close(signal.delta_NH, signal.error_NH * slope_NH, **EXACT)


def _loss_from(widths: tuple[int, ...], theta_P: Tensor, labels_N: Tensor):  # noqa: ANN202
    """The mean loss as a function of a hidden layer's values, with the layers above given."""
    return lambda h_NH: oracles.mean_loss(widths, "tanh", h_NH, labels_N)(theta_P)


def test_float32_stays_float32():
    widths = (5, 4, 3)
    theta_MP, x_MND, labels_MN = problem(widths, 2, dtype=torch.float32)

    gradient_MP = gradients(Layers(Mlp(widths), theta_MP), x_MND, labels_MN, 11)

    assert gradient_MP.dtype == torch.float32
    expected_MP = by_autograd(widths, "sigmoid", theta_MP.double(), x_MND.double(), labels_MN)
    torch.testing.assert_close(gradient_MP.double(), expected_MP, rtol=1e-5, atol=1e-7)
