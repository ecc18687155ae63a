"""Steps of test accuracy between neighbouring strengths, and those that stand out.

Neighbouring strengths are those of one replicate: two replicates may sit on different branches
at the same strength, and their difference is not a jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectra.report.branch import Branch

_JUMP_POINTS, _JUMP_PERCENT, _JUMP_TYPICAL, _JUMPS = 20, 1.0, 8.0, 12
"""A jump is a step of at least 1 point and 8 times the median step, on a grid of 20 or more
strengths (a coarser one has no typical step); at most 12 are kept, the largest."""


@dataclass(frozen=True)
class Step:
    """The change of test accuracy (percent) between two neighbouring strengths."""

    replicate: int
    low: float
    high: float
    before: float
    after: float

    @property
    def drop(self) -> float:
        """By how many points the accuracy falls from the lower to the higher strength."""
        return self.before - self.after


def steps(branch: Branch) -> list[Step]:
    """All steps between neighbouring strengths of a replicate, where both accuracies are known."""
    l2_S, accuracy_S = branch.strengths.tolist(), branch.column("Test_Accuracy").tolist()
    found = [
        Step(branch.replicate, *ends)
        for ends in zip(l2_S, l2_S[1:], accuracy_S, accuracy_S[1:], strict=False)
    ]
    return [step for step in found if np.isfinite(step.drop)]


def jumps(branch: Branch) -> list[Step]:
    """The steps that stand out from the others of the same replicate, by strength."""
    every = steps(branch)
    if len(every) + 1 < _JUMP_POINTS:
        return []
    typical = float(np.median([abs(step.drop) for step in every]))
    limit = max(_JUMP_PERCENT, _JUMP_TYPICAL * typical)
    largest = sorted((s for s in every if abs(s.drop) >= limit), key=lambda s: -abs(s.drop))
    return sorted(largest[:_JUMPS], key=lambda step: step.low)


def steepest(branches: Sequence[Branch]) -> Step | None:
    """The largest fall of all replicates; None where the accuracy never falls."""
    falls = [step for branch in branches for step in steps(branch) if step.drop > 0]
    return max(falls, key=lambda step: step.drop, default=None)
