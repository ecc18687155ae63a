"""Whether a set of leading eigenpairs is complete: a look from a fresh direction beside them.

Small residuals do not show that none is missing: every pair of an incomplete set passes. What is
missing shows on the orthogonal complement of the set. With Q = I − VᵀV the deflated operator QHQ
has, for exact pairs, no eigenvalue larger in magnitude than the last of them; by Rayleigh's
principle each of its Ritz values is a bound that its extreme eigenvalues lie beyond. So one Ritz
value past the limit proves that a pair was missed, and which sign it has.

That no Ritz value passes it proves nothing with certainty, but a lot with probability: from a
random start in n dimensions, m steps miss the largest eigenvalue by more than ε of the spectrum's
width with a probability of at most 1.648 √n exp(−√ε (2m − 1)) (Kuczyński and Woźniakowski). What
that excludes is part of the result. The steps go on while an extreme Ritz value and the error that
its residual admits reach past the limit, to a bound. Where the rest of the spectrum is degenerate,
the process is exhausted after a few steps; it has then found every eigenvalue there is.

Letters: P parameters, K pairs deflated.

Source: J. Kuczyński, H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos
algorithms with a random start, SIAM J. Matrix Anal. Appl. 13 (1992) 1094-1122, theorem 4.2;
B. N. Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), ch. 10 and 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.curvature.lanczos import Lanczos, Ritz
from spectra.curvature.operator import MatVec

CHANCE = 1e-3
"""Probability with which the statement on what is excluded may fail."""
MOST = 6
"""Times the products asked for that an undecided probe goes on to at most."""
_ENDED = 2
"""Fresh directions whose Krylov space is exhausted before the operator counts as known."""


@dataclass(frozen=True)
class Probe:
    """What a look beside a set of pairs found.

    Attributes:
        products: Taken.
        largest: The largest Ritz value of the deflated operator.
        smallest: The smallest.
        largest_residual: |Av − θv| of the largest.
        smallest_residual: The same of the smallest.
        exhausted: The Krylov space was invariant: all there is has been seen.
        decided: No extreme Ritz value, with the error it admits, reaches past its limit, or one
            is past it.
        excluded: Beyond this magnitude there is no eigenvalue, except with probability `CHANCE`.
        start_P: The start vector, of unit length, beside the set.
        image_P: What the operator makes of it, before deflation.
    """

    products: int
    largest: float
    smallest: float
    largest_residual: float
    smallest_residual: float
    exhausted: bool
    decided: bool
    excluded: float
    start_P: Tensor
    image_P: Tensor

    def missed(self, *, limit: float, lowest: float) -> list[float]:
        """Ritz values that prove a pair to be missing.

        Args:
            limit: Magnitude that nothing beside the set should exceed.
            lowest: Value that nothing beside the set should lie below.
        """
        ends = [self.largest] if self.largest > limit else []
        return ends + ([self.smallest] if self.smallest < max(lowest, -limit) else [])


def probe(
    matvec: MatVec,
    vectors_KP: Tensor,
    *,
    limit: float,
    lowest: float,
    products: int,
    negligible: float,
    generator: torch.Generator,
) -> Probe:
    """Look for eigenpairs beside a set.

    Args:
        matvec: `v_P -> (Hv)_P`, symmetric and deterministic.
        vectors_KP: The set, orthonormal rows.
        limit: See `Probe.missed`.
        lowest: See `Probe.missed`.
        products: To take if nothing remains to be decided; at least 2.
        negligible: Norm below which what a step leaves over is dropped.
        generator: Gives the start vector; on the CPU.

    Raises:
        NonFiniteError: A product is NaN or infinite.
    """
    start_P = torch.randn(vectors_KP.shape[1], generator=generator, dtype=vectors_KP.dtype)
    start_P = _beside(vectors_KP, _beside(vectors_KP, start_P.to(vectors_KP.device)))
    start_P /= start_P.norm()
    first: list[Tensor] = []

    def deflated(v_P: Tensor) -> Tensor:
        beside_P = _beside(vectors_KP, v_P)
        image_P = matvec(beside_P)
        if not first:
            first.append(image_P.clone())
        # The set itself, which a fresh direction reaches, gets a value from within the rest's.
        harmless = start_P @ first[0]
        return _beside(vectors_KP, image_P) + harmless * (v_P - beside_P)

    most = MOST * products
    process = Lanczos(deflated, start_P, capacity=most, generator=generator)
    process.negligible = negligible
    while True:
        process.step()
        ended = process.exhausted >= _ENDED or process.complete
        if process.products < products and not ended:
            continue
        ritz = process.ritz()
        top, top_error, top_residual = _end(ritz, -1)
        bottom, bottom_error, bottom_residual = _end(ritz, 0)
        floor = max(lowest, -limit)
        past = top > limit or bottom < floor
        inside = top + top_error <= limit and bottom - bottom_error >= floor
        if past or inside or ended or process.full:
            break
    taken = min(process.products, process.size)
    width = 0.0 if ended else _missing(taken, process.dim, CHANCE)
    spread = (top - bottom) / max(1 - 2 * width, 1e-3)
    return Probe(
        products=process.products,
        largest=top,
        smallest=bottom,
        largest_residual=top_residual,
        smallest_residual=bottom_residual,
        exhausted=ended,
        decided=past or inside or ended,
        excluded=max(abs(top), abs(bottom)) + width * spread if width < 0.5 else math.inf,
        start_P=start_P,
        image_P=first[0],
    )


def _beside(vectors_KP: Tensor, v_P: Tensor) -> Tensor:
    """A vector without its part in the span of the rows."""
    return torch.addmv(v_P, vectors_KP.t(), vectors_KP @ v_P, alpha=-1)


def _end(ritz: Ritz, end: int) -> tuple[float, float, float]:
    """An extreme Ritz value, how far the eigenvalue may lie past it, and its residual.

    That is the residual, or its square over the distance to the next Ritz value where this is
    smaller (Temple's bound, with the Ritz value in the place of the eigenvalue).
    """
    value, residual = float(ritz.values_J[end]), float(ritz.residuals_J[end])
    if len(ritz.values_J) == 1:
        return value, residual, residual
    gap = abs(value - float(ritz.values_J[-2 if end else 1]))
    return value, min(residual, residual**2 / gap if gap else residual), residual


def _missing(steps: int, dim: int, chance: float) -> float:
    """ε by which m steps miss the largest eigenvalue with that probability at most."""
    return (math.log(1.648 * math.sqrt(dim) / chance) / max(2 * steps - 1, 1)) ** 2
