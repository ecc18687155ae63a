"""The lowest curvature at a point, by Lanczos from a random start.

A gradient says nothing about negative directions orthogonal to it, and a point reached by symmetric
steps is blind to what breaks the symmetry. A random start sees every direction. The smallest Ritz
value is an upper bound: below zero it proves a saddle; above, that there is no lower one is likely,
the more so the longer it has not fallen.

Letters: P coordinates.

Source: J. Kuczyński, H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos
algorithms with a random start, SIAM J. Matrix Anal. Appl. 13 (1992) 1094-1122.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.curvature.lanczos import Lanczos
from spectra.curvature.operator import MatVec

LOOK = 200
"""Products at most."""

_CHECK_EVERY = 4
_STILL = 40
"""Products over which the value must not have fallen before it is believed."""
_FELL = 0.01
"""Share of the scale that counts as a fall."""
_CLEAR = 0.1
"""Residual, as a share of a negative value, at which its direction is good enough to follow."""


@dataclass(frozen=True)
class Lowest:
    """The lowest curvature found: Rayleigh quotient, residual |Hv − value·v|, unit direction."""

    value: float
    residual: float
    direction_P: Tensor


def lowest_curvature(
    matvec: MatVec,
    *,
    dim: int,
    scale: float,
    flat: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    affordable: Callable[[], bool],
) -> Lowest | None:
    """The smallest eigenvalue of a symmetric operator, as far as a few products tell.

    Args:
        matvec: `v_P -> (Hv)_P`.
        dim: P.
        scale: What a curvature is compared with, 2c.
        flat: Magnitude below which a negative one is not told from zero.
        dtype: Of the vectors that the operator takes.
        device: Of the vectors that the operator takes.
        generator: Gives the start; on the CPU.
        affordable: Asked before every product; False ends the search without a result.

    Raises:
        NonFiniteError: A product is NaN or infinite.
    """
    start_P = torch.randn(dim, generator=generator, dtype=torch.float64).to(device, dtype)
    process = Lanczos(matvec, start_P, capacity=max(2, LOOK), generator=generator)
    seen: list[float] = []
    while affordable():
        process.step()
        done = process.full or process.complete or process.exhausted > 1
        if not done and process.products % _CHECK_EVERY:
            continue
        ritz = process.ritz()
        value, residual = float(ritz.values_J[0]), float(ritz.residuals_J[0])
        seen.append(value)
        earlier = seen[-1 - _STILL // _CHECK_EVERY] if len(seen) > _STILL // _CHECK_EVERY else None
        still = earlier is not None and earlier - value <= _FELL * max(abs(value), scale)
        clear = value < -flat and residual <= _CLEAR * -value
        if done or clear or (still and residual <= _CLEAR * max(abs(value), flat)):
            direction_P = process.vectors(ritz.coefficients_JJ[:, :1])[0].double()
            return Lowest(value, residual, direction_P / direction_P.norm())
    return None
