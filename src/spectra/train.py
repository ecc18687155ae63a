"""Optimise networks, each at its strength, until their training losses stop falling.

The loss that is watched is evaluated over the whole training set at the end of every epoch,
not averaged over the epoch's moving weights, so the numbers of the best epoch are facts about
the weights that are returned. The objective L_eff is watched by default. Watching the
cross-entropy instead, as the published sweep did, is possible, but with the best epoch restored
it favours the epoch in which the penalty has acted least: in an upward sweep, the first.

The starting weights are not a candidate for the best epoch: in a chain of strengths they were
the best of many at the strength before, and would win by selection over honest new ones.

Several networks of one architecture train together as a stack. Members share the data and nothing
else: each has its own start, strength and order of examples, and one that has stopped leaves the
stack. A lone network is a stack of one, so there is one rule for stopping.

Letters: M networks, P parameters, N examples, D inputs, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from spectra import runtime
from spectra.backprop import Layers
from spectra.descent import Optimisation, descent_of
from spectra.errors import DivergedError
from spectra.inputs import Inputs, inputs_of
from spectra.minibatches import Rows, rows_of
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum


@dataclass(frozen=True)
class Examples:
    """Labelled examples in memory: inputs (N, D) and labels (N,)."""

    inputs_ND: Tensor
    labels_N: Tensor

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs as products take them; divided once."""
        return inputs_of(self.inputs_ND, self.labels_N)

    @cached_property
    def rows(self) -> Rows:
        """The inputs as a training step takes them; divided once."""
        return rows_of(self.inputs_ND)


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
    (outcome,) = train_stack(
        mlp, theta_P[None], data=data, test=test, penalties=[penalty], how=how,
        generators=[generator], on_epoch=lambda _, epoch: on_epoch(epoch),
    )  # fmt: skip
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome


def train_stack(
    mlp: Mlp,
    theta_MP: Tensor,
    *,
    data: Examples,
    test: Examples,
    penalties: Sequence[L2Penalty],
    how: Optimisation,
    generators: Sequence[torch.Generator],
    on_epoch: Callable[[int, Epoch], None] = lambda _, __: None,
) -> list[Trained | DivergedError]:
    """Train M networks together; each comes out as it would alone, but for float round-off.

    Args:
        mlp: Their architecture.
        theta_MP: Where they start; not changed.
        data: What all learn from, each in its own random order.
        test: What is only evaluated.
        penalties: A member's penalty each; the reference points, if any, are the same.
        how: The optimiser and when it stops.
        generators: A member's source of orders each; on the CPU.
        on_epoch: Told of every epoch of every member, with the member's number.

    Returns:
        What became of each: its weights, or why it has none.
    """
    members = [
        _Member(number, penalty, generator)
        for number, (penalty, generator) in enumerate(zip(penalties, generators, strict=True))
    ]
    descent = descent_of(mlp, theta_MP, data.rows, data.labels_N, penalties, how)
    left, count = members, len(data.labels_N)
    with runtime.threads(how.threads):
        for number in range(1, how.max_epochs + 1):
            descent.one_pass([torch.randperm(count, generator=m.generator) for m in left])
            for member, theta_P in zip(left, descent.parameters(), strict=True):
                epoch = _measure(number, mlp, theta_P, data, test, member.penalty)
                member.note(epoch, theta_P, how)
                on_epoch(member.number, epoch)
            if all(member.outcome for member in left):
                break
            if any(member.outcome for member in left):
                stay = [i for i, member in enumerate(left) if not member.outcome]
                left = [left[i] for i in stay]
                descent = descent.only(stay)
    if theta_MP.is_cuda:  # weights may be read in another stream from here on
        torch.cuda.current_stream().synchronize()
    return [member.outcome or member.trained() for member in members]


@dataclass
class _Member:
    """A network of a stack: how it has fared, and what became of it once it has stopped."""

    number: int
    penalty: L2Penalty
    generator: torch.Generator
    history: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    best_theta_P: Tensor | None = None
    stale: int = 0
    outcome: Trained | DivergedError | None = None

    def note(self, epoch: Epoch, theta_P: Tensor, how: Optimisation) -> None:
        """Take in an epoch, and stop if it was not finite or `patience` brought nothing."""
        self.history.append(epoch)
        if not math.isfinite(epoch.objective):
            self.outcome = DivergedError(
                f"training at L2 {self.penalty.l2:g} left the finite numbers in epoch "
                f"{epoch.epoch} (objective {epoch.objective}); lower train.lr, now {how.lr:g}"
            )
        elif self.best is None or _watched(epoch, how) < _watched(self.best, how):
            self.best, self.best_theta_P, self.stale = epoch, theta_P.clone(), 0
        else:
            self.stale += 1
            if self.stale >= how.patience:
                self.outcome = self.trained()

    def trained(self) -> Trained:
        """The best so far."""
        assert self.best is not None
        assert self.best_theta_P is not None
        return Trained(self.best_theta_P, self.best, tuple(self.history))


def _measure(
    number: int, mlp: Mlp, theta_P: Tensor, data: Examples, test: Examples, penalty: L2Penalty
) -> Epoch:
    loss, accuracy = evaluate(mlp, theta_P, data)
    test_loss, test_accuracy = evaluate(mlp, theta_P, test)
    return Epoch(
        epoch=number,
        cross_entropy=loss,
        objective=loss + penalty.value(theta_P),
        accuracy=accuracy,
        test_cross_entropy=test_loss,
        test_accuracy=test_accuracy,
        theta_norm=float(theta_P.double().norm()),
    )


@torch.no_grad()
def evaluate(mlp: Mlp, theta_P: Tensor, examples: Examples) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (percent), accumulated over chunks in float64."""
    layers, inputs = Layers(mlp, theta_P), examples.inputs
    table = inputs.columns.table(layers.weights[0], layers.biases[0])
    loss = torch.zeros((), dtype=torch.float64, device=theta_P.device)
    hits = torch.zeros((), dtype=torch.int64, device=theta_P.device)
    for chunk, y in zip(inputs.chunks, inputs.split(examples.labels_N), strict=True):
        scores_nC = layers.forward(chunk.times(table)).scores_CN.t()
        loss += cross_entropy_sum(scores_nC, y, exact=True)
        hits += (scores_nC.argmax(dim=1) == y).sum()
    return float(loss) / len(examples.labels_N), 100 * int(hits) / len(examples.labels_N)


def _watched(epoch: Epoch, how: Optimisation) -> float:
    return epoch.objective if how.monitor == "objective" else epoch.cross_entropy
