"""Descent to a stationary point of L_eff, until rounding is all that is left of its gradient.

Newton's method in a trust region. At every point the quadratic model is built once, products with
the Hessian being what costs; every radius is then tried for the price of an evaluation, so the
length of a step is searched and not guessed. Where the landscape bends within its reach, the same
model guides quasi-Newton steps along the valley, see `valley`. Steps are judged by the objective in
float64, and by the gradient where the fall to be expected drowns in the objective's rounding.

A point at which the gradient vanishes need not be a minimum. The lowest curvature is therefore
looked for there, by Lanczos from a random start, and a negative one followed out of the saddle.

How it ends is a verdict and not an exception: `converged` (the tolerance is met), `floor` (a full
Newton step no longer lowers the gradient: it is rounding), `budget` (of products) or `stuck` (no
step of any length descends, above the floor). What is known after a step, `State`, is all that a
later call needs to go on to the same bytes.

Letters: P coordinates.

Source: A. R. Conn, N. I. M. Gould, Ph. L. Toint, Trust-Region Methods (SIAM, 2000), ch. 6 and 7;
R. S. Dembo, S. C. Eisenstat, T. Steihaug, Inexact Newton methods, SIAM J. Numer. Anal. 19 (1982)
400-408, on how well to solve for a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spectra.errors import NonFiniteError
from spectra.objective import L2Penalty
from spectra.polish.landscape import Landscape, Penalised
from spectra.polish.lowest import Lowest, lowest_curvature
from spectra.polish.model import QuadraticModel, Step
from spectra.polish.valley import follow

Verdict = Literal["converged", "floor", "budget", "stuck"]

_LOOSEST, _TIGHTEST = 0.1, 1e-4
"""Relative residuals of a step's linear system, far from and close to the solution. Products in
float32 leave 1e-6; a step is corrected by the next one."""
_DROWNED = 64.0
"""Multiples of float64's eps · |L_eff| below which a fall of the objective says nothing."""
_FALLS = 1e-4
"""Share of the fall expected that makes a step acceptable."""
_GOOD = 0.5
"""Share of the fall expected below which the landscape bends within the reach of a step."""
_SHORTEST = 1e-12
"""Step relative to ‖x‖ below which no shorter one is tried."""
_HALVED = 0.5
"""Share of the gradient that a full Newton step leaves at most, above the floor."""
_SUMS = 32.0
"""Multiples of float64's eps · |∇L_CE| that summing over the data leaves of a gradient."""
_ROUNDINGS = 1.5
"""Multiples of the gradient of a random rounding of x that count as rounding."""
_FLAT = 1e-3
"""Share of 2c below which a negative curvature is not told from zero."""


@dataclass(frozen=True)
class State:
    """What is known after a step; a later call goes on from it to the same bytes.

    Attributes:
        x_P: The point.
        radius: Of the next step.
        products: Spent so far, evaluations at their price.
        steps: Accepted so far.
        escapes: How many of them left a saddle.
    """

    x_P: Tensor
    radius: float
    products: float = 0.0
    steps: int = 0
    escapes: int = 0


@dataclass(frozen=True)
class Polished:
    """Where a polishing ended, and how.

    Attributes:
        x_P: The point, in the dtype of the start.
        loss: L_CE(x), nats.
        objective: L_eff(x).
        gradient_norm: ‖∇L_eff(x)‖.
        gradient_ce_P: ∇L_CE(x).
        products: Spent in all, evaluations at their price.
        steps: Accepted.
        escapes: How many of them left a saddle.
        verdict: `converged`, `floor`, `budget` or `stuck`.
        lowest: The lowest curvature of H_eff found; None where it was not looked for.
        radius: Of the next step, had there been one.
    """

    x_P: Tensor
    loss: float
    objective: float
    gradient_norm: float
    gradient_ce_P: Tensor
    products: float
    steps: int
    escapes: int
    verdict: Verdict
    lowest: Lowest | None
    radius: float

    @property
    def stationary(self) -> bool:
        """Whether the gradient is what was asked for, or rounding."""
        return self.verdict in ("converged", "floor")

    @property
    def minimum(self) -> bool:
        """Whether it is stationary, and no negative curvature was found."""
        return self.stationary and self.lowest is not None and self.lowest.value > 0


def polish(
    landscape: Landscape,
    x_P: Tensor,
    penalty: L2Penalty,
    *,
    max_products: float,
    generator: torch.Generator,
    tolerance: float | None = None,
    products_in: torch.dtype = torch.float32,
    radius: float | None = None,
    state: State | None = None,
    leave_saddles: bool = True,
    on_product: Callable[[float], None] = lambda _: None,
    on_step: Callable[[State], None] = lambda _: None,
) -> Polished:
    """Descend from x to a stationary point of L_eff.

    Args:
        landscape: The cross-entropy; evaluated in the dtype that it chooses, float64 at best.
        x_P: Where to start. Its dtype is that of every point visited: from float32, the end is
            the best point that float32 holds.
        penalty: The L2 term; c > 0 makes stationary points isolated.
        max_products: Budget; see `Landscape` for the price of an evaluation.
        generator: On the CPU; only its initial seed is used, so that its state is not part of a
            result.
        tolerance: ‖∇L_eff‖ to be reached; None for the floor.
        products_in: The dtype in which vectors are multiplied and Krylov bases kept.
        radius: Of the first step; a tenth of ‖x‖, at least 0.1, unless given.
        state: What an earlier call has told `on_step`; takes the place of `x_P` and `radius`.
        leave_saddles: Look for negative curvature where the gradient vanishes, and follow it.
        on_product: Told the running number of products.
        on_step: Told of every step accepted.

    Raises:
        ValueError: A bound is not positive.
        NonFiniteError: The landscape is not finite at the start, or a product is not.
    """
    if max_products <= 0 or (tolerance is not None and not tolerance > 0):
        raise ValueError(
            f"max_products={max_products} and tolerance={tolerance} must be above zero"
        )
    if state is None:
        first = max(0.1, float(x_P.double().norm()) / 10) if radius is None else radius
        state = State(x_P.detach().clone(), first)
    descent = _Descent(
        landscape, penalty, max_products, generator.initial_seed(), products_in, state, on_product
    )
    descent.start()
    while True:
        verdict = descent.over(tolerance) or descent.step()
        lowest = None
        if verdict in ("converged", "floor") and leave_saddles:
            lowest = descent.lowest()
            if lowest is not None and lowest.value < -_FLAT * penalty.shift:
                verdict = descent.escape(lowest)
            elif lowest is None:
                verdict = "budget"
        if verdict is not None:
            return descent.ended(verdict, lowest)
        on_step(descent.state())


class _Descent:
    """A descent under way: the point, the radius and what has been spent."""

    def __init__(
        self,
        landscape: Landscape,
        penalty: L2Penalty,
        max_products: float,
        seed: int,
        products_in: torch.dtype,
        state: State,
        on_product: Callable[[float], None],
    ) -> None:
        self._landscape, self._penalty = landscape, penalty
        self._max_products, self._seed = max_products, seed
        self._products_in, self._on_product = products_in, on_product
        self._state = state
        self._x_P, self._radius = state.x_P, state.radius
        self._spent, self._steps, self._escapes = state.products, state.steps, state.escapes
        self._here: Penalised

    def start(self) -> None:
        """Evaluate the start; after a step that has been paid for."""
        resumed = self._steps > 0
        self._here = self._at(self._x_P, free=resumed)

    def state(self) -> State:
        return State(self._x_P, self._radius, self._spent, self._steps, self._escapes)

    def ended(self, verdict: Verdict, lowest: Lowest | None) -> Polished:
        here = self._here
        return Polished(
            x_P=here.x_P, loss=here.local.loss, objective=here.objective,
            gradient_norm=here.gradient_norm, gradient_ce_P=here.local.gradient_P,
            products=self._spent, steps=self._steps, escapes=self._escapes,
            verdict=verdict, lowest=lowest, radius=self._radius,
        )  # fmt: skip

    def over(self, tolerance: float | None) -> Verdict | None:
        """Whether the tolerance is met, or the budget spent."""
        norm = self._here.gradient_norm
        if norm == 0.0 or (tolerance is not None and norm <= tolerance):
            return "converged"
        return "budget" if self._spent >= self._max_products else None

    def step(self) -> Verdict | None:
        """Take a step; a verdict where none can be taken."""
        here = self._here
        self._spent += self._landscape.preparation
        if here.gradient_norm <= self._rounding():
            return "floor"
        model = QuadraticModel(
            here, here.gradient_P, dtype=self._products_in, generator=self._generator(0)
        )
        scale = max(here.local.gradient_P.double().norm().item(), here.gradient_norm)
        rtol = min(_LOOSEST, max(_TIGHTEST, math.sqrt(here.gradient_norm / scale)))
        left = max(1, math.ceil(self._max_products - self._spent))
        step = model.grow(self._radius, rtol, left, self._count)
        drowned = step.decrease <= self._resolution()
        best = self._try(step)
        if best is not None and self._falls(best, step):
            good = drowned or here.objective - best.objective >= _GOOD * step.decrease
            good &= step.inside
            if not step.inside:
                best = self._longer(model, step, best)
        elif drowned and step.inside:
            return "floor" if step.residual <= _HALVED else "stuck"
        else:
            best, good = self._shorter(model, step), False
        if best is None:
            unseen = float(torch.finfo(self._x_P.dtype).eps) * float(here.x_P.double().norm())
            return "floor" if drowned or step.length <= 4 * unseen else "stuck"
        if not good:
            best = self._along(model, best)
        self._accept(best)
        return None

    def _along(self, model: QuadraticModel, start: Penalised) -> Penalised:
        """Follow the valley in which a Newton step has gone wrong or not far enough."""

        def move(point: Penalised, step_P: Tensor) -> Penalised | None:
            return None if self._spent >= self._max_products else self._moved(step_P, point)

        return follow(
            start, model.inverse(self._penalty.shift / 2), move,
            longest=max(self._radius, float(start.x_P.double().norm()) / 10),
            resolution=self._resolution(),
        )  # fmt: skip

    def lowest(self) -> Lowest | None:
        """The lowest curvature here; None where the budget does not reach."""

        def affordable() -> bool:
            if self._spent < self._max_products:
                self._count()
                return True
            return False

        return lowest_curvature(
            self._here, dim=self._x_P.numel(), scale=self._penalty.shift,
            flat=_FLAT * self._penalty.shift, dtype=self._products_in, device=self._x_P.device,
            generator=self._generator(1), affordable=affordable,
        )  # fmt: skip

    def escape(self, lowest: Lowest) -> Verdict | None:
        """Step out of a saddle along a negative direction, the better way of the two."""
        length = self._radius
        floor = _SHORTEST * max(1.0, float(self._x_P.double().norm()))
        while length > floor:
            both = [self._moved(sign * length * lowest.direction_P) for sign in (1.0, -1.0)]
            lower = [there for there in both if there is not None]
            if lower:
                best = min(lower, key=lambda there: there.objective)
                if self._here.objective - best.objective > self._resolution():
                    self._escapes += 1
                    self._radius = length
                    self._accept(best)
                    return None
            length /= 4
        return "stuck"

    def _longer(self, model: QuadraticModel, step: Step, best: Penalised) -> Penalised:
        """Double the radius in the same model as long as the objective falls further."""
        self._radius = max(self._radius, step.length)
        while not step.inside and self._spent < self._max_products:
            step = model.within(2 * self._radius)
            further = self._try(step)
            if further is None or further.objective >= best.objective:
                break
            best, self._radius = further, 2 * self._radius
        return best

    def _shorter(self, model: QuadraticModel, step: Step) -> Penalised | None:
        """Shorten the radius in the same model until the objective falls."""
        floor = _SHORTEST * max(1.0, float(self._x_P.double().norm()))
        length = step.length
        while length > floor:
            length /= 2
            step = model.within(length)
            there = self._try(step)
            if there is not None and self._falls(there, step):
                self._radius = length
                return there
            if step.decrease <= self._resolution():
                return None
        return None

    def _falls(self, there: Penalised, step: Step) -> bool:
        """Whether a step is a success: by the objective, or where that drowns by the gradient."""
        if step.decrease <= self._resolution():
            return there.gradient_norm <= _HALVED * self._here.gradient_norm
        return self._here.objective - there.objective >= _FALLS * step.decrease

    def _resolution(self) -> float:
        """What a difference of objectives must exceed to mean anything."""
        return _DROWNED * float(np.finfo(np.float64).eps) * abs(self._here.objective)

    def _rounding(self) -> float:
        """The gradient that rounding leaves: of its own sums, or of the coordinates where coarser.

        The latter is measured: what the Hessian makes of a random rounding of x.
        """
        here = self._here
        parts = float(here.local.gradient_P.double().norm())
        own = _SUMS * float(np.finfo(np.float64).eps) * max(parts, here.gradient_norm)
        if self._x_P.dtype == torch.float64:
            return own
        random_P = torch.rand(
            self._x_P.numel(), generator=self._generator(0), dtype=torch.float64
        ).to(self._x_P.device)
        rounding_P = self._x_P.double() * (random_P - 0.5) * torch.finfo(self._x_P.dtype).eps
        self._count()
        image_P = here(rounding_P.to(self._products_in))
        return max(own, _ROUNDINGS * float(image_P.double().norm()))

    def _try(self, step: Step) -> Penalised | None:
        return self._moved(step.step_P)

    def _moved(self, step_P: Tensor, point: Penalised | None = None) -> Penalised | None:
        """The landscape a step away from here or another point; None where it is not finite."""
        from_P = self._x_P if point is None else point.x_P
        x_P = (from_P.double() + step_P).to(from_P.dtype)
        try:
            return self._at(x_P)
        except NonFiniteError:
            return None

    def _at(self, x_P: Tensor, *, free: bool = False) -> Penalised:
        if not free:
            self._spent += self._landscape.evaluation
            self._on_product(self._spent)
        return Penalised.at(self._landscape, x_P, self._penalty)

    def _accept(self, there: Penalised) -> None:
        self._here, self._x_P = there, there.x_P
        self._steps += 1

    def _count(self) -> None:
        self._spent += 1
        self._on_product(self._spent)

    def _generator(self, purpose: int) -> torch.Generator:
        """A generator of this step's own."""
        return torch.Generator().manual_seed((self._seed + 2 * self._steps + purpose) % 2**63)
