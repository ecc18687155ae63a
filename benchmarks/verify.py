"""Whether a contender's eigenpairs are eigenpairs, and the right ones; one judge for all.

Nobody's own error estimate counts. Every vector is multiplied anew by one common operator,
double automatic differentiation, and judged by

    |Hv − λv| <= rtol·|λ|,  λ = ⟨v, Hv⟩ / ⟨v, v⟩,

by whether the vectors are different from each other, and by whether the eigenvalues claimed
are the leading ones. For the last there has to be a reference that belongs to nobody: the
Rayleigh-Ritz values on the span of what all contenders found together. By Cauchy's interlacing
the i-th largest of them never exceeds the true one, so a contender that falls short of it has
missed a pair, whoever found it.

A residual below the round-off of float32 products, `ROUND_OFF` · eps · |λ_1|, cannot be asked
of anyone and passes.

Letters: P parameters, K pairs, U vectors of all contenders.

Source: B. N. Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), ch. 10 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

ROUND_OFF = 32
_SLACK = 1.05  # a solver that stops exactly at rtol is a few per cent off after round-off
_NEW = 0.3  # of a unit vector must lie outside the vectors before it to be another one
_NOISE = 0.1  # what is less of it is the difference of two copies, and mostly round-off


@dataclass(frozen=True)
class Certificate:
    """What a contender's pairs are worth.

    Attributes:
        pairs: How many there are.
        within: How many have a residual within the bound.
        distinct: How many are different from each other.
        worst_residual: The largest |Hv − λv| / |λ|.
        orthogonality: The largest |cos| between two vectors.
        value_error: The largest difference of a claimed eigenvalue from the reference,
            relative to the reference.
        verdict: "right"; "incomplete: ...", where all are eigenpairs and yet not the leading
            ones; "stopped: ..."; or "wrong: ...".
    """

    pairs: int
    within: int
    distinct: int
    worst_residual: float
    orthogonality: float
    value_error: float
    verdict: str

    @property
    def right(self) -> bool:
        """Whether the work was done."""
        return self.verdict == "right"

    def as_dict(self) -> dict[str, float | int | str]:
        """For the results file."""
        return asdict(self)


def images(product: Callable[[Tensor], Tensor], vectors_KP: Tensor) -> Tensor:
    """The products with every vector, by the common operator."""
    return torch.stack([product(v_P) for v_P in vectors_KP]) if len(vectors_KP) else vectors_KP


def reference(found: Sequence[tuple[Tensor, Tensor]], k: int) -> Floats:
    """The k leading Ritz values on the span of everybody's vectors, by magnitude.

    The vectors enter in the order of their residuals, so that of several copies of one the
    best stays as it is.

    Args:
        found: Vectors and their images, a pair of (K, P) tensors a contender.
        k: How many are wanted.
    """
    v_UP, w_UP, _, residuals_U = _measured(
        torch.cat([v for v, _ in found]), torch.cat([w for _, w in found])
    )
    order = torch.argsort(residuals_U)
    basis_JP, images_JP = _span(v_UP[order], w_UP[order], least=_NOISE)
    projected = basis_JP @ images_JP.t()
    values = torch.linalg.eigvalsh((projected + projected.t()) / 2).cpu().numpy()
    leading: Floats = values[np.argsort(-np.abs(values), kind="stable")][:k]
    return leading


def distinct(vectors_KP: Tensor) -> int:
    """How many vectors are no repetition of those before them."""
    unit_KP = vectors_KP.double() / vectors_KP.double().norm(dim=1, keepdim=True)
    return len(_span(unit_KP, unit_KP, least=_NEW)[0])


def _span(v_UP: Tensor, w_UP: Tensor, *, least: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of unit vectors and its images; what adds too little is left out."""
    basis_JP, images_JP = torch.empty_like(v_UP), torch.empty_like(w_UP)
    size = 0
    for v_P, w_P in zip(v_UP, w_UP, strict=True):
        rest_P, image_P = v_P, w_P
        for _ in range(2):  # once is not orthogonal enough
            inside_J = basis_JP[:size] @ rest_P
            rest_P = rest_P - inside_J @ basis_JP[:size]
            image_P = image_P - inside_J @ images_JP[:size]
        length = float(rest_P.norm())
        if length > least:
            basis_JP[size], images_JP[size] = rest_P / length, image_P / length
            size += 1
    return basis_JP[:size], images_JP[:size]


def _measured(vectors_KP: Tensor, images_KP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors, their images, Rayleigh quotients and residuals, in float64."""
    v_KP, w_KP = vectors_KP.double(), images_KP.double()
    lengths_K = v_KP.norm(dim=1, keepdim=True)
    v_KP, w_KP = v_KP / lengths_K, w_KP / lengths_K
    quotients_K = (v_KP * w_KP).sum(1)
    return v_KP, w_KP, quotients_K, (w_KP - quotients_K[:, None] * v_KP).norm(dim=1)


def certify(
    values_K: Floats,
    vectors_KP: Tensor,
    images_KP: Tensor,
    *,
    wanted_K: Floats,
    rtol: float,
    stopped: bool = False,
) -> Certificate:
    """Judge a contender's pairs.

    Args:
        values_K: The eigenvalues it claims.
        vectors_KP: Its vectors.
        images_KP: Their products by the common operator.
        wanted_K: The reference; as many as were asked for.
        rtol: The relative residual that was asked for.
        stopped: Whether it was ended by the clock.
    """
    count = len(values_K)
    if not count:
        return Certificate(0, 0, 0, np.nan, np.nan, np.nan, "stopped: no pair was finished")
    v_KP, _, quotients_K, residuals_K = _measured(vectors_KP, images_KP)
    floor = ROUND_OFF * torch.finfo(torch.float32).eps * float(np.abs(wanted_K[0]))
    within = int((residuals_K <= (_SLACK * rtol * quotients_K.abs()).clamp(min=floor)).sum())
    cosines = (v_KP @ v_KP.t()).abs().fill_diagonal_(0)
    different = distinct(vectors_KP)
    order = np.argsort(-np.abs(values_K), kind="stable")
    errors_K = np.abs(np.abs(values_K[order]) - np.abs(wanted_K[:count]))
    allowed_K = np.maximum(_SLACK * rtol * np.abs(wanted_K[:count]), floor)
    off = int((errors_K > allowed_K).sum())
    missing = len(wanted_K) - count
    faults = []
    if different < count:
        faults.append(f"{count - different} of {count} repeat another")
    if within < count:
        faults.append(f"{count - within} residuals above {rtol:g}")
    if missing and not stopped:
        faults.append(f"{missing} missing")
    if off and faults:
        faults.append(f"{off} eigenvalues off")
    if stopped and missing:
        verdict = "; ".join([f"stopped: {count} of {len(wanted_K)} pairs", *faults])
    elif faults:
        verdict = f"wrong: {', '.join(faults)}"
    elif off:
        verdict = f"incomplete: a leading pair was missed, {off} eigenvalues are not the leading"
    else:
        verdict = "right"
    return Certificate(
        pairs=count,
        within=within,
        distinct=different,
        worst_residual=float((residuals_K / quotients_K.abs()).max()),
        orthogonality=float(cosines.max()),
        value_error=float((errors_K / np.abs(wanted_K[:count])).max()),
        verdict=verdict,
    )
