"""Everything that was said of a point, checked from outside.

A claim is eigenvalues, vectors, residuals, the smallest eigenvalue, loss and gradient, as they
were returned or as files hold them. It is checked against float64 products that are computed by
another way than it was solved with (`recomputation`):

- a stated subset of pairs one by one: residual and Rayleigh quotient;
- all pairs at once, by one product with x = Σ w_i v_i, signs at random and |w_i| the larger the
  smaller the residual said. y = Hx − Σ w_i ρ_i v_i has two parts. Ritz vectors have residuals
  orthogonal to all of them, so the part of y along v_i shows a wrong eigenvalue, a pair swapped or
  a vector mixed with another down to the noise of the products, for each i. What is left is
  Σ w_i r_i; for signs at random it exceeds t (Σ w_i² |r_i|²)^½ with a probability of at most
  2 exp(−t²/2) (Hoeffding), and a pair whose residual is larger than said stands out.
- orthonormality, which a vector that was damaged anywhere loses;
- completeness, by a `probe` beside the set.

Residuals then give intervals, angles and clusters (`intervals`), for unchecked pairs the residual
said and the measured noise together. Noise is what the product solved with differs by from the
float64 one, on the checked vectors and a random one.

Nothing here stops a run: what disagrees is a complaint, and the certificate is then not sound.

Letters: P parameters, K pairs, B vectors of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.claim import Claim, Said, weights_digest
from spectra.curvature.eigen import ROUND_OFF
from spectra.curvature.operator import MatVec
from spectra.curvature.probe import Probe, probe
from spectra.curvature.recomputation import Recomputed

Floats = NDArray[np.floating]
Subset = int | Literal["all"]

SAFETY = 3.0
"""Times the measured noise, a maximum over a few vectors, that other vectors are granted."""
HONEST = 2.0
"""Times the residual said that a pair may have: where units are merged, residuals are inferred from
sums with random signs."""
IN_SPAN = 0.1
"""Share of a residual that may lie in the span of the vectors: none of a Ritz vector's does, and
a few hundredths where units are merged that are equal to a hundredth of the tolerance."""
DEFECT = 64.0
"""Multiples of eps of |VVᵀ − I| that orthonormal rows may show; 24 is the most that was seen."""


@dataclass(frozen=True)
class Findings:
    """What the checks of a claim measured; every number in float64.

    Attributes:
        recomputed: Loss, gradient and images at θ.
        checked: Indices of the pairs recomputed one by one.
        rayleigh_K: vᵀHv/vᵀv of the checked, the value said of the others.
        errors_K: Bounds on |Hv − ρv| / |v| with ρ from `rayleigh_K`.
        smallest_error: The same of the smallest eigenvalue; infinite where nothing is known.
        smallest_checked: Whether that was recomputed.
        defect: max |VVᵀ − I|.
        smallest_singular: Of the matrix of the vectors, scaled to unit length.
        noise: |H̃v − Hv| of unit vectors at most, H̃ the product solved with.
        beside: What the probe found.
        limit: Magnitude that nothing beside the set should exceed.
        lowest: Value that nothing beside the set should lie below.
        along: The vector along which y is the largest for what it might be, that part, and the
            largest it might be.
        across: The rest of y, and the largest it might be.
        complaints: What disagrees, a line each.
    """

    recomputed: Recomputed
    checked: tuple[int, ...]
    rayleigh_K: Floats
    errors_K: Floats
    smallest_error: float
    smallest_checked: bool
    defect: float
    smallest_singular: float
    noise: float
    beside: Probe
    limit: float
    lowest: float
    along: tuple[int, float, float]
    across: tuple[float, float]
    complaints: tuple[str, ...]


def examine(
    claim: Claim,
    theta_P: Tensor,
    *,
    solved: MatVec,
    reference: Callable[[Tensor], Recomputed],
    rtol: float,
    subset: Subset,
    products: int,
    generator: torch.Generator,
) -> Findings:
    """Check a claim.

    Args:
        claim: With at least one pair.
        theta_P: The point; vectors of `solved` have its dtype and device.
        solved: The product that the spectrum was solved with.
        reference: Loss, gradient and products of float64 vectors (B, P), computed otherwise.
        rtol: Tolerance of the pairs.
        subset: How many pairs are recomputed one by one, besides that of the smallest eigenvalue.
        products: Of the probe, if nothing remains to be decided.
        generator: Gives signs and the probe's start; on the CPU.

    Raises:
        NonFiniteError: A product is NaN or infinite.
    """
    said = Said(claim, torch.finfo(theta_P.dtype).eps, rtol)
    given_KP = torch.from_numpy(np.ascontiguousarray(claim.vectors_KP)).to(theta_P.device)
    beside = probe(
        solved, given_KP.to(theta_P.dtype), limit=said.limit, lowest=said.lowest,
        products=products, negligible=0.05 * max(rtol * said.last, said.floor),
        generator=generator,
    )  # fmt: skip
    vectors_KP = given_KP.double()
    weights_K = said.weights(generator)
    checked = chosen(len(claim.values_K), subset)
    if checked and claim.smallest_inside is not None:
        checked = sorted({*checked, claim.smallest_inside})
    single = [vectors_KP[i] for i in checked]
    outside = claim.smallest.vector_P if claim.smallest_inside is None else None
    if outside is not None:
        single.append(torch.from_numpy(outside).to(vectors_KP))
    mixed_P = _row(weights_K, vectors_KP) @ vectors_KP
    again = reference(torch.stack([*single, beside.start_P.double(), mixed_P]))
    *images, random_P, image_P = again.images_BP

    noise = float((beside.image_P.double() - random_P).norm())
    for v_P, exact_P in zip(single, images, strict=True):
        off_P = solved(v_P.to(theta_P.dtype)).double() - exact_P
        noise = max(noise, float(off_P.norm() / v_P.norm()))
    # A vector rounded to the precision solved in is itself off by as much as eps.
    tolerance = SAFETY * noise + said.eps * said.scale + said.exact
    rayleigh_K = np.array(claim.values_K, dtype=float)
    errors_K = HONEST * said.residuals_K + tolerance
    for i, v_P, exact_P in zip(checked, single, images, strict=False):
        rayleigh_K[i], residual = _rayleigh(v_P, exact_P)
        errors_K[i] = residual + said.exact
    if claim.smallest_inside is not None:
        smallest_error = float(errors_K[claim.smallest_inside])
    elif outside is not None:
        value, residual = _rayleigh(single[-1], images[-1])
        smallest_error = residual + abs(value - claim.smallest.value) + said.exact
    else:
        smallest_error = HONEST * said.smallest + tolerance

    products_KK = (vectors_KP @ vectors_KP.t()).cpu()
    lengths_K = products_KK.diagonal().sqrt()
    cosines_KK = products_KK / torch.outer(lengths_K, lengths_K)
    y_P = image_P - _row(weights_K * claim.values_K, vectors_KP) @ vectors_KP
    along_K = (vectors_KP @ y_P).cpu().numpy()
    allowed_K = IN_SPAN * said.residuals_K + tolerance
    worst = int(np.argmax(np.abs(along_K) - allowed_K))
    found = Findings(
        recomputed=again,
        checked=tuple(checked),
        rayleigh_K=rayleigh_K,
        errors_K=errors_K,
        smallest_error=smallest_error,
        smallest_checked=outside is not None or claim.smallest_inside in checked,
        defect=float((products_KK - torch.eye(len(products_KK)).double()).abs().max()),
        smallest_singular=math.sqrt(max(float(torch.linalg.eigvalsh(cosines_KK)[0]), 0.0)),
        noise=noise,
        beside=beside,
        limit=said.limit,
        lowest=said.lowest,
        along=(worst, float(abs(along_K[worst])), float(allowed_K[worst])),
        across=(
            float((y_P - _row(along_K, vectors_KP) @ vectors_KP).norm()),
            said.across(weights_K) + tolerance,
        ),
        complaints=(),
    )
    complaints = [
        *_singly(said, found, tolerance), *_together(said, found), *_missing(said, found),
        *_elsewhere(said, found, theta_P),
    ]  # fmt: skip
    return replace(found, complaints=tuple(complaints))


def _singly(said: Said, found: Findings, tolerance: float) -> Iterator[str]:
    """Pairs that are not what is said of them, one by one."""
    values_K, residuals_K = said.claim.values_K, said.residuals_K
    for i in found.checked:
        residual, value = found.errors_K[i] - said.exact, found.rayleigh_K[i]
        if not residual <= HONEST * residuals_K[i] + tolerance:
            yield f"pair {i + 1}: |Hv − λv| is {residual:.2e}, {residuals_K[i]:.2e} is said"
        if not abs(value - values_K[i]) <= IN_SPAN * residuals_K[i] + tolerance:
            yield (
                f"pair {i + 1}: the Rayleigh quotient is {value:.9g}, the eigenvalue said "
                f"{values_K[i]:.9g}"
            )
    if said.claim.smallest_inside is None and found.smallest_checked:
        residual = found.smallest_error - said.exact
        if not residual <= HONEST * said.smallest + tolerance:
            yield (
                f"the smallest eigenvalue, {said.claim.smallest.value:.9g}: |Hv − λv| is "
                f"{residual:.2e}, {said.smallest:.2e} is said"
            )


def _together(said: Said, found: Findings) -> Iterator[str]:
    """What all pairs together are not."""
    if not found.defect <= DEFECT * said.eps:
        yield (
            f"the vectors are orthonormal to {found.defect:.1e} only, not to "
            f"{DEFECT * said.eps:.1e}"
        )
    worst, along, allowed = found.along
    if not along <= allowed:
        yield (
            "all pairs together: an eigenvalue, or vectors mixed with one another, are off by "
            f"{along:.1e} along vector {worst + 1}, {allowed:.1e} is noise"
        )
    across, most = found.across
    if not across <= most:
        yield f"all pairs together: the residual is {across:.1e}, those said allow {most:.1e}"
    if not bool(np.all(np.diff(np.abs(said.claim.values_K)) <= said.floor)):
        yield "the eigenvalues are not in the order of their magnitudes"


def _missing(said: Said, found: Findings) -> Iterator[str]:
    """Pairs that should be in the set."""
    smallest = said.claim.smallest.value
    for value in found.beside.missed(limit=said.limit, lowest=said.lowest):
        yield (
            f"an eigenvalue of {value:.6g} or beyond is missing: the last pair has magnitude "
            f"{said.last:.6g}, the smallest eigenvalue is said to be {smallest:.6g}"
        )
    if said.claim.smallest_inside is None and not abs(smallest) <= said.limit:
        yield f"the smallest eigenvalue, {smallest:.6g}, belongs among the pairs"


def _elsewhere(said: Said, found: Findings, theta_P: Tensor) -> Iterator[str]:
    """Weights, loss and gradient that are not those that were said."""
    claim, again = said.claim, found.recomputed
    if claim.weights is not None and claim.weights != weights_digest(theta_P):
        yield "the weights are not those that the spectrum was computed at"
    slack = ROUND_OFF * said.eps
    if claim.loss is not None and not abs(claim.loss - again.loss) <= slack * max(again.loss, 0.1):
        yield f"L_CE is {again.loss:.9g}, {claim.loss:.9g} is said"
    if claim.gradient_ce_P is not None:
        # √(2 |λ_1| L) is what a gradient is like before its terms cancel.
        typical = float(again.gradient_P.norm()) + math.sqrt(2 * said.scale * max(again.loss, 0.0))
        off = float((claim.gradient_ce_P.to(again.gradient_P) - again.gradient_P).norm())
        if not off <= slack * typical:
            yield f"∇L_CE differs by {off:.1e} from the one said"


def chosen(k: int, subset: Subset) -> list[int]:
    """Which of `k` pairs are recomputed one by one: the first, the last and evenly between."""
    count = k if subset == "all" else min(int(subset), k)
    return sorted({int(i) for i in np.linspace(0, k - 1, count).round()})


def _row(weights_K: Floats, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(weights_K)).to(like)


def _rayleigh(v_P: Tensor, image_P: Tensor) -> tuple[float, float]:
    """vᵀHv/vᵀv and |Hv − ρv| / |v|."""
    value = float(v_P @ image_P) / float(v_P @ v_P)
    return value, float((image_P - value * v_P).norm()) / float(v_P.norm())
