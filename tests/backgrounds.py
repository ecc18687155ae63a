"""Data that are mostly background, as pictures of digits are."""

from __future__ import annotations

import torch
from torch import Tensor


def mostly_background(n: int, d: int, background: float) -> Tensor:
    """A chunk with an example and two inputs that are background alone."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(n, d, generator=draw, dtype=torch.float64) + background
    x[torch.rand(n, d, generator=draw) < 0.75] = background
    x[n // 2] = background
    x[:, [0, d - 1]] = background
    return x


BACKGROUND = -0.4242
EDGES = {
    "all background": torch.full((7, 3), BACKGROUND, dtype=torch.float64),
    "all zero": torch.zeros(7, 3, dtype=torch.float64),
    "one example": mostly_background(1, 9, BACKGROUND),
    "one input": mostly_background(20, 1, BACKGROUND),
    "every column often": torch.tensor([[-1, 0, 0, -1, -1]] * 7 + [[1, -1, -1, 2, 0]] * 5).double(),
    "no background at all": torch.rand(7, 3, generator=torch.Generator().manual_seed(5)).double(),
}
