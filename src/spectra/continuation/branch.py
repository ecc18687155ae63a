"""A branch of stationary points, followed until it folds, loses its stability or arrives.

The predictor is the tangent with the last step's curvature, the corrector Newton's method on the
sphere (see `sphere`). The step grows while the corrector hardly works and shrinks when it labours.
It is taken back, for a shorter one, when what it found may lie on another branch:

- the corrector failed, or landed far from where the tangent pointed;
- the chord is not the mean of the tangents at its ends, which differs by (turn)²/12 of it;
- more happened than one event of a kind, or one that on a closer look has no place: the quantity
  that should go through zero leaps over it.

A bend narrower than a step, into the line of a neighbour just as narrow, is still not seen: the
bound on the step is what there is against that.

At every point the lowest eigenvalues of H_eff are counted, those that keep the symmetry of the
coordinates and, where units were merged, those that break it. Between two points something
happened if

- ds/dr changed its sign: a **fold**, beyond which λ turns back. As λ grows this is where a minimum
  ends, the spinodal;
- the number of negative directions changed otherwise: a **crossing** within the symmetry, or a
  **breaking** of it.

Each is located by regula falsi on the quantity that goes through zero, with a corrected point at
every trial.

Letters: P coordinates, J eigenvalues.

Source: E. L. Allgower, K. Georg, Introduction to Numerical Continuation Methods (SIAM, 2003), ch. 6
to 9; M. Dowell, P. Jarratt, A modified regula falsi method, BIT 11 (1971) 168-174.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from spectra.continuation.krylov import Lowest, every, lowest
from spectra.continuation.sphere import Place, Sphere
from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError
from spectra.polish.landscape import Local

Kind = Literal["start", "step", "fold", "crossing", "breaking", "target"]

_EASY, _HARD, _MOST = 1, 3, 6
_GROWTH, _SHRINKAGE = 1.6, 0.5
_LARGEST = 0.15
"""Of a step in r, relative to r."""
_STRAY = 0.5
"""Share of a step by which the corrector may move its end."""
_BENT = 0.1
"""Share of a chord by which the mean of its tangents may miss it: a turn of one radian."""
_RETRIES = 12
_SHORTEST = 1e-9
"""Step relative to r below which none is tried: the branch turns back in r there."""
_DOUBTS = 8
"""How often a step is halved to tell events apart, before they count as simultaneous."""
_TRIALS = 40
_DIGITS = 1e-8
"""Relative change of λ at which an event is located; a target is, to the corrector's tolerance."""
_NARROW = 1e-3
"""Share of its values around an event to which the quantity that goes through zero must fall."""
_LEAP = 0.05
"""Share of those values that, left on a bracket without width, is a leap and no event."""
_SMALL = 64
"""Rows up to which an operator is written out."""


@dataclass(frozen=True)
class Part:
    """Directions outside the landscape's coordinates: H_CE among them, and how often each counts.

    Attributes:
        matvec: `v_J -> (Hv)_J`.
        dim: How many coordinates they have.
        copies: For how many directions an eigenvector stands.
    """

    matvec: MatVec
    dim: int
    copies: Callable[[Tensor], int]


@dataclass(frozen=True)
class Point:
    """A stationary point of the branch.

    Attributes:
        kind: What it is there for.
        l2: λ.
        x_P: Its coordinates.
        r: ‖x − ref‖².
        loss: L_CE, nats.
        objective: L_eff.
        gradient_norm: ‖∇L_eff‖.
        slope: dλ/dr; negative where more regularisation means a smaller norm.
        lowest: The lowest eigenvalue of H_eff that keeps the symmetry.
        breaking: The lowest that breaks it; None where there is no such direction.
        negative: How many directions of H_eff are negative, in all.
        residual: Of the lowest eigenpairs, the worst.
        products: Spent by the branch so far.
    """

    kind: Kind
    l2: float
    x_P: Tensor
    r: float
    loss: float
    objective: float
    gradient_norm: float
    slope: float
    lowest: float
    breaking: float | None
    negative: int
    residual: float
    products: float


@dataclass(frozen=True)
class _Here:
    """A point with what the next step needs."""

    point: Point
    velocity_P: Tensor
    symmetric: Lowest
    parts: Sequence[Lowest]


@dataclass(frozen=True)
class Follow:
    """How a branch is followed.

    Attributes:
        to: λ at which it ends, if nothing ends it before.
        longest: Bound on a step in λ.
        beyond: Whether to go on through folds and other events, until λ is back where it began.
        max_products: Bound on all products.
        atol: Bound on the residuals of the lowest eigenvalues.
    """

    to: float
    longest: float
    beyond: bool = False
    max_products: float = math.inf
    atol: float = 1e-4


class Branch:
    """A branch of stationary points from one of them on.

    Args:
        sphere: The landscape, on spheres.
        how: How it is followed.
        parts: Given the landscape near a point, the directions outside its coordinates.

    Attributes:
        ended: Why it ended: "target", "fold", "crossing", "breaking", "back", "budget", "lost".
    """

    def __init__(
        self,
        sphere: Sphere,
        how: Follow,
        parts: Callable[[Local], Sequence[Part]] = lambda _: (),
    ) -> None:
        self._sphere, self._how, self._parts = sphere, how, parts
        self.ended = ""

    def points(self, x_P: Tensor) -> Iterator[Point]:
        """The branch through the stationary point near x, point by point.

        Raises:
            NonFiniteError: The landscape is not finite somewhere.
        """
        sphere, how = self._sphere, self._how
        y_P = sphere.offset(x_P)
        r = float(y_P @ y_P)
        found = sphere.corrected(x_P, r, most=2 * _MOST)
        if found is None:
            self.ended = "lost"
            return
        here = self._here(found[0], "start", None)
        yield here.point
        first = here.point.l2
        ahead = math.copysign(1.0, (how.to - first) * here.point.slope)
        step, before, doubts = ahead * self._bound(here) / 10, None, 0
        while not self.ended:
            moved = self._stepped(here, before, step)
            events = self._events(here, moved[0], doubts < _DOUBTS) if moved else None
            if moved and events is None and doubts < _DOUBTS:
                step, doubts = _SHRINKAGE * (moved[0].point.r - here.point.r), doubts + 1
                continue
            if moved is None or events is None:
                self.ended = "budget" if sphere.products >= how.max_products else "lost"
                return
            (following, step), doubts, last = moved, 0, here
            for passed in (*events, following):
                if (passed.point.l2 - how.to) * (first - how.to) <= 0:
                    at = self._located("target", last, passed, lambda h: h.point.l2 - how.to)
                    self.ended = "target" if at else "lost"
                    if at:
                        yield at.point
                    return
                # Known before the point is given away: whoever keeps files writes it with that.
                if passed is not following and not how.beyond:
                    self.ended = passed.point.kind
                elif how.beyond and (passed.point.l2 - first) * (how.to - first) < 0:
                    self.ended = "back"
                yield replace(passed.point, products=sphere.products)
                if self.ended:
                    return
                last = passed
            before, here = here, following

    def _bound(self, here: _Here) -> float:
        """The longest step in r at a point."""
        slope = abs(here.point.slope)
        return min(_LARGEST * here.point.r, self._how.longest / slope if slope else math.inf)

    def _stepped(
        self, here: _Here, before: _Here | None, step: float
    ) -> tuple[_Here, float] | None:
        """The next point and the step to try after it; None where none is found."""
        for _ in range(_RETRIES):
            spent = self._sphere.products >= self._how.max_products
            if spent or abs(step) < _SHORTEST * here.point.r:
                return None
            step = math.copysign(min(abs(step), self._bound(here)), step)
            guess_P = here.point.x_P + step * here.velocity_P
            if before is not None:
                bent_P = here.velocity_P - before.velocity_P
                guess_P += (step**2 / (2 * (here.point.r - before.point.r))) * bent_P
            r = here.point.r + step
            found = self._tried(guess_P, r)
            if found is not None:
                place, work = found
                guess_P = self._sphere.on(guess_P, r)
                strayed = float((place.x_P - guess_P).norm())
                travelled = float((place.x_P - here.point.x_P).norm())
                if strayed <= _STRAY * travelled:
                    there = self._here(place, "step", here)
                    mean_P = (here.velocity_P + there.velocity_P) / 2
                    missed_P = there.point.x_P - here.point.x_P - step * mean_P
                    if float(missed_P.norm()) <= _BENT * travelled:
                        factor = _GROWTH if work <= _EASY else _SHRINKAGE if work > _HARD else 1.0
                        return there, step * factor
            step *= _SHRINKAGE
        return None

    def _tried(self, x_P: Tensor, r: float) -> tuple[Place, int] | None:
        """The corrector where it may fail: a landscape not finite there is a step too long."""
        try:
            return self._sphere.corrected(x_P, r, most=_MOST)
        except NonFiniteError:
            return None

    def _here(self, place: Place, kind: Kind, near: _Here | None) -> _Here:
        """A corrected place with its tangent and its lowest eigenvalues."""
        sphere = self._sphere
        velocity_P, slope = sphere.tangent(place)
        # Next to a fold the branch runs along its soft mode, so the tangent is rich in it.
        known = [velocity_P, *(near.symmetric.vectors_JP[:1] if near else ())]
        symmetric = self._lowest(place.local, place, known, sphere.landscape.dim)
        parts: list[tuple[Part, Lowest]] = []
        for i, part in enumerate(self._parts(place.local)):
            known = list(near.parts[i].vectors_JP[:1]) if near else []
            parts.append((part, self._lowest(part.matvec, place, known, part.dim)))
        broken = sum(
            part.copies(vector_J)
            for part, found in parts
            for value, vector_J in zip(found.values_J, found.vectors_JP, strict=True)
            if value < 0
        )
        per = sphere.shift_per_strength
        penalty = place.shift / 2 * place.r
        found = [symmetric, *(found for _, found in parts)]
        point = Point(
            kind=kind,
            l2=place.shift / per,
            x_P=place.x_P,
            r=place.r,
            loss=place.local.loss,
            objective=place.local.loss + penalty,
            gradient_norm=place.residual,
            slope=slope / per,
            lowest=float(symmetric.values_J[0]),
            breaking=min((float(low.values_J[0]) for _, low in parts), default=None),
            negative=symmetric.negative + broken,
            residual=max(float(low.residuals_J.max()) for low in found),
            products=sphere.products,
        )
        return _Here(point, velocity_P, symmetric, [low for _, low in parts])

    def _lowest(self, matvec: MatVec, place: Place, near: Sequence[Tensor], dim: int) -> Lowest:
        """The lowest eigenvalues of a part of H_eff."""
        sphere = self._sphere
        like_P = place.x_P[:0].to(sphere.products_in)
        counted = sphere.counted(matvec)
        if dim <= _SMALL:
            return every(counted, dim=dim, shift=place.shift, like=like_P)
        return lowest(
            counted, near, dim=dim, shift=place.shift, atol=self._how.atol,
            max_products=sphere.max_products, dtype=like_P.dtype, device=like_P.device,
            generator=sphere.generator,
        )  # fmt: skip

    def _events(self, a: _Here, b: _Here, doubted: bool) -> list[_Here] | None:
        """What happened between two points, in the order of its happening.

        None where there is a leap or, if that is `doubted`, more than one of a kind.
        """
        found: list[_Here | None] = []
        folded = a.point.slope * b.point.slope < 0
        if folded:
            found.append(self._located("fold", a, b, lambda h: h.point.slope))
        kept = [here.symmetric.negative for here in (a, b)]
        turned = abs(kept[1] - kept[0])
        # A fold turns one direction; where it seems to turn none, something else turned it back.
        if doubted and (turned > 1 or (folded and turned != 1)):
            return None
        if turned > folded:
            at = min(kept)
            found.append(self._located("crossing", a, b, lambda h: _value(h.symmetric, at)))
        for i, (before, after) in enumerate(zip(a.parts, b.parts, strict=True)):
            parted = abs(before.negative - after.negative)
            if doubted and parted > 1:
                return None
            if parted:
                at = min(before.negative, after.negative)
                found.append(self._located("breaking", a, b, partial(_parting, i, at)))
        told = [event for event in found if event is not None]
        if len(told) < len(found):
            return None
        return sorted(told, key=lambda event: abs(event.point.r - a.point.r))

    def _located(
        self, kind: Kind, a: _Here, b: _Here, quantity: Callable[[_Here], float]
    ) -> _Here | None:
        """The point between two at which a quantity is zero; None where it leaps over zero."""
        at_a, at_b = quantity(a), quantity(b)
        scale = min(abs(at_a), abs(at_b))
        strength = max(abs(a.point.l2), abs(b.point.l2))
        best, value = (a, at_a) if abs(at_a) < abs(at_b) else (b, at_b)
        # λ is no better known than the gradient that it follows from.
        known = max(_DIGITS * strength, self._sphere.tolerance)
        close, kept = (self._sphere.tolerance if kind == "target" else _NARROW * scale), 0
        for _ in range(_TRIALS):
            if at_a * at_b >= 0:
                break
            r = (at_b * a.point.r - at_a * b.point.r) / (at_b - at_a)
            found = self._tried(_between(a, b, r), r)
            if found is None:
                return None
            here = self._here(found[0], kind, a)
            value, moved = quantity(here), abs(here.point.l2 - best.point.l2)
            best = here
            if moved <= known and abs(value) <= close:
                break
            # An end that is kept twice running counts for half (the Illinois rule).
            if value * at_b > 0:
                b, at_b = here, value
                at_a *= 0.5 if kept == -1 else 1.0
                kept = -1
            else:
                a, at_a = here, value
                at_b *= 0.5 if kept == 1 else 1.0
                kept = 1
        # Below the residuals of eigenvalues, a value that does not fall says nothing.
        if abs(value) > max(_LEAP * scale, self._how.atol):
            return None
        point = replace(best.point, kind=kind, products=self._sphere.products)
        return replace(best, point=point)


def _between(a: _Here, b: _Here, r: float) -> Tensor:
    """Hermite's cubic through two points and their tangents."""
    width = b.point.r - a.point.r
    t = (r - a.point.r) / width
    return (
        (1 + 2 * t) * (1 - t) ** 2 * a.point.x_P
        + t * (1 - t) ** 2 * width * a.velocity_P
        + t**2 * (3 - 2 * t) * b.point.x_P
        - t**2 * (1 - t) * width * b.velocity_P
    )


def _value(found: Lowest, index: int) -> float:
    """An eigenvalue by its place; the last known where there are fewer."""
    return float(found.values_J[min(index, len(found.values_J) - 1)])


def _parting(part: int, index: int, here: _Here) -> float:
    """An eigenvalue of a part."""
    return _value(here.parts[part], index)
