"""The objective: mean cross-entropy plus an L2 penalty, and which convention.

    L_eff(θ) = L_CE(θ) + c ‖θ − ref‖²,    c = λ   (penalty "full", the default)
                                          c = λ/2 (penalty "half", Adam's `weight_decay`)

so that ∇L_eff = ∇L_CE + 2c(θ − ref) and H_eff = H_CE + 2c I: the two Hessians share their
eigenvectors and their eigenvalues differ by exactly 2c. ref is 0 unless a reference point is
given. This file is the only place where a convention becomes a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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

    def add_gradient_(self, gradient_P: Tensor, theta_P: Tensor) -> None:
        """Add 2c (θ − ref) to a gradient in place, without a temporary."""
        gradient_P.add_(theta_P, alpha=self.shift)
        if self.reference_P is not None:
            gradient_P.sub_(self.reference_P, alpha=self.shift)

    def _offset(self, theta_P: Tensor) -> Tensor:
        return theta_P if self.reference_P is None else theta_P - self.reference_P


Logits = Callable[[Tensor, Tensor], Tensor]
"""`(θ_P, inputs) -> logits_NC`: a network as a pure function of its parameters."""


def cross_entropy_sum(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The cross-entropy of integer labels, summed (not averaged) over the examples, in nats.

    Sums are what chunks of unequal size may be added from; the mean is the sum over N.
    """
    return functional.cross_entropy(logits_NC, labels_N, reduction="sum")


@torch.no_grad()
def evaluate(
    logits: Logits, theta_P: Tensor, inputs_ND: Tensor, labels_N: Tensor, *, chunk: int = 10_000
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (percent), accumulated over chunks in float64."""
    loss, hits = 0.0, 0
    for x, y in zip(inputs_ND.split(chunk), labels_N.split(chunk), strict=True):
        z = logits(theta_P, x)
        loss += float(functional.cross_entropy(z, y, reduction="none").double().sum())
        hits += int((z.argmax(dim=1) == y).sum())
    return loss / len(labels_N), 100 * hits / len(labels_N)
