"""Polishing a network: first with its equal units merged, then as a whole.

Under L2 regularisation the hidden units of a trained network coalesce, but for the noise of the
training. The gradient of a network with equal units lies in the subspace in which they stay equal,
so Newton's method there is Newton's method of the whole, with products several times cheaper. Units
are merged where the training has left little between them, the quotient is polished, and the whole
network goes on from its lift: at once at its floor where the units were truly equal, and out of the
symmetry, along the negative direction that breaks it, where they were not. The whole has the last
word.

Letters: P parameters, p coordinates of the quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spectra.curvature.equal_units import Quotient, quotient
from spectra.curvature.reduction import WORTHWHILE
from spectra.mlp import Mlp
from spectra.objective import L2Penalty
from spectra.polish.landscape import Landscape
from spectra.polish.network import Labelled, NetworkLandscape
from spectra.polish.newton import Polished, State, polish

WITHIN = 0.01
"""Distance between equal units, relative; see `quotient`. On 784-128-128-10 merging at 0.3 ended in
other, higher minima at λ = 0.02 and 0.04; at this it did not."""
_COARSE = 1e-9
"""‖∇L_eff‖ at which the whole takes over from the quotient where it rounds to float32."""


def polish_network(
    mlp: Mlp,
    theta_P: Tensor,
    penalty: L2Penalty,
    data: Labelled,
    *,
    max_products: float,
    generator: torch.Generator,
    tolerance: float | None = None,
    merge: bool = True,
    state: State | None = None,
    on_product: Callable[[float], None] = lambda _: None,
    on_step: Callable[[State], None] = lambda _: None,
) -> Polished:
    """Descend from trained weights to a stationary point of L_eff.

    Args:
        mlp: The network.
        theta_P: Trained weights; float32 ends at float32's floor, float64 at float64's.
        penalty: The L2 term.
        data: The examples; products are in their dtype.
        max_products: Budget, products of the quotient included.
        generator: See `newton.polish`.
        tolerance: ‖∇L_eff‖ to be reached; None for the floor.
        merge: Merge equal units first, where that pays.
        state: What an earlier call with the same weights has told `on_step`: a point of the
            quotient or, by its length, of the whole.
        on_product: Told the running number of products.
        on_step: Told of every step accepted.

    Raises:
        ValueError: A bound is not positive.
        NonFiniteError: The network is not finite at the weights.
    """
    whole = NetworkLandscape(mlp, data)
    products_in = data.inputs.dtype
    doubled_P = theta_P.detach().double()

    def descend(
        landscape: Landscape, x_P: Tensor, wanted: float | None, start: State | None
    ) -> Polished:
        return polish(
            landscape, x_P, penalty, max_products=max_products, generator=generator,
            tolerance=wanted, products_in=products_in, state=start, on_product=on_product,
            on_step=on_step,
        )  # fmt: skip

    classes = quotient(mlp, doubled_P, WITHIN)
    pays = merge and penalty.reference_P is None and classes.mlp.dim <= WORTHWHILE * mlp.dim
    if pays and (state is None or state.x_P.numel() != mlp.dim):
        z_p = classes.merge(doubled_P) / classes.scale_p
        fine = _COARSE if theta_P.dtype == torch.float32 else None
        wanted = fine if tolerance is None else tolerance
        found = descend(NetworkLandscape.merged(classes, data), z_p, wanted, state)
        if not found.stationary:
            return _lifted(classes, found, theta_P.dtype)
        state = State(
            classes.lift(found.x_P).to(theta_P.dtype), found.radius, found.products, found.steps,
            found.escapes,
        )  # fmt: skip
        on_step(state)
    return descend(whole, theta_P, tolerance, state)


def _lifted(classes: Quotient, found: Polished, dtype: torch.dtype) -> Polished:
    """What was found of the quotient, of the whole: lengths and gradients carry over."""
    return replace(
        found, x_P=classes.lift(found.x_P).to(dtype),
        gradient_ce_P=classes.lift(found.gradient_ce_P), lowest=None,
    )  # fmt: skip
