"""Whether a module is a network that the fused product knows, and its weights in its order.

A network is taken for one by what it computes and not by its classes: its parameters form a
chain of affine maps, and with one of the known activations between them it agrees with the
written-out network at random weights and inputs in float64, and at its own weights on all of
the data. Networks written as `nn.Sequential`, as a class with activations as functions, with
dropout at rest or with `nn.Flatten` in front are then all the same, and the order of the vector
is proven with them.

Letters: P parameters, N examples, D inputs, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spectra.activations import ACTIVATIONS
from spectra.curvature.batch_loss import BatchLoss
from spectra.curvature.batches import BATCH, Batches
from spectra.curvature.point import Point, trainable
from spectra.errors import UsageError, WeightsError
from spectra.mlp import Mlp, from_state_dict

_PROBES, _SCALE = 128, 10
"""Random examples that a network is compared on, and how much larger than usual the random
weights are: the first hidden units then reach from −15 to 15, past every bend in use."""


@dataclass(frozen=True)
class FullyConnected:
    """A network, its weights and its data, as the fused product takes them."""

    mlp: Mlp
    theta_P: Tensor
    inputs_ND: Tensor
    labels_N: Tensor


def fully_connected(
    model: nn.Module, loss: BatchLoss, batches: Batches, *, memory: int
) -> FullyConnected:
    """What the fused product needs of a network under the mean cross-entropy.

    Args:
        model: The network, whose vector is its parameters in the order of `named_parameters()`.
        loss: A cross-entropy without weights or smoothing.
        batches: Tensors: inputs with a line an example, and integer labels.
        memory: Bytes that they may take where they stream in.

    Raises:
        UsageError: The fused product does not apply, and why; or see `Point`.
    """
    point = Point(model)
    if not loss.plain_cross_entropy:
        raise UsageError("the loss is not a plain cross-entropy")
    if any(not p.requires_grad for p in model.parameters()):
        raise UsageError("some parameters are frozen")
    try:
        chain, theta_P = from_state_dict(trainable(model), "sigmoid")
    except WeightsError as error:
        raise UsageError(f"the network is no chain of affine maps with biases: {error}") from error
    inputs, labels_N = _classified(batches, memory)
    if inputs.dtype != point.theta_P.dtype:
        raise UsageError(f"inputs are {inputs.dtype} and parameters {point.theta_P.dtype}")
    if inputs[0].numel() != chain.widths[0]:
        shape = tuple(inputs.shape[1:])
        raise UsageError(f"an example has shape {shape}, not {chain.widths[0]} inputs")
    if not 0 <= int(labels_N.min()) <= int(labels_N.max()) < chain.widths[-1]:
        raise UsageError(f"the labels are not all in 0..{chain.widths[-1] - 1}")
    for activation in ACTIVATIONS:
        mlp = replace(chain, activation=activation)
        if _computes(point, mlp, inputs):
            return FullyConnected(mlp, theta_P.to(inputs.device), inputs.flatten(1), labels_N)
    raise UsageError(
        f"the network is not affine maps with one of {', '.join(ACTIVATIONS)} between them"
    )


def _classified(batches: Batches, memory: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels in memory."""
    pair = batches.together(memory)
    if pair is None or not len(pair[0]):
        raise UsageError(
            "it needs the data as tensors (inputs, targets) or batches of such, of at most "
            f"graph_bytes={memory} bytes where they stream in"
        )
    inputs, labels_N = pair
    if labels_N.dtype != torch.int64 or labels_N.ndim != 1:
        raise UsageError("the targets are not a vector of integer labels")
    if inputs.ndim < 2:
        raise UsageError("the inputs have no second dimension")
    return inputs, labels_N


@torch.no_grad()
def _computes(point: Point, mlp: Mlp, inputs: Tensor) -> bool:
    """Whether a network is this one: at random weights and inputs, and at θ on the data."""

    def equal(theta_P: Tensor, x: Tensor) -> bool:
        try:
            actual_NC = point(x, theta_P)
        except Exception:  # whatever a network does to data that it was not made for
            return False
        expected_NC = mlp.logits(theta_P, x.flatten(1))
        if not isinstance(actual_NC, Tensor) or actual_NC.shape != expected_NC.shape:
            return False
        error, bound = (actual_NC - expected_NC).abs().max(), expected_NC.abs().max()
        return bool(error <= torch.finfo(x.dtype).eps ** 0.5 * bound)

    draw = torch.Generator().manual_seed(0)
    shape = (_PROBES, *inputs.shape[1:])
    x = torch.randn(shape, generator=draw, dtype=torch.float64).to(inputs.device)
    theta_P = _SCALE * mlp.initial(draw, torch.float64).to(inputs.device)
    return equal(theta_P, x) and all(equal(point.theta_P, x) for x in inputs.split(BATCH))
