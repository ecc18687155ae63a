"""The spectrum at one point of a landscape: gradient, leading pairs, smallest eigenvalue.

The Hessian is that of the mean cross-entropy, H_CE. Under L_eff = L_CE + c‖θ − ref‖² every
eigenvalue is larger by exactly 2c and the eigenvectors are the same, so nothing is solved
twice. A stationary point of L_eff is a minimum exactly when λ_min(H_CE) ≥ −2c.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectra.curvature.arpack import leading_eigenpairs_arpack
from spectra.curvature.eigen import EigenPairs, leading_eigenpairs
from spectra.curvature.equal_units import Quotient, quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import Hessian, MatVec
from spectra.curvature.reduction import WORTHWHILE, reduced_eigenpairs
from spectra.mlp import Mlp
from spectra.objective import L2Penalty

_EQUAL = 0.01
"""Share of the tolerance of the eigenpairs within which units count as equal."""


class Merged(NamedTuple):
    """The classes of equal units, and the quotient's Hessian where solving that pays."""

    quotient: Quotient
    hessian: MlpHessian | None


def merged(
    mlp: Mlp, theta_P: Tensor, fused: Callable[[Mlp, Tensor], MlpHessian] | None, *, rtol: float
) -> Merged:
    """Look for equal units, and set up the quotient's Hessian where that pays.

    Args:
        mlp: The network.
        theta_P: Its parameters.
        fused: Makes the Hessian of a network of this family on the data; None leaves that.
        rtol: Tolerance of the eigenpairs, a hundredth of which units that are equal may differ by.
    """
    classes = quotient(mlp, theta_P, _EQUAL * rtol)
    if fused is None or classes.mlp.dim > WORTHWHILE * mlp.dim:
        return Merged(classes, None)
    return Merged(classes, fused(classes.mlp, classes.merge(theta_P)))


@dataclass(frozen=True)
class Spectrum:
    """What is known of H_CE and the two gradients at θ; losses in nats.

    Attributes:
        loss: L_CE(θ).
        objective: L_eff(θ).
        gradient_ce_P: ∇L_CE(θ).
        gradient_P: ∇L_eff(θ).
        pairs: The leading eigenpairs of H_CE, with its smallest algebraic eigenvalue.
        units: How many different units each hidden layer has, where that was looked at.
        shift: 2c, what H_eff adds to every eigenvalue.
    """

    loss: float
    objective: float
    gradient_ce_P: Tensor
    gradient_P: Tensor
    pairs: EigenPairs
    units: tuple[int, ...]
    shift: float


def leading(
    hessian: Hessian,
    solve: Callable[..., EigenPairs] = leading_eigenpairs,
    *,
    k: int,
    rtol: float,
    max_products: int,
    generator: torch.Generator,
    merged: Merged | None = None,
    on_product: Callable[[int], None] = lambda _: None,
) -> EigenPairs:
    """The leading eigenpairs of a Hessian, those of the merged network's where that pays.

    Args:
        hessian: The Hessian of the whole network.
        solve: Finds them where that does not.
        k: See `spectrum`, as for the others.
        rtol: See there.
        max_products: See there.
        generator: See there.
        merged: See there.
        on_product: Told the running number of products, of whatever size.

    Returns:
        The pairs, with all products counted.

    Raises:
        ValueError: `k` is not in 1..P−1.
        NonFiniteError: A product is NaN or infinite.
    """
    spent = 0

    def counted(product: MatVec) -> MatVec:
        def matvec(v: Tensor) -> Tensor:
            nonlocal spent
            spent += len(v) if v.ndim == 2 else 1
            on_product(spent)
            return product(v)

        return matvec

    how: dict[str, Any] = {
        "k": k, "rtol": rtol, "max_products": max_products, "generator": generator,
    }  # fmt: skip
    pairs = None
    if merged is not None and merged.hessian is not None:
        pairs = reduced_eigenpairs(hessian, merged.quotient, merged.hessian, counted=counted, **how)
    if pairs is None:
        like_P = hessian.gradient_P
        pairs = solve(
            counted(hessian), dim=hessian.dim, dtype=like_P.dtype, device=like_P.device, **how
        )
    return replace(pairs, products=spent)


def spectrum(
    hessian: Hessian,
    theta_P: Tensor,
    *,
    penalty: L2Penalty,
    k: int,
    rtol: float,
    max_products: int,
    solver: str,
    generator: torch.Generator,
    merged: Merged | None = None,
    on_product: Callable[[int], None] = lambda _: None,
) -> Spectrum:
    """Compute the spectrum of the mean cross-entropy at θ.

    Args:
        hessian: That of the mean cross-entropy at θ.
        theta_P: The point.
        penalty: The L2 term of the objective.
        k: Leading pairs wanted.
        rtol: Relative residual at which a pair has converged.
        max_products: Bound on products.
        solver: "lanczos" or "eigsh".
        generator: Gives the solver's start vector; on the CPU.
        merged: The network with its equal units merged, to solve that instead where it pays.
        on_product: Told the running number of products.

    Raises:
        ValueError: `k` is not in 1..P−1.
        NonFiniteError: A product is NaN or infinite.
    """
    pairs = leading(
        hessian, leading_eigenpairs if solver == "lanczos" else leading_eigenpairs_arpack,
        merged=merged, on_product=on_product,
        k=k, rtol=rtol, max_products=max_products, generator=generator,
    )  # fmt: skip
    return Spectrum(
        loss=hessian.loss,
        objective=hessian.loss + penalty.value(theta_P),
        gradient_ce_P=hessian.gradient_P,
        gradient_P=hessian.gradient_P + penalty.gradient(theta_P),
        pairs=pairs,
        units=merged.quotient.mlp.widths[1:-1] if merged is not None else (),
        shift=penalty.shift,
    )
