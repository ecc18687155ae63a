"""The objective as a landscape: at every point a value, a slope and a curvature.

A method that descends needs no network, only this. `Landscape` is what it is written against: the
mean cross-entropy of a whole network, of a network with its equal units merged, or any small
function in a test. `Penalised` adds the penalty, so that L_eff, ∇L_eff and H_eff come from one
place.

Coordinates are the landscape's own, x_P. In a quotient network they are those in which the lift
to all parameters keeps lengths, so ‖x‖ = ‖θ‖ and the penalty needs no other form.

What is evaluated at a point, and what is multiplied, may differ in precision: a Newton step from
products in float32, judged and corrected by losses and gradients in float64, is iterative
refinement, and ends at the floor of the latter for the price of the former.

Letters: P coordinates.

Source: J. H. Wilkinson, Rounding Errors in Algebraic Processes (HMSO, 1963), ch. 3, on iterative
refinement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spectra.objective import L2Penalty


class Local(Protocol):
    """The mean cross-entropy near a point.

    Attributes:
        loss: L_CE(x), nats.
        gradient_P: ∇L_CE(x), at best in float64.
    """

    @property
    def loss(self) -> float:
        """L_CE(x)."""

    @property
    def gradient_P(self) -> Tensor:  # noqa: N802 - shapes live in names
        """∇L_CE(x)."""

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product H_CE(x) v, of v's dtype; what it needs is prepared at the first call."""


class Landscape(Protocol):
    """The mean cross-entropy as a function of P coordinates.

    Attributes:
        dim: P.
        evaluation: What a loss with its gradient costs, in products.
        preparation: What the first product at a point costs besides itself, in products.
    """

    dim: int
    evaluation: float
    preparation: float

    def at(self, x_P: Tensor) -> Local:
        """The landscape near x.

        Raises:
            NonFiniteError: The loss or its gradient is NaN or infinite there.
        """


@dataclass(frozen=True)
class Penalised:
    """L_eff = L_CE + c ‖x − ref‖² near a point.

    Attributes:
        x_P: The point.
        local: The cross-entropy there.
        penalty: The L2 term.
        objective: L_eff(x).
        gradient_P: ∇L_eff(x), in float64 whatever the dtype of x.
        gradient_norm: ‖∇L_eff(x)‖, in float64.
    """

    x_P: Tensor
    local: Local
    penalty: L2Penalty
    objective: float
    gradient_P: Tensor
    gradient_norm: float

    @classmethod
    def at(cls, landscape: Landscape, x_P: Tensor, penalty: L2Penalty) -> Penalised:
        """Evaluate a landscape with a penalty at a point."""
        local = landscape.at(x_P)
        gradient_P = local.gradient_P + penalty.gradient(x_P.double())
        return cls(
            x_P=x_P,
            local=local,
            penalty=penalty,
            objective=local.loss + penalty.value(x_P),
            gradient_P=gradient_P,
            gradient_norm=float(gradient_P.double().norm()),
        )

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product H_eff v = H_CE v + 2c v."""
        return self.local(v_P).add_(v_P, alpha=self.penalty.shift)
