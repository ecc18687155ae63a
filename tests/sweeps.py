"""Sweeps of the tests: made quietly, and read back without the package's readers.

`Result` is a strength as its files tell it, and as plain PyTorch tells it from the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from spectra import pipeline
from spectra.params import Params
from spectra.pipeline import Swept
from spectra.progress import Silent
from spectra.tracking import KIND, NoTracker, Tracker

Tiny = Callable[..., Params]


def sweep(
    params: Params, *, replace: bool = False, draw: bool = False, tracker: Tracker | None = None
) -> Swept:
    return pipeline.sweep(
        params, replace=replace, draw=draw, progress=Silent(), tracker=tracker or NoTracker()
    )


def results_of(key: str, form: str = "csv") -> set[str]:
    names = {
        f"gradients-{key}.csv", f"Hessian-eigenvalues-{key}.csv", f"model_weights-{key}.pth",
        f"history-{key}.csv", f"certificate-{key}.json", f"manifest-{key}.json",
    }  # fmt: skip
    return names | ({f"Hessian-eigenvectors-{key}.{form}"} if form != "none" else set())


def strengths(database: Path, kind: str = "strength") -> list:
    client = MlflowClient(f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`{KIND}` = '{kind}'")


class Result:
    """One strength as its files tell it, and as plain PyTorch tells it from the weights."""

    def __init__(self, folder: Path, key: str) -> None:
        self.state = torch.load(folder / f"model_weights-{key}.pth", weights_only=True)
        table = np.genfromtxt(folder / f"Model-{key[0]}.csv", delimiter=",", names=True, ndmin=1)
        (self.row,) = table[table["L2_strength"] == float(key[2:])]
        self.values_K = np.loadtxt(folder / f"Hessian-eigenvalues-{key}.csv", ndmin=1)
        self.gradients = {
            name.removeprefix("dL/d"): np.array(numbers.split(", "), float)
            for name, numbers in (
                line.split(": ")
                for line in (folder / f"gradients-{key}.csv").read_text().splitlines()
            )
        }

    @property
    def theta_P(self) -> Tensor:  # noqa: N802
        """The weights as one vector in float64."""
        return torch.cat([tensor.double().reshape(-1) for tensor in self.state.values()])

    def loss(self, theta_P: Tensor, inputs_ND: Tensor, labels_N: Tensor) -> Tensor:
        """The mean cross-entropy of a sigmoid network, in the words of `torch.nn`."""
        tensors, start = [], 0
        for tensor in self.state.values():
            tensors.append(theta_P[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
        hidden = torch.sigmoid(torch.nn.functional.linear(inputs_ND, *tensors[:2]))
        for weight, bias in zip(tensors[2:-2:2], tensors[3:-2:2], strict=True):
            hidden = torch.sigmoid(torch.nn.functional.linear(hidden, weight, bias))
        scores = torch.nn.functional.linear(hidden, *tensors[-2:])
        self.hits = scores.argmax(1) == labels_N
        return torch.nn.functional.cross_entropy(scores, labels_N)
