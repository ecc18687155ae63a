"""Optimise networks, each at its strength, until their training losses stop falling.

The loss that is watched is evaluated over the whole training set at the end of every epoch,
not averaged over the epoch's moving weights, so the numbers of the best epoch are facts about
the weights that are returned. The objective L_eff is watched by default. Watching the
cross-entropy instead, as the published sweep did, is possible, but with the best epoch restored
it favours the epoch in which the penalty has acted least: in an upward sweep, the first.

The starting weights are not a candidate for the best epoch: in a chain of strengths they were
the best of many at the strength before, and would win by selection over honest new ones.

Several networks of one architecture train together as a stack: every operation of a step is
done for all of them at once, which is what keeps a GPU busy at batch 64. Members share nothing
else: each has its own start, strength and order of examples, and one that has stopped leaves
the stack. A lone network is a stack of one, so there is one step and one rule for stopping.

Letters: M networks, P parameters, N examples, D inputs, B examples of a batch, C classes.

Source: D. P. Kingma, J. Ba, Adam: a method for stochastic optimization (ICLR 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from spectra import runtime
from spectra.backprop import Layers
from spectra.errors import DivergedError
from spectra.inputs import Inputs, inputs_of
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum
from spectra.streams import Aside, Graph

_PIECES = 36
"""Tensors that one launch of PyTorch's fused Adam takes on a GPU."""
_TOGETHER = 8
"""Steps of a GPU's graph: the start of one costs as much as two of their kernels."""


@dataclass(frozen=True)
class Optimisation:
    """How to descend and when to stop; the fields are those of the `train` parameters.

    `threads` are those of a step and of an evaluation. At batch 64 a second one gains little on an
    idle machine and costs a factor of ten where another program wants the core: every one of the
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

    @cached_property
    def inputs(self) -> Inputs:
        """The inputs as products take them; divided once."""
        return inputs_of(self.inputs_ND, self.labels_N)


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
    descent = _Descent(mlp, theta_MP, data, penalties, how)
    left, count = members, len(data.labels_N)
    with runtime.threads(how.threads):
        for number in range(1, how.max_epochs + 1):
            descent.one_pass([torch.randperm(count, generator=m.generator) for m in left])
            for member, theta_P in zip(left, descent.theta_MP, strict=True):
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


class _Descent:
    """The parameters while they are trained, with gradients and the optimiser's moments.

    PyTorch's fused optimiser kernels are called directly: at batch 64 the optimiser objects
    around them take longer than the kernels. Where all members have one strength, the penalty is
    the kernels' `weight_decay`, which adds the same 2c θ without another pass over memory.

    On a GPU some steps are captured once as a graph and replayed: nothing is launched one by one
    and the host is asked nothing until the epoch is over. What only the optimiser waits for, such
    as the gradients of a layer, is computed beside the signals that go on down. The optimiser is
    given the parameters in pieces: it has one block of threads for each 65,536 entries of a
    tensor, two for a whole small network.
    """

    def __init__(
        self,
        mlp: Mlp,
        theta_MP: Tensor,
        data: Examples,
        penalties: Sequence[L2Penalty],
        how: Optimisation,
    ) -> None:
        self._mlp, self._data, self._penalties, self._how = mlp, data, penalties, how
        self.theta_MP = theta_MP.detach().clone()
        self._gradient_MP = torch.zeros_like(self.theta_MP)
        self._moments = [torch.zeros_like(self.theta_MP) for _ in range(2)]
        self._steps = torch.zeros((), device=theta_MP.device)
        shifts = [penalty.shift for penalty in penalties]
        self._shift = shifts[0] if len(set(shifts)) == 1 else None
        self._shift_M1 = theta_MP.new_tensor(shifts)[:, None]
        self._reference_P = penalties[0].reference_P
        self._layers = Layers(mlp, self.theta_MP)
        self._onehot_NC = self._layers.onehot(data.labels_N)
        parts = list(mlp.split(self._gradient_MP).values())
        self._gradients = list(zip(parts[0::2], parts[1::2], strict=True))
        self._graph: Graph[None] | None = None
        self._aside = Aside(theta_MP.device)
        self._pieces = [
            tensor.view(-1).split(_piece(tensor))
            for tensor in (self.theta_MP, self._gradient_MP, *self._moments)
        ]

    def only(self, stay: Sequence[int]) -> _Descent:
        """The same, of some members only."""
        penalties = [self._penalties[i] for i in stay]
        rest = _Descent(self._mlp, self.theta_MP[stay], self._data, penalties, self._how)
        for held_MP, moment_MP in zip(rest._moments, self._moments, strict=True):
            held_MP.copy_(moment_MP[stay])
        rest._steps = self._steps
        return rest

    @torch.no_grad()
    def one_pass(self, orders: Sequence[Tensor]) -> None:
        """A step for every batch of each member's order of the examples."""
        orders_MN = torch.stack(list(orders)).to(self.theta_MP.device)
        together = _TOGETHER * self._how.batch_size
        for batches_MB in orders_MN.split(together, dim=1):
            if batches_MB.is_cuda and batches_MB.shape[1] == together:
                self._replay(batches_MB)
            else:
                self._steps_of(batches_MB)

    def _steps_of(self, batches_MB: Tensor) -> None:
        for batch_MB in batches_MB.split(self._how.batch_size, dim=1):
            self._step(batch_MB)

    def _replay(self, batches_MB: Tensor) -> None:
        if self._graph is None:
            self._graph = Graph(
                self._steps_of, batches_MB, urgent=True,
                unchanged=[self.theta_MP, self._steps, *self._moments],
            )  # fmt: skip
        self._graph.replay(batches_MB)

    def _step(self, batch_MB: Tensor) -> None:
        """A step of the optimiser on L_eff of one batch a member."""
        how, decay = self._how, self._shift
        if how.optimizer == "adam":
            self._aside.do(partial(self._steps.add_, 1))
        self._differentiate(batch_MB)
        if decay is None:
            self._gradient_MP.addcmul_(self.theta_MP, self._shift_M1)
        if self._reference_P is not None:
            self._gradient_MP.addcmul_(self._reference_P, self._shift_M1, value=-1)
        theta, gradient, first, second = self._pieces
        if how.optimizer == "adam":
            torch._fused_adam_(
                theta, gradient, first, second, [], [self._steps] * len(theta),
                lr=how.lr, beta1=0.9, beta2=0.999, weight_decay=decay or 0.0, eps=1e-8,
                amsgrad=False, maximize=False,
            )  # fmt: skip
        else:
            torch._fused_sgd_(
                theta, gradient, first if how.momentum else [],
                weight_decay=decay or 0.0, momentum=how.momentum, lr=how.lr, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip

    def _differentiate(self, batch_MB: Tensor) -> None:
        """Write the gradients of the mean cross-entropy of one batch a member."""
        layers = self._layers
        onehot_MBC = self._aside.do(partial(torch.embedding, self._onehot_NC, batch_MB))
        x_MBD = torch.embedding(self._data.inputs_ND, batch_MB)
        forward = layers.forward(torch.baddbmm(layers.rows[0], x_MBD, layers.transposed[0]))
        below = [x_MBD, *forward.hidden]
        self._aside.join()
        delta_MBC = layers.loss_signal(forward.scores_MCN, onehot_MBC, batch_MB.shape[1])
        for layer, delta_MBH, _ in layers.signals(forward, delta_MBC):
            of_layer = partial(self._gradients_of, layer, delta_MBH, below[layer])
            if layer:
                self._aside.do(of_layer)
            else:
                of_layer()
        self._aside.join()

    def _gradients_of(self, layer: int, delta_MBH: Tensor, below_MBI: Tensor) -> None:
        weight, bias = self._gradients[layer]
        torch.bmm(delta_MBH.mT, below_MBI, out=weight)
        torch.sum(delta_MBH, 1, out=bias)


def _piece(tensor: Tensor) -> int:
    """Entries of a piece: all on a CPU, on a GPU as many as one launch of the kernel can share out.

    There they begin at multiples of four, where a thread can read four floats at once.
    """
    if not tensor.is_cuda:
        return tensor.numel()
    return 4 * math.ceil(tensor.numel() / (4 * _PIECES))


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
    layers, inputs = Layers(mlp, theta_P[None]), examples.inputs
    table = inputs.columns.table(layers.weights[0][0], layers.biases[0][0])
    loss = torch.zeros((), dtype=torch.float64, device=theta_P.device)
    hits = torch.zeros((), dtype=torch.int64, device=theta_P.device)
    for chunk, y in zip(inputs.chunks, inputs.split(examples.labels_N), strict=True):
        scores_nC = layers.forward(chunk.times(table)[None]).scores_MCN[0].t()
        loss += cross_entropy_sum(scores_nC, y, exact=True)
        hits += (scores_nC.argmax(dim=1) == y).sum()
    return float(loss) / len(examples.labels_N), 100 * int(hits) / len(examples.labels_N)


def _watched(epoch: Epoch, how: Optimisation) -> float:
    return epoch.objective if how.monitor == "objective" else epoch.cross_entropy
