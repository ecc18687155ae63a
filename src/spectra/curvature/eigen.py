"""Leading eigenpairs of a symmetric operator, each with the residual that vouches for it.

"Leading" is by largest magnitude with the sign kept, so a spectrum may hold negative values.
The largest-magnitude pairs cannot show that a stationary point is a minimum; that needs the
smallest algebraic eigenvalue, which comes out of the same Krylov basis: if one of the leading
pairs is negative, the most negative of them is it, for everything outside the set is smaller in
magnitude; otherwise the lowest Ritz value is, once it has converged too.

A solver's own error estimate is not a proof. Every pair's residual |Hv − λv| is computed in
float64 from the vector that is returned and from its image, a combination of products that were
taken; the eigenvalue is the Rayleigh quotient of the two, the best that the vector gives.

A Krylov space from one start holds one copy of each eigenvalue, however often that is repeated, and
one from several starts as many copies as starts. A set of pairs is believed complete only when no
eigenvalue in it has more copies than show that there is no further one, or when a look from a fresh
direction has added none to it.

Tolerances are relative to |λ| for the pairs that are wanted, and to |λ_K| for the smallest
algebraic eigenvalue, which may be zero. No tolerance can be met below the round-off of the
products, so residuals below `ROUND_OFF` · eps · |λ_1| count as converged.

Letters: P parameters, K pairs.

Source: B. N. Parlett, The Symmetric Eigenvalue Problem (SIAM, 1998), ch. 4 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectra.curvature.lanczos import Lanczos, Ritz, room
from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError

Floats = NDArray[np.floating]

ROUND_OFF = 32
"""Multiples of eps · |λ_1| that the residual of an exact pair shows in the products here."""

_CHECK_EVERY = 2
_PACE = 2
"""Checks over which the pace of convergence is taken: four products, as many as a look gives to
the directions that were there before it, so that it may begin when they are all that is missing."""
_AHEAD = 8
"""Products along a fresh direction alone before a set of pairs is believed complete."""
_ROUNDS = 4
"""Products along every direction that follow. Eight spectra with planted copies were searched from
eight starts each: with fewer some copies stayed hidden behind directions that waited."""
_A_COPY = 0.1
"""Share along the fresh direction above which a pair was not there before. Of two copies that lie
anyhow in their plane, one has at least half; pairs of MNIST that still converged had 0.005."""
_SPARE = 2
"""Starts by which the copies of an eigenvalue must fall short of all for there to be no look: one
that was hidden would have to lie almost across three of them at once."""
_NULLS = 2
"""Fresh directions mapped to nothing before the operator is believed to be zero elsewhere."""
_NEGLIGIBLE = 0.05
"""Share of what counts as converged below which a step's remainder is not pursued."""


@dataclass(frozen=True)
class Extreme:
    """An eigenvalue at an end of the axis, its |Hv − λv|, if that met the bound, its vector."""

    value: float
    residual: float
    converged: bool
    vector_P: Floats | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class EigenPairs:
    """K eigenpairs and what vouches for them.

    Attributes:
        values_K: Sorted by |λ|, largest first, sign kept; float64.
        vectors_KP: Orthonormal rows, in the operator's dtype; the entry of largest magnitude
            in each is positive, so that a sign is a fact and not an accident.
        residuals_K: |Hv − λv|, from the vectors returned and their images; of declared pairs the
            norm up to which an image counts as nothing.
        converged_K: Whether residual <= rtol·|λ|, or is the round-off of the products.
        smallest: The smallest algebraic eigenvalue.
        largest: The largest algebraic eigenvalue.
        products: Products spent.
        declared_K: Whether a pair was declared to be null and never multiplied: the operator had
            mapped fresh directions to nothing, so the rest of the space counts as degenerate.
    """

    values_K: Floats
    vectors_KP: Floats
    residuals_K: Floats
    converged_K: NDArray[np.bool_]
    smallest: Extreme
    largest: Extreme
    products: int
    declared_K: NDArray[np.bool_]

    @property
    def lambda_max(self) -> float:
        """The largest algebraic eigenvalue: one of the pairs unless all of them are negative."""
        top = float(self.values_K.max())
        return top if top > 0 else self.largest.value


def leading_eigenpairs(
    matvec: MatVec,
    *,
    dim: int,
    k: int,
    rtol: float,
    max_products: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    above: float = 0.0,
    ends: float | None = 1.0,
    starts: int = 1,
) -> EigenPairs:
    """The `k` eigenpairs of largest magnitude of a symmetric operator, by Lanczos.

    Args:
        matvec: `v_P -> (Hv)_P`, symmetric and deterministic; see `starts`.
        dim: P, the number of rows.
        k: Pairs wanted, `1 <= k < dim`.
        rtol: A pair has converged when `|Hv − λv| <= rtol * |λ|`.
        max_products: Bound on the products of the search; reaching it is reported, not raised.
        generator: Gives the start vector; on the CPU.
        dtype: Of the vectors that the operator takes.
        device: Of the vectors that the operator takes; the CPU unless given.
        above: Magnitude below which pairs are not wanted. They need not converge, and where the
            search ends with fewer than `k` pairs in all, those that are missing are below it.
        ends: Share of the tolerance that the smallest and the largest algebraic eigenvalue must
            meet for the search to end; None does not wait for them.
        starts: Random vectors to begin with. With several, `matvec` is given blocks, `v_BP ->
            (Hv)_BP`: worthwhile where the products of a block take less than one by one, for more
            are needed in all.

    Raises:
        ValueError: `k` is not in 1..dim−1.
        NonFiniteError: The operator returned NaN or infinity.
    """
    check_count(k, dim)
    start_P = torch.randn(dim, generator=generator, dtype=dtype).to(device or "cpu")
    process = Lanczos(
        matvec, start_P, capacity=max(2 * k + 20, min(room(dim, dtype), 1000)),
        generator=generator, starts=starts,
    )  # fmt: skip
    floor = ROUND_OFF * torch.finfo(dtype).eps
    least = min(k, starts) if above else k
    search = _Look(process, np.full(k, above))
    excesses = [0.0] * _PACE

    while True:
        process.step(ahead=search.ahead)
        spent = process.products >= max_products
        nothing_else = min(process.nulls, process.exhausted) >= _NULLS
        multiplied = process.size
        if nothing_else:
            process.fill(k + 1)
        due = process.size > least and not process.ready and (
            starts > 1 or process.products % _CHECK_EVERY == 0 or process.products == search.until
        )  # fmt: skip
        if not (due or spent or nothing_else or process.full or process.complete):
            continue
        ritz = process.ritz()
        leading_K = np.argsort(-np.abs(ritz.values_J), kind="stable")[:k]
        found_K = np.abs(ritz.values_J[leading_K])
        level_K = np.maximum(found_K, above)
        bounds_K = np.maximum(rtol * level_K, floor * found_K[0])
        process.negligible = _NEGLIGIBLE * bounds_K[-1]
        if spent or nothing_else or process.complete:
            break
        excess = np.inf
        if process.size > least:
            excess = _excess(ritz, leading_K, bounds_K, rtol, above, ends)
        soon = starts == 1 and excess**2 <= excesses[0]  # as much again and it is below 1
        excesses = [*excesses[1:], excess]
        look = not search.until and (soon or excess <= 1)
        if excess <= 1 and not search.until:
            wanted_K = leading_K[found_K >= above]
            if _copies(ritz.values_J[wanted_K], bounds_K[: len(wanted_K)]) <= starts - _SPARE:
                break
        elif excess <= 1 and search.over:
            look = search.added(ritz, leading_K, level_K, bounds_K)
            if not look:
                break
        if process.full:
            process.restart(ritz, _kept(ritz, k, process.capacity))
        if look:
            search.begin(level_K)

    last = len(ritz.values_J) - 1
    chosen = [*leading_K, *(end for end in {0, last} if end not in leading_K)]
    coefficients_JK = ritz.coefficients_JJ[:, chosen]
    return certified(
        process.vectors(coefficients_JK),
        process.images(coefficients_JK),
        k=min(k, process.size),
        rtol=rtol,
        products=process.products,
        above=above,
        declared_K=(coefficients_JK[multiplied:] ** 2).sum(0) > 0.5,
        left_over=process.limit,
    )


def certified(
    vectors_KP: Tensor,
    images_KP: Tensor,
    *,
    k: int,
    rtol: float,
    products: int,
    above: float = 0.0,
    declared_K: NDArray[np.bool_] | None = None,
    left_over: float = 0.0,
) -> EigenPairs:
    """Eigenpairs from vectors and their images: Rayleigh quotients and residuals, in float64.

    Args:
        vectors_KP: Orthonormal rows: `k` leading ones, and after them the vectors of the smallest
            and of the largest algebraic eigenvalue where they are not among them.
        images_KP: What the operator makes of them.
        k: How many are leading.
        rtol: See `leading_eigenpairs`.
        products: Products spent.
        above: See `leading_eigenpairs`.
        declared_K: Which images are zeros that were never computed; none unless given.
        left_over: What those may be instead, as a norm.

    Raises:
        NonFiniteError: An image is NaN or infinite.
    """
    if not len(vectors_KP):
        nothing = Extreme(float("nan"), float("nan"), converged=False)
        none = np.empty(0)
        vectors = vectors_KP.cpu().numpy()
        no = none.astype(bool)
        return EigenPairs(none, vectors, none, no, nothing, nothing, products, no)
    values, residuals = np.empty(len(vectors_KP)), np.empty(len(vectors_KP))
    for i, (v_P, image_P) in enumerate(zip(vectors_KP.double(), images_KP.double(), strict=True)):
        values[i] = float(v_P @ image_P) / float(v_P @ v_P)
        residuals[i] = float((image_P - values[i] * v_P).norm())
    if not np.isfinite(residuals).all():
        raise NonFiniteError("a product of the operator is NaN or infinite at an eigenvector")
    declared = np.zeros(len(values), bool) if declared_K is None else declared_K
    residuals[declared] = np.maximum(residuals[declared], left_over)
    order = np.lexsort((-values[:k], -np.abs(values[:k])))
    floor = ROUND_OFF * torch.finfo(vectors_KP.dtype).eps * float(np.abs(values).max())
    leading, errors = values[:k][order], residuals[:k][order]
    bound = max(rtol * max(float(np.abs(leading[-1])), above), floor)

    def extreme(index: np.intp) -> Extreme:
        value, residual = float(values[index]), float(residuals[index])
        met = residual <= max(bound, rtol * abs(value))
        return Extreme(value, residual, met, vectors_KP[int(index)].cpu().numpy())

    return EigenPairs(
        values_K=leading,
        vectors_KP=fix_signs(vectors_KP[:k].cpu().numpy()[order]),
        residuals_K=errors,
        converged_K=errors <= np.maximum(rtol * np.abs(leading), floor),
        smallest=extreme(np.argmin(values)),
        largest=extreme(np.argmax(values)),
        products=products,
        declared_K=declared[:k][order],
    )


def _excess(
    ritz: Ritz,
    leading_K: NDArray[np.intp],
    bounds_K: Floats,
    rtol: float,
    above: float,
    ends: float | None,
) -> float:
    """The largest residual of the pairs wanted and of both ends, as a multiple of its bound."""
    residuals_K = ritz.residuals_J[leading_K]
    wanted_K = np.abs(ritz.values_J[leading_K]) + residuals_K >= above
    residuals, bounds = residuals_K[wanted_K], bounds_K[wanted_K]
    if ends is not None:
        two = [0, -1]
        ends_bounds = ends * np.maximum(bounds_K[-1], rtol * np.abs(ritz.values_J[two]))
        residuals = np.append(residuals, ritz.residuals_J[two])
        bounds = np.append(bounds, ends_bounds)
    return float((residuals / np.maximum(bounds, np.finfo(float).tiny)).max(initial=0.0))


class _Look:
    """The look from a fresh direction that shows whether pairs are missing from a set.

    Args:
        process: What it is part of.
        believed_K: Magnitudes of the set, by rank, as long as there has been no look.

    Attributes:
        until: The number of products with which it is over; 0 before there is one.
    """

    def __init__(self, process: Lanczos, believed_K: Floats) -> None:
        self._process, self._believed_K = process, believed_K
        self.until, self._in_turn = 0, 0

    @property
    def ahead(self) -> bool:
        """Whether the fresh direction is being followed alone."""
        left = self.until - self._process.products
        return self._in_turn < left <= self._in_turn + _AHEAD

    @property
    def over(self) -> bool:
        """Whether it has had its products."""
        return self._process.products >= self.until

    def begin(self, level_K: Floats) -> None:
        """Look, believing in these magnitudes. Directions that wait come first.

        What lies along them is hidden from the fresh one.
        """
        self._believed_K[: len(level_K)] = level_K
        waiting = self._process.waiting
        self._in_turn = _ROUNDS * (waiting + 1)
        self.until = self._process.products + waiting + _AHEAD + self._in_turn
        self._process.look()

    def added(
        self, ritz: Ritz, leading_K: NDArray[np.intp], level_K: Floats, bounds_K: Floats
    ) -> bool:
        """Whether copies were missing: they are in the set and have raised what follows them."""
        shares_K = self._process.sought(ritz.coefficients_JJ[:, leading_K])
        raised_K = level_K > self._believed_K[: len(level_K)] + bounds_K
        return bool((shares_K > _A_COPY).any() and raised_K.any())


def _copies(values_K: Floats, bounds_K: Floats) -> int:
    """The most of some eigenvalues that are the same within their bounds."""
    if not len(values_K):
        return 0
    order_K = np.argsort(values_K)
    sorted_K, within_K = values_K[order_K], bounds_K[order_K]
    apart = np.diff(sorted_K) > within_K[1:] + within_K[:-1]
    return int(np.bincount(np.append(0, np.cumsum(apart))).max())


def check_count(k: int, dim: int) -> None:
    """Refuse a number of pairs that the operator does not have.

    Raises:
        ValueError: `k` is not in 1..dim−1.
    """
    if not 1 <= k < dim:
        raise ValueError(f"k={k} eigenpairs of a {dim}×{dim} operator; k must be in 1..{dim - 1}")


def _kept(ritz: Ritz, k: int, capacity: int) -> NDArray[np.intp]:
    """Which Ritz pairs a thick restart keeps: the leading ones with a margin, and both ends."""
    margin = k + max(4, (capacity - k) // 3)
    leading = np.argsort(-np.abs(ritz.values_J), kind="stable")[:margin]
    every = np.arange(len(ritz.values_J))
    return np.union1d(leading, [*every[:3], *every[-3:]])


def fix_signs(vectors_KP: Floats) -> Floats:
    """Each row with its entry of largest magnitude positive."""
    peak = np.abs(vectors_KP).argmax(axis=1)
    signs = np.sign(vectors_KP[np.arange(len(vectors_KP)), peak])
    return vectors_KP * np.where(signs == 0, 1, signs).astype(vectors_KP.dtype)[:, None]
