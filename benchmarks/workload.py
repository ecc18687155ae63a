"""The work: images, trained networks and the size of a run, the same for every contender.

The networks are trained by `spectra` and kept in `build/bench` until its numerics change, for a
Hessian at random weights is an easier matrix than one at a solution: one network in the learnt
phase, trained once from scratch as the published recipe would, and one in the trivial phase, led
there along a chain of strengths as a sweep leads its networks: the penalty has pushed the hidden
layers to zero, nine eigenvalues stand out and the rest of the thirty lie close together.

Letters: N examples, D inputs, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spectra import idx
from spectra.mlp import Mlp

MEAN, STD = 0.1307, 0.3081
"""Of MNIST's pixels; the normalisation of the published recipe."""

LR, BATCH = 0.0015, 64
"""Adam's, in the published recipe."""

CHAINS = {"learnt": (0.001,), "trivial": (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)}
"""The networks and the λ they were trained at, one from the other; the last is the network's."""

HIDDEN = (128, 128)
_LIMIT = 1 << 30


@dataclass(frozen=True)
class Size:
    """How much of everything a run does.

    Attributes:
        k, rtol: The pairs wanted and their relative residual.
        epochs: Of the training of the networks, and of the whole strength.
        rounds: Times that everything is repeated.
        budget_s: A contender that has taken longer than this sits out the later rounds.
        stop_s: The bound on a solver that would not come to an end.
    """

    k: int = 30
    rtol: float = 1e-3
    epochs: int = 6
    rounds: int = 5
    budget_s: float = 25.0
    stop_s: float = 25.0


QUICK = Size(k=5, epochs=2, rounds=2, budget_s=0.3, stop_s=1.0)


@dataclass(frozen=True)
class Digits:
    """Labelled images: as bytes, for who reads them anew each time, and normalised, in memory."""

    pixels_ND: Tensor
    inputs_ND: Tensor
    labels_N: Tensor

    @classmethod
    def of(cls, pixels_ND: Tensor, labels_N: Tensor, device: torch.device) -> Digits:
        """Normalise on the CPU and move to the device."""
        inputs_ND = pixels_ND.float().div_(255).sub_(MEAN).div_(STD)
        return cls(pixels_ND, inputs_ND.to(device), labels_N.to(device))

    def first(self, count: int) -> Digits:
        """The first `count` of them."""
        return Digits(self.pixels_ND[:count], self.inputs_ND[:count], self.labels_N[:count])


@dataclass(frozen=True, eq=False)
class Problem:
    """A network at its weights θ_P, the strength it belongs to, and the data."""

    name: str
    mlp: Mlp
    theta_P: Tensor
    l2: float
    train: Digits
    test: Digits
    threads: int
    size: Size

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.theta_P.device

    def module(self) -> nn.Sequential:
        """The network as an ordinary PyTorch module whose parameters, in order, are θ_P."""
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(self.mlp.widths, self.mlp.widths[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.Sigmoid()]
        model = nn.Sequential(*layers[:-1]).to(self.device)
        nn.utils.vector_to_parameters(self.theta_P.clone(), model.parameters())
        return model

    def of_size(self, examples: int) -> Problem:
        """The same on the first examples only."""
        return replace(self, train=self.train.first(examples))

    def of_width(self, width: int) -> Problem:
        """A fresh network with hidden layers of another width."""
        mlp = Mlp((self.mlp.widths[0], width, width, self.mlp.widths[-1]))
        theta_P = mlp.initial(torch.Generator().manual_seed(width), torch.float32)
        return replace(self, mlp=mlp, theta_P=theta_P.to(self.device))


def read(folder: Path, device: torch.device) -> tuple[Digits, Digits]:
    """Training and test digits of a folder of IDX files, gzipped or not.

    Raises:
        DataError: They are not there.
    """
    arrays = idx.arrays(idx.read_set(folder, limit=_LIMIT))

    def digits(names: tuple[str, str]) -> Digits:
        images, labels = (torch.from_numpy(arrays[name].copy()) for name in names)
        return Digits.of(images.reshape(len(images), -1), labels.long(), device)

    return digits(idx.TRAIN), digits(idx.TEST)


def fetch(folder: Path) -> None:
    """Have MNIST in its folder, as `spectra data` does."""
    from spectra import data
    from spectra.params import DataParams

    data.ensure(DataParams(root=str(folder.parent)), say=print)


def problems(
    digits: tuple[Digits, Digits], *, threads: int, size: Size, kept: Path, names: list[str]
) -> dict[str, Problem]:
    """The networks, trained now or when they were first needed by this code."""
    from benchmarks import ours

    mlp = Mlp((digits[0].inputs_ND.shape[1], *HIDDEN, 10))
    device = digits[0].inputs_ND.device
    fresh_P = mlp.initial(torch.Generator().manual_seed(0), torch.float32).to(device)
    made, code = {}, _code()
    for name in names:
        chain = CHAINS[name]
        problem = Problem(name, mlp, fresh_P, chain[-1], *digits, threads, size)
        path = kept / code / f"{len(digits[0].labels_N)}-{name}-{len(chain)}-{size.epochs}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            led_P = ours.led(problem, chain) if len(chain) > 1 else ours.trained(problem)
            torch.save(led_P.cpu(), path)
        theta_P = torch.load(path, weights_only=True).to(device)
        made[name] = replace(problem, theta_P=theta_P)
    return made


def _code() -> str:
    """The digest that a sweep binds its results to, or of nothing where that is not installed."""
    try:
        from spectra import plan
    except ImportError:  # a bare machine, which had no earlier code either
        return "unknown"
    return plan.code_digest()
