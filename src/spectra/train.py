"""Optimise one network at one strength, until the training loss stops falling.

The loss that is watched is evaluated over the whole training set at the end of every epoch,
not averaged over the epoch's moving weights, so the numbers of the best epoch are facts about
the weights that are returned. The objective L_eff is watched by default. Watching the
cross-entropy instead, as the published sweep did, is possible, but with the best epoch restored
it favours the epoch in which the penalty has acted least: in an upward sweep, the first.

The starting weights are not a candidate for the best epoch: in a chain of strengths they were
the best of many at the strength before, and would win by selection over honest new ones.

Letters: P parameters, N examples, D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.backprop import Backprop
from spectra.errors import DivergedError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, evaluate


@dataclass(frozen=True)
class Optimisation:
    """How to descend and when to stop; the fields are those of the `train` parameters.

    `threads` are those of a step. At batch 64 a second one gains a quarter on an idle machine
    and costs a factor of ten where another program wants the core: every one of the fifteen
    small operations of a step then waits for a thread that is not running.
    """

    optimizer: str = "adam"
    lr: float = 0.0015
    momentum: float = 0.9
    batch_size: int = 64
    max_epochs: int = 50
    patience: int = 5
    monitor: str = "objective"
    threads: int = 1


@dataclass(frozen=True)
class Examples:
    """Labelled examples in memory: inputs (N, D) and labels (N,)."""

    inputs_ND: Tensor
    labels_N: Tensor


@dataclass(frozen=True)
class Epoch:
    """Facts about the weights at the end of an epoch, over whole data sets; losses in nats."""

    epoch: int
    cross_entropy: float
    objective: float
    accuracy: float
    test_cross_entropy: float
    test_accuracy: float
    theta_norm: float


@dataclass(frozen=True)
class Trained:
    """The weights θ_P of the best epoch, that epoch, and the whole course."""

    theta_P: Tensor
    best: Epoch
    history: tuple[Epoch, ...]


def train(
    mlp: Mlp,
    theta_P: Tensor,
    *,
    data: Examples,
    test: Examples,
    penalty: L2Penalty,
    how: Optimisation,
    generator: torch.Generator,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> Trained:
    """Train from θ_P and return the weights of the best epoch.

    Args:
        mlp: The network.
        theta_P: Where to start; not changed.
        data: What is learnt from, in a new random order every epoch.
        test: What is only evaluated.
        penalty: Added to the mean cross-entropy.
        how: The optimiser and when it stops.
        generator: Draws the orders; on the CPU.
        on_epoch: Told of every epoch.

    Raises:
        DivergedError: The objective became NaN or infinite.
    """
    theta_P = theta_P.clone()
    gradient = Backprop(mlp, theta_P)
    theta_P.grad = gradient.gradient_P
    optimizer = _optimizer(theta_P, how)
    history: list[Epoch] = []
    best, best_theta_P, stale = None, theta_P, 0
    for number in range(1, how.max_epochs + 1):
        _one_pass(gradient, theta_P, data, penalty, how, generator, optimizer)
        epoch = _measure(number, mlp, theta_P, data, test, penalty)
        history.append(epoch)
        on_epoch(epoch)
        if not math.isfinite(epoch.objective):
            raise DivergedError(
                f"training at L2 {penalty.l2:g} left the finite numbers in epoch {number} "
                f"(objective {epoch.objective}); lower train.lr, now {how.lr:g}"
            )
        if best is None or _watched(epoch, how) < _watched(best, how):
            best, best_theta_P, stale = epoch, theta_P.clone(), 0
        else:
            stale += 1
            if stale >= how.patience:
                break
    assert best is not None
    return Trained(best_theta_P, best, tuple(history))


@torch.no_grad()
def _one_pass(
    gradient: Backprop,
    theta_P: Tensor,
    data: Examples,
    penalty: L2Penalty,
    how: Optimisation,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer,
) -> None:
    order = torch.randperm(len(data.labels_N), generator=generator).to(data.labels_N.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(how.threads)
    try:
        for batch in order.split(how.batch_size):
            gradient_P = gradient(
                data.inputs_ND.index_select(0, batch), data.labels_N.index_select(0, batch)
            )
            penalty.add_gradient_(gradient_P, theta_P)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)


def _measure(
    number: int, mlp: Mlp, theta_P: Tensor, data: Examples, test: Examples, penalty: L2Penalty
) -> Epoch:
    loss, accuracy = evaluate(mlp.logits, theta_P, data.inputs_ND, data.labels_N)
    test_loss, test_accuracy = evaluate(mlp.logits, theta_P, test.inputs_ND, test.labels_N)
    return Epoch(
        epoch=number,
        cross_entropy=loss,
        objective=loss + penalty.value(theta_P),
        accuracy=accuracy,
        test_cross_entropy=test_loss,
        test_accuracy=test_accuracy,
        theta_norm=float(theta_P.double().norm()),
    )


def _watched(epoch: Epoch, how: Optimisation) -> float:
    return epoch.objective if how.monitor == "objective" else epoch.cross_entropy


def _optimizer(theta_P: Tensor, how: Optimisation) -> torch.optim.Optimizer:
    if how.optimizer == "adam":
        return torch.optim.Adam([theta_P], lr=how.lr, fused=True)
    return torch.optim.SGD([theta_P], lr=how.lr, momentum=how.momentum, fused=True)
