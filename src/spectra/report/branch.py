"""A branch: the solutions of one replicate in order of strength, as arrays.

Results arrive in the order of file names and a sweep may run downward, so sorting happens here
and nowhere else. What is said about a single spectrum (its outliers, whether it can belong to a
minimum, which pairs have converged) is worked out from the manifest alone: a column of the
table says how a run ended, the residuals say how good a pair is.

The reported Hessian is that of the mean cross-entropy; that of L_eff = L_CE + c‖θ‖² exceeds it
by 2c I, and 2c is 2λ in the convention "full" and λ in the convention "half".

Letters: S strengths, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spectra.artifacts import Record

Floats = NDArray[np.float64]

_RTOL = 1e-3
"""Of a manifest that names none; the default of `spectrum.rtol`."""

_ROUND_OFF = 32
"""Units of round-off, of |λ_1|, below which a solver cannot see (as in `curvature.eigen`)."""


@dataclass(frozen=True)
class Branch:
    """The records of a replicate, smallest strength first."""

    replicate: int
    records: tuple[Record, ...]

    def column(self, name: str) -> Floats:
        """A column of Model-{ID}.csv; NaN where a record has no number there."""
        values = (record.row.get(name) for record in self.records)
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

    @property
    def strengths(self) -> Floats:
        """The strengths λ."""
        return np.array([record.l2 for record in self.records], dtype=np.float64)

    @property
    def shifts(self) -> Floats:
        """2c: by how much H_eff exceeds H_CE."""
        return np.array([shift(record) for record in self.records], dtype=np.float64)

    @property
    def smallest(self) -> Floats:
        """The smallest eigenvalue that is known of every solution; NaN where none is."""
        return np.array([smallest_eigenvalue(record) for record in self.records], dtype=np.float64)

    @property
    def eigenvalues(self) -> Floats:
        """By magnitude, sign kept; NaN where a solution has fewer pairs than another."""
        width = max((len(record.eigenvalues) for record in self.records), default=0)
        values_SK = np.full((len(self.records), width), np.nan)
        for row_K, record in zip(values_SK, self.records, strict=True):
            row_K[: len(record.eigenvalues)] = record.eigenvalues
        return values_SK


def branches(records: Sequence[Record]) -> tuple[Branch, ...]:
    """Group records by replicate, and sort each group by strength."""
    ordered = sorted(records, key=lambda record: (record.replicate, record.l2))
    return tuple(
        Branch(replicate, tuple(r for r in ordered if r.replicate == replicate))
        for replicate in sorted({record.replicate for record in records})
    )


def shift(record: Record) -> float:
    """2c of the record's convention: 2λ for "full" (the default), λ for "half"."""
    halved = record.parameters.get("objective.penalty", "full") == "half"
    return record.l2 if halved else 2 * record.l2


def smallest_eigenvalue(record: Record) -> float:
    """The smallest eigenvalue known: the column λ_min or the least of the leading ones."""
    known = [*record.eigenvalues]
    column = record.row.get("lambda_min")
    if column is not None:
        known.append(float(column))
    return min(known, default=float("nan"))


def round_off(record: Record) -> float:
    """Magnitude below which an eigenvalue of this spectrum is indistinguishable from zero."""
    double = record.parameters.get("runtime.dtype") == "float64"
    eps = float(np.finfo(np.float64 if double else np.float32).eps)
    return _ROUND_OFF * eps * max((abs(v) for v in record.eigenvalues), default=0.0)


def outliers(record: Record) -> int:
    """How many eigenvalues stand apart: the k < K of the largest |λ_k| / |λ_{k+1}|.

    Magnitudes below the round-off count as the round-off, so that noise around zero makes no
    gap. 0 where there are fewer than two pairs or nothing but zeros.
    """
    floor = round_off(record)
    if len(record.eigenvalues) < 2 or floor == 0.0:
        return 0
    sizes_K = np.maximum(np.abs(record.eigenvalues), floor)
    return int(np.argmax(sizes_K[:-1] / sizes_K[1:])) + 1


def saddle(record: Record) -> bool:
    """Whether some eigenvalue lies below −2c beyond its own error: not a minimum of L_eff.

    An exact eigenvalue lies within the residual of every pair. The smallest algebraic
    eigenvalue, where it is not one of the leading pairs, is known to `rtol` of |λ_K|.
    """
    bound = -shift(record)
    pairs = zip(record.eigenvalues, record.residuals, strict=False)
    if any(value + residual + round_off(record) < bound for value, residual in pairs):
        return True
    column = record.row.get("lambda_min")
    if column is None or column in record.eigenvalues:
        return False
    last = abs(record.eigenvalues[-1]) if record.eigenvalues else 0.0
    return bool(column + max(_rtol(record) * last, round_off(record)) < bound)


def unconverged(record: Record) -> int:
    """Pairs that missed `|Hv − λv| <= rtol·|λ|`, and pairs that were asked for and not found."""
    floor = round_off(record)
    missed = sum(
        residual > max(_rtol(record) * abs(value), floor)
        for value, residual in zip(record.eigenvalues, record.residuals, strict=False)
    )
    wanted = int(record.parameters.get("spectrum.k", len(record.eigenvalues)))
    return missed + max(0, wanted - len(record.eigenvalues))


def relative_residual(record: Record) -> float:
    """The largest |Hv − λv| / |λ| of the pairs; pairs with λ = 0 have none."""
    pairs = zip(record.eigenvalues, record.residuals, strict=False)
    return max((residual / abs(value) for value, residual in pairs if value != 0.0), default=0.0)


def _rtol(record: Record) -> float:
    return float(record.parameters.get("spectrum.rtol", _RTOL))
