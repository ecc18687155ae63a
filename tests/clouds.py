"""Three overlapping clouds, and a small network that is trained on them."""

from __future__ import annotations

import torch
from torch.nn import functional

from spectra.descent import Optimisation
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.train import Examples, Trained, train

WIDTHS = (6, 5, 4, 3)
MLP = Mlp(WIDTHS)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Examples:
    """Three overlapping clouds: learnable, and not to zero loss."""
    generator = draw(seed)
    labels_N = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randn(count, 6, generator=generator, dtype=dtype)
    x[:, :3] += 1.5 * functional.one_hot(labels_N, 3)
    return Examples(x, labels_N)


def mostly_background(data: Examples, share: float = 0.8) -> Examples:
    """The same with most inputs of most examples at one value, as in pictures of digits."""
    x = data.inputs_ND.clone()
    x[torch.rand(x.shape, generator=draw(5)) < share] = x.min() - 0.3
    return Examples(x, data.labels_N)


DATA, TEST = examples(50, 1), examples(30, 2)
SPARSE = mostly_background(DATA)
START = 2 * MLP.initial(draw(3), torch.float64)


def run(how: Optimisation, *, penalty: L2Penalty | None = None, **changes: object) -> Trained:
    arguments = {
        "data": DATA,
        "test": TEST,
        "penalty": penalty or L2Penalty(0.01),
        "generator": draw(7),
        **changes,
    }
    return train(MLP, START, how=how, **arguments)
