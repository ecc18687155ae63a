"""Who takes part, in the order of the tables."""

from __future__ import annotations

from benchmarks import ours, peers, plain, recipe
from benchmarks.contender import Contender

CONTENDERS: tuple[Contender, ...] = (
    recipe.CONTENDER,
    plain.CONTENDER,
    peers.CURVLINOPS,
    peers.EIGENTHINGS,
    peers.PYHESSIAN,
    ours.CONTENDER,
)


def by_name(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)
