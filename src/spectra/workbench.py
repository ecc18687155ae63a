"""What every command needs on the bench: the process set up, the data in memory, the network.

This is where parameters become the objects that the numerics take.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectra import checkpoint, data, mlp, runtime
from spectra.descent import Optimisation
from spectra.errors import ParameterError, UsageError, WeightsError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.params import Params
from spectra.train import Examples

STACKS = {"cpu": 1, "cuda": 64}
"""Networks trained together by default. On a GPU, which one network does not fill, a stack of 64
takes six times as long as one. On a CPU members are trained in turn and a stack saves nothing: 4
take four times as long as one, 16 a quarter more than that, for their weights leave the cache."""
GPU_WORKERS = 2
"""Spectra computed at a time on a GPU: half of one's time is spent by the host."""


@dataclass(frozen=True)
class Workbench:
    """Data on the device, and the parameters as the numerics take them.

    Attributes:
        params: All parameters, with the device that is used in place of "auto".
        machine: Device, dtype and threads.
        train_set: What is learnt from, normalised.
        test_set: What is only evaluated.
        data_digest: Of the data set.
        reference: The reference point's weights and the SHA-256 of its file, or None.
    """

    params: Params
    machine: runtime.Runtime
    train_set: Examples
    test_set: Examples
    data_digest: str
    reference: tuple[Tensor, str] | None

    @property
    def network(self) -> Mlp:
        """The network of the parameters, as wide at its ends as the data wants it."""
        inputs = self.train_set.inputs_ND.shape[1]
        return Mlp((inputs, *self.params.model.hidden, 10), self.params.model.activation)

    @property
    def optimisation(self) -> Optimisation:
        """The `train` parameters."""
        return Optimisation(**self.params.train.model_dump(exclude={"stack"}))

    @property
    def reference_digest(self) -> str | None:
        """SHA-256 of the reference point's file, if there is one."""
        return self.reference[1] if self.reference else None

    @property
    def stack(self) -> int:
        """How many networks are trained together at most: what pays on the device, or as asked."""
        asked = self.params.train.stack
        return asked or STACKS[self.machine.device.type]

    @property
    def alone(self) -> bool:
        """Whether spectra are computed by threads of this program and not of the libraries."""
        wanted = self.params.spectrum
        return wanted.product == "fused" and wanted.solver == "lanczos"

    @property
    def workers(self) -> int:
        """Spectra computed at a time beside the training; none where libraries bring threads."""
        if not self.alone:
            return 0
        return self.params.runtime.threads if self.machine.device.type == "cpu" else GPU_WORKERS

    def penalty(self, l2: float) -> L2Penalty:
        """The penalty at a strength, in the convention and around the point asked for."""
        point = self.reference[0] if self.reference else None
        return L2Penalty(l2, self.params.objective.penalty, point)

    def penalty_at(self, l2: float, theta_P: Tensor, path: Path) -> L2Penalty:
        """The same for weights from a file, around whatever network they are of.

        Raises:
            UsageError: The reference point is not of their shape.
        """
        penalty = self.penalty(l2)
        if penalty.reference_P is not None and penalty.reference_P.shape != theta_P.shape:
            raise UsageError(f"objective.reference and {path} are not of the same shape")
        return penalty

    def initial(self, replicate: int) -> Tensor:
        """The seeded initial weights of a replicate."""
        drawn = runtime.generator(self.params.runtime.seed, replicate, "weights")
        return self.network.initial(drawn, self.machine.dtype).to(self.machine.device)

    def generator(self, replicate: int, purpose: str, l2: float) -> torch.Generator:
        """The generator for a purpose at a strength of a replicate."""
        return runtime.generator(self.params.runtime.seed, replicate, purpose, l2)

    def weights(self, path: Path) -> tuple[Mlp, Tensor]:
        """A network read from a file, on the device.

        Raises:
            WeightsError: It is not one, or does not fit the data.
        """
        state = checkpoint.load_state_dict(path)
        try:
            network, theta_P = mlp.from_state_dict(state, self.params.model.activation)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None
        wanted = self.train_set.inputs_ND.shape[1]
        if network.widths[0] != wanted:
            raise WeightsError(
                f"{path}: the network takes {network.widths[0]} inputs, the data have {wanted}"
            )
        classes = int(self.train_set.labels_N.max()) + 1
        if network.widths[-1] < classes:
            raise WeightsError(
                f"{path}: the network tells {network.widths[-1]} classes apart, the data have "
                f"{classes}"
            )
        theta_P = theta_P.to(self.machine.device, self.machine.dtype)
        if not bool(theta_P.isfinite().all()):
            raise WeightsError(
                f"{path}: some weights are beyond the range of {self.params.runtime.dtype}; "
                "use --dtype float64"
            )
        return network, theta_P


def open_bench(params: Params, say: Callable[[str], None]) -> Workbench:
    """Set up the process and read the data, fetching them if they are not there.

    Raises:
        DataError: The data cannot be had.
        ParameterError: The device is not there, or the reference point does not fit.
        WeightsError: The reference point's file is not a network.
    """
    machine = runtime.prepare(
        seed=params.runtime.seed, device=params.runtime.device, dtype=params.runtime.dtype,
        threads=params.runtime.threads,
    )  # fmt: skip
    # What "auto" has come to decides the last bits of a result, so that is what it is bound to.
    here = params.runtime.model_copy(update={"device": machine.device.type})
    params = params.model_copy(update={"runtime": here})
    data.ensure(params.data, say=say)
    loaded = data.load(params.data)

    def examples(split: data.Split) -> Examples:
        inputs_ND = split.inputs(
            mean=params.data.mean, std=params.data.std, dtype=machine.dtype, device=machine.device
        )
        return Examples(inputs_ND, split.labels_N.to(machine.device))

    train_set = examples(loaded.train)
    test_set = examples(loaded.test)
    bench = Workbench(params, machine, train_set, test_set, loaded.digest, None)
    if params.objective.reference is None:
        return bench
    path = Path(params.objective.reference)
    network, theta_P = bench.weights(path)
    if network.widths != bench.network.widths:
        raise ParameterError(
            f"objective.reference: {path} has widths {network.widths}, model.hidden makes them "
            f"{bench.network.widths}; give weights of the same network"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Workbench(
        params, machine, bench.train_set, bench.test_set, bench.data_digest, (theta_P, digest)
    )
