"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracles


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests share a machine with others, and summation order with themselves."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """2,500 real digits: inputs (N, 784) in float64 and labels."""
    return oracles.sample_digits()


@pytest.fixture(scope="session")
def mnist() -> tuple[Tensor, Tensor]:
    """The 60,000 training digits: inputs in float64 and labels; fetched when not there."""
    from spectra import data
    from spectra.params import DataParams

    params = DataParams(root=str(Path(__file__).parents[1] / "data"))
    data.ensure(params, say=print)
    train = data.load(params).train
    device = torch.device("cpu")
    inputs_ND = train.inputs(mean=0.1307, std=0.3081, dtype=torch.float64, device=device)
    return inputs_ND, train.labels_N
