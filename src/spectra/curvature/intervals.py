"""What follows from eigenvalues and residuals alone: intervals, gaps, angles and clusters.

For a unit vector with |Hv − ρv| <= ε, the interval ρ ± ε holds an eigenvalue of H. Where intervals
overlap, that could be one and the same for several; m such pairs are taken together, and for any
V with m independent columns and any numbers ρ on a diagonal

    m eigenvalues of H can be matched one to one with the ρ, each within ‖HV − V diag ρ‖₂ / σ_min(V)

(Kahan; with this constant Cao, Xie and Li). ‖·‖₂ is bounded by the root of the sum of the squared
ε, and σ_min(V) by the measured departure from orthonormality, so the intervals stay rigorous for
vectors that are orthonormal to round-off only. Intervals of different groups are disjoint, hence
so are the eigenvalues matched with them: one to one over the whole set.

An eigenvector is known to within sin φ <= ε / gap, gap being the distance to all of the spectrum
but its own eigenvalue: the other intervals, and what lies beyond the set. Where that says little,
vectors are arbitrary within a cluster, and the subspace of the cluster is what can be named, with
the same bound from the cluster's residuals and its gap. A cluster whose bound says little however
many pairs of the set join it, because the spectrum beyond begins too near, is open: not even its
subspace is determined.

Letters: K pairs, m of a group.

Source: B. N. Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), ch. 11; Z.-H. Cao,
J.-J. Xie, R.-C. Li, A sharp version of Kahan's theorem on clustered eigenvalues, Linear Algebra
Appl. 245 (1996) 147-155; C. Davis, W. M. Kahan, The rotation of eigenvectors by a perturbation
III, SIAM J. Numer. Anal. 7 (1970) 1-46.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

IDENTIFIABLE = 0.1
"""sin φ from which on a vector, or a subspace, does not count as identified: some six degrees."""


@dataclass(frozen=True)
class Cluster:
    """Pairs whose vectors are not identifiable one by one.

    Attributes:
        members: Their indices, ascending.
        bound: sin of the largest angle between their span and the eigenvectors' is at most this.
        open: The spectrum beyond the set begins too near for the subspace to be identified.
    """

    members: tuple[int, ...]
    bound: float
    open: bool


@dataclass(frozen=True)
class Located:
    """Where K eigenvalues are and how well their vectors are known.

    Attributes:
        low_K, high_K: The intervals.
        angles_K: sin φ <= this for each vector by itself; at most 1.
        clusters: The vectors for which that says little, together.
    """

    low_K: Floats
    high_K: Floats
    angles_K: Floats
    clusters: tuple[Cluster, ...]


def located(
    values_K: Floats,
    errors_K: Floats,
    *,
    beyond: tuple[float, float],
    smallest_singular: float = 1.0,
) -> Located:
    """Intervals, angles and clusters of a set of eigenpairs.

    Args:
        values_K: The numbers ρ, in any order.
        errors_K: Bounds on |Hv − ρv| / |v|, round-off included.
        beyond: Where the eigenvalues that are not in the set lie.
        smallest_singular: σ_min of the matrix of unit vectors.
    """
    if not smallest_singular > 0:
        nowhere_K = np.full(len(values_K), math.inf)
        all_K = Cluster(tuple(range(len(values_K))), 1.0, open=True)
        return Located(-nowhere_K, nowhere_K, np.ones(len(values_K)), (all_K,))
    groups = _joined(values_K, lambda a, b: _overlap(a, b, values_K, errors_K, smallest_singular))
    radii_K = np.array(errors_K, dtype=float)
    for members in groups:
        radii_K[members] = _radius(members, errors_K, smallest_singular)
    low_K, high_K = values_K - radii_K, values_K + radii_K
    angles_K = np.array(
        [_angle([i], values_K, errors_K, low_K, high_K, beyond) for i in range(len(values_K))]
    )

    def mixed(a: list[int], b: list[int]) -> bool:
        """Whether a bound says little, b being the nearest of what is not in a."""
        return any(
            _ratio(_root(one, errors_K), _apart(one, other, values_K, low_K, high_K))
            >= IDENTIFIABLE
            for one, other in ((a, b), (b, a))
        )

    clusters: list[Cluster] = []
    for members in _joined(values_K, mixed):
        bound = _angle(members, values_K, errors_K, low_K, high_K, beyond)
        if len(members) > 1 or bound >= IDENTIFIABLE:
            clusters.append(Cluster(tuple(sorted(members)), bound, bound >= IDENTIFIABLE))
    return Located(low_K, high_K, angles_K, tuple(sorted(clusters, key=lambda c: c.members)))


def _joined(values_K: Floats, near: Callable[[list[int], list[int]], bool]) -> list[list[int]]:
    """Neighbours along the axis joined as long as two groups are near."""
    groups = [[int(i)] for i in np.argsort(values_K, kind="stable")]
    at = 0
    while at + 1 < len(groups):
        if near(groups[at], groups[at + 1]):
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
            at = max(at - 1, 0)
        else:
            at += 1
    return groups


def _root(members: Sequence[int], errors_K: Floats) -> float:
    return float(np.linalg.norm(errors_K[list(members)]))


def _radius(members: list[int], errors_K: Floats, smallest_singular: float) -> float:
    """Of a lone pair its ε, of several the bound of the theorem."""
    if len(members) == 1:
        return float(errors_K[members[0]])
    return _root(members, errors_K) / smallest_singular


def _overlap(
    a: list[int], b: list[int], values_K: Floats, errors_K: Floats, smallest_singular: float
) -> bool:
    reach = sum(_radius(group, errors_K, smallest_singular) for group in (a, b))
    return bool(values_K[a].max() + reach >= values_K[b].min())


def _apart(a: list[int], b: list[int], values_K: Floats, low_K: Floats, high_K: Floats) -> float:
    """The distance from the values of a to the intervals of b, 0 if they meet."""
    below, above = values_K[a].min() - high_K[b].max(), low_K[b].min() - values_K[a].max()
    return max(float(below), float(above), 0.0)


def _angle(
    members: list[int],
    values_K: Floats,
    errors_K: Floats,
    low_K: Floats,
    high_K: Floats,
    beyond: tuple[float, float],
) -> float:
    """Bound on sin φ of the span of some vectors, by their residuals and what they keep off.

    In the Frobenius norm, which the root of the squared ε is, the theorem holds however the two
    parts of the spectrum lie between one another.
    """
    others = np.setdiff1d(np.arange(len(values_K)), members)
    lows = np.append(low_K[others], beyond[0])
    highs = np.append(high_K[others], beyond[1])
    inside = values_K[members][:, None]
    gap = float(np.maximum(lows - inside, inside - highs).min())
    return _ratio(_root(members, errors_K), gap)


def _ratio(error: float, gap: float) -> float:
    return min(1.0, error / gap) if gap > 0 else 1.0
