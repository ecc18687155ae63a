"""The objective: mean cross-entropy plus an L2 penalty, and which convention.

    L_eff(θ) = L_CE(θ) + c ‖θ − ref‖²,    c = λ   (penalty "full", the default)
                                          c = λ/2 (penalty "half", Adam's `weight_decay`)

so that ∇L_eff = ∇L_CE + 2c(θ − ref) and H_eff = H_CE + 2c I: the two Hessians share their
eigenvectors and their eigenvalues differ by exactly 2c. ref is 0 unless a reference point is
given. This file is the only place where a convention becomes a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class L2Penalty:
    """c ‖θ − ref‖² with c = λ ("full") or λ/2 ("half")."""

    l2: float
    convention: str = "full"
    reference_P: Tensor | None = None

    @property
    def coefficient(self) -> float:
        """c, the number that multiplies ‖θ − ref‖²."""
        return self.l2 if self.convention == "full" else self.l2 / 2

    @property
    def shift(self) -> float:
        """2c, by which every eigenvalue of H_eff exceeds that of H_CE."""
        return 2 * self.coefficient

    def value(self, theta_P: Tensor) -> float:
        """The penalty c ‖θ − ref‖², summed in float64."""
        return self.coefficient * float(self._offset(theta_P).double().square().sum())

    def gradient(self, theta_P: Tensor) -> Tensor:
        """2c (θ − ref)."""
        return self.shift * self._offset(theta_P)

    def _offset(self, theta_P: Tensor) -> Tensor:
        return theta_P if self.reference_P is None else theta_P - self.reference_P


def cross_entropy_sum(logits_NC: Tensor, labels_N: Tensor, *, exact: bool = False) -> Tensor:
    """The cross-entropy of integer labels, summed (not averaged) over the examples, in nats.

    Sums are what chunks of unequal size may be added from; the mean is the sum over N. An
    `exact` sum is taken in float64.
    """
    if exact:
        return functional.cross_entropy(logits_NC, labels_N, reduction="none").double().sum()
    return functional.cross_entropy(logits_NC, labels_N, reduction="sum")
