"""Leading eigenpairs of a network with equal units, from its quotient and its differences.

See `equal_units` for why the Hessian splits, and `differences` for what equal units do against each
other. The symmetric part is the quotient network's Hessian between two diagonal scalings. A
layer's differences are solved together, and their eigenvectors taken apart by class; the copies of
each follow without a product.

That units are equal holds to round-off only, so the result is put to the whole network's Hessian:
one product with a random combination Σ ± v of the outliers and one of the rest. By the signs,
|H Σ±v − Σ±λv|² is in the mean the sum of all squared residuals; it is reported where it exceeds a
pair's own residual, for one pair may have all of it, and if it says that the pairs are not those
of the whole, there is no result.

Letters: P parameters, p of the quotient network, G classes of two or more units in a layer, K
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra.curvature.differences import Differences
from spectra.curvature.eigen import (
    ROUND_OFF,
    EigenPairs,
    Extreme,
    certified,
    fix_signs,
    leading_eigenpairs,
)
from spectra.curvature.equal_units import Quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import MatVec

WORTHWHILE = 0.5
"""Share of the parameters that the quotient may keep for the reduction to be tried."""

_STARTS, _NARROW = 4, 32
"""Random vectors that parts are solved from on a CPU, up to so many units a layer: calls take most
of the time there, and a vector of four costs from 0.4 (one unit) to 0.7 of one alone (32). Beyond
that, and on a GPU where a single product is a captured graph, the further products eat it up."""
_OUTLYING = 3.0
"""Multiples of |λ_K| above which pairs are put to the whole Hessian apart from the rest."""
_TIGHTER = 0.1
"""Share of the tolerance to which differences are solved, which are cheap and mixed by class, and
both ends of the quotient's spectrum: pairs wanted are few there, and an end that crowds could be
beyond one of the differences' that has long converged."""
_FEWEST = 4
"""Differences that a layer is asked for at least."""
_SPREAD = 1.5
"""Times as many as would do if all classes had as many units: those that lead may have fewer, and
to begin anew for more takes longer than to find some more at once."""


@dataclass(frozen=True)
class _Found:
    """An eigenpair of a part: what it stands for in the space of all parameters, how often."""

    value: float
    residual: float
    converged: bool
    copies: int
    lift: Callable[[int], Tensor]


def reduced_eigenpairs(
    whole: MatVec,
    quotient: Quotient,
    hessian: MlpHessian,
    *,
    k: int,
    rtol: float,
    max_products: int,
    generator: torch.Generator,
    counted: Callable[[MatVec], MatVec] = lambda product: product,
) -> EigenPairs | None:
    """The `k` eigenpairs of largest magnitude of a network with equal units.

    Args:
        whole: The Hessian of the whole network, which has the last word.
        quotient: Its classes of equal units.
        hessian: The Hessian of the quotient network.
        k: Pairs wanted.
        rtol: See `leading_eigenpairs`.
        max_products: Bound on the products of each part.
        generator: Gives start vectors and signs; on the CPU.
        counted: Wraps every product, of whatever size, for somebody who watches.

    Returns:
        The pairs; `products` counts those of all sizes. None where the parts have fewer than
        `k`, where one did not converge, or where the whole Hessian disagrees.
    """
    scale_p = quotient.scale_p
    narrow = max(quotient.mlp.widths[1:]) <= _NARROW
    how: dict[str, Any] = {
        "max_products": max_products, "generator": generator,
        "dtype": scale_p.dtype, "device": scale_p.device,
        "starts": _STARTS if narrow and scale_p.device.type == "cpu" else 1,
    }  # fmt: skip
    whole = counted(whole)
    found: list[_Found] = []
    ends: list[Extreme] = []
    products, above = 0, 0.0
    for layer in range(quotient.mlp.layers - 1):
        part = Differences(hessian, quotient, layer)
        if part.dim:
            tighter = {**how, "rtol": rtol * _TIGHTER, "above": above}
            own, pairs, spent = _enough(part, counted(part), k, tighter)
            found += own
            ends += [_end(part, end) for end in (pairs.smallest, pairs.largest)]
            products += spent
            above = _last(found, k)

    def symmetric(z: Tensor) -> Tensor:
        return scale_p * hessian(scale_p * z)

    few = min(k, len(scale_p) - 1)
    pairs = leading_eigenpairs(
        counted(symmetric), dim=len(scale_p), k=few, rtol=rtol, above=above, ends=_TIGHTER, **how
    )
    vectors_Kp = torch.from_numpy(pairs.vectors_KP).to(scale_p.device)
    for i, value in enumerate(pairs.values_K.tolist()):
        found.append(
            _Found(
                value, float(pairs.residuals_K[i]), bool(pairs.converged_K[i]), 1,
                partial(_lifted, quotient, vectors_Kp[i]),
            )
        )  # fmt: skip
    for end in (pairs.smallest, pairs.largest):
        lifted_P = quotient.lift(torch.from_numpy(end.vector_P).to(scale_p))
        ends.append(replace(end, vector_P=lifted_P.cpu().numpy()))
    found = [pair for pair in found if abs(pair.value) >= above]
    found.sort(key=lambda f: (-abs(f.value), -f.value))
    if not all(f.converged for f in found) or not all(end.converged for end in ends):
        return None
    return _put_to(whole, found, ends, k=k, rtol=rtol, products=products + pairs.products,
                   generator=generator)  # fmt: skip


def _end(part: Differences, end: Extreme) -> Extreme:
    """An extreme of a layer's differences, with its vector for all parameters.

    Where classes share the eigenvalue, that is the part of the class that has most of it.
    """
    blocks_Gx = torch.from_numpy(end.vector_P).unflatten(0, (len(part.classes_G), -1))
    index = int(blocks_Gx.norm(dim=1).argmax())
    vector_x = blocks_Gx[index] / blocks_Gx[index].norm()
    return replace(end, vector_P=part.lift(vector_x, index, 0).cpu().numpy())


def _last(found: Sequence[_Found], k: int) -> float:
    """The magnitude of the last of the `k` leading pairs, copies counted; 0 with fewer."""
    magnitudes = sorted((abs(f.value) for f in found for _ in range(f.copies)), reverse=True)
    return magnitudes[k - 1] if len(magnitudes) >= k else 0.0


def _enough(
    part: Differences, product: MatVec, k: int, how: dict[str, Any]
) -> tuple[list[_Found], EigenPairs, int]:
    """A layer's leading differences until `k` copies are there or they fall below `above`.

    Returns:
        Those of its classes, the solution they are from, and the products spent.
    """
    if part.dim <= k:
        pairs = _every(part.dim, product, how)
        return _by_class(part, pairs), pairs, pairs.products
    wanted, spent = _FEWEST, 0
    if not how["above"]:  # above a bound, a few show whether there are any
        copies_each = sum(count - 1 for count in part.counts) / len(part.counts)
        wanted = max(wanted, math.ceil(_SPREAD * k / copies_each))
    while True:
        wanted = min(wanted, k)
        pairs = leading_eigenpairs(product, dim=part.dim, k=wanted, **how)
        spent += pairs.products
        found = _by_class(part, pairs)
        copies = sum(f.copies for f in found)
        below = abs(pairs.values_K[-1]) < how["above"]
        if copies >= k or below or wanted == k:
            return found, pairs, spent
        wanted *= 3


def _every(dim: int, product: MatVec, how: dict[str, Any]) -> EigenPairs:
    """All eigenpairs of a small part, of which Lanczos would leave out one."""
    identity_pp = torch.eye(dim, dtype=how["dtype"], device=how["device"])
    images_pp = product(identity_pp)
    vectors_pp = torch.linalg.eigh(images_pp).eigenvectors.t()
    return certified(
        vectors_pp, vectors_pp @ images_pp,
        k=dim, rtol=how["rtol"], products=dim, above=how["above"],
    )  # fmt: skip


def _by_class(part: Differences, pairs: EigenPairs) -> list[_Found]:
    """A layer's eigenpairs as those of its classes.

    An eigenvector of a block-diagonal operator is one of every block that it reaches. Where two
    classes have close eigenvalues it reaches both, so each class gets its shares of all vectors,
    and the Rayleigh-Ritz pairs among them.
    """
    blocks_KGx = torch.from_numpy(pairs.vectors_KP).unflatten(1, (len(part.classes_G), -1))
    values_K = torch.from_numpy(pairs.values_K)
    found: list[_Found] = []
    for index, count in enumerate(part.counts):
        reached_K = blocks_KGx[:, index].norm(dim=1) > 0.1
        shares_Kx = blocks_KGx[reached_K, index].double()
        left, sizes, basis_Jx = torch.linalg.svd(shares_Kx, full_matrices=False)
        keep_J = sizes > 0.1
        left, sizes, basis_Jx = left[:, keep_J], sizes[keep_J], basis_Jx[keep_J]
        # D of a share is λ times it, so D of the basis follows without a product.
        images_Jx = (left * values_K[reached_K, None]).t() @ shares_Kx / sizes[:, None]
        values_J, turns_JJ = torch.linalg.eigh(images_Jx @ basis_Jx.t())
        for value, vector_x in zip(values_J, turns_JJ.t() @ basis_Jx, strict=True):
            nearest = int((values_K - value).abs().argmin())
            found.append(
                _Found(
                    float(value), float(pairs.residuals_K[nearest]),
                    bool(pairs.converged_K[nearest]), count - 1,
                    partial(part.lift, vector_x, index),
                )
            )  # fmt: skip
    return found


def _lifted(quotient: Quotient, z_p: Tensor, _copy: int) -> Tensor:
    return quotient.lift(z_p)


def _put_to(
    whole: MatVec,
    found: Sequence[_Found],
    ends: Sequence[Extreme],
    *,
    k: int,
    rtol: float,
    products: int,
    generator: torch.Generator,
) -> EigenPairs | None:
    """The `k` leading pairs with their copies, if the whole network's Hessian agrees."""
    chosen = [(pair, copy) for pair in found for copy in range(pair.copies)][:k]
    if len(chosen) < k:
        return None
    vectors_KP = torch.stack([pair.lift(copy) for pair, copy in chosen])
    values_K = np.array([pair.value for pair, _ in chosen])
    residuals_K = np.array([pair.residual for pair, _ in chosen])
    floor = ROUND_OFF * torch.finfo(vectors_KP.dtype).eps * abs(values_K[0])
    bounds_K = np.maximum(rtol * np.abs(values_K), floor)
    outlying_K = np.abs(values_K) > _OUTLYING * abs(values_K[-1])
    for members_K in (outlying_K, ~outlying_K):
        if not members_K.any():
            continue
        rows_JP = vectors_KP[torch.from_numpy(members_K)]
        signs_J = torch.randint(0, 2, (len(rows_JP),), generator=generator).mul_(2).sub_(1)
        weights_J = signs_J.to(rows_JP)
        scaled_J = (signs_J * torch.from_numpy(values_K[members_K])).to(rows_JP)
        rest_P = whole(weights_J @ rows_JP) - scaled_J @ rows_JP
        products += 1
        missed = float(rest_P.double().norm())
        if not missed <= float(bounds_K[members_K].min()):
            return None
        residuals_K[members_K] = np.maximum(residuals_K[members_K], missed)
    return EigenPairs(
        values_K=values_K,
        vectors_KP=fix_signs(vectors_KP.cpu().numpy()),
        residuals_K=residuals_K,
        converged_K=residuals_K <= bounds_K,
        smallest=min(ends, key=lambda end: end.value),
        largest=max(ends, key=lambda end: end.value),
        products=products,
        declared_K=np.zeros(k, bool),
    )
