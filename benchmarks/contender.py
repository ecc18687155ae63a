"""What a contender is: the same few pieces of work, each behind a function.

Every contender gets the same network, the same images in memory and the same accuracy to
reach, and returns what it found; whether that is right is judged elsewhere, by one judge for
all (`verify`). `by_eigsh` is the solver of those contenders that bring a product but no solver
of their own: SciPy's ARPACK with the arguments of the published recipe, from one start vector
for all, so that the number of products does not depend on who computes them.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.workload import Problem

MatVec = Callable[[Tensor], Tensor]
"""`v_P -> (Hv)_P`, on the problem's device."""


class MissingError(Exception):
    """A piece of work cannot be done here, and why: its row is left out."""


class StoppedError(Exception):
    """Raised inside a peer's own loop when its time is over."""


@dataclass(frozen=True)
class Pairs:
    """What a contender claims to have found.

    Attributes:
        values_K: Its eigenvalues.
        vectors_KP: Its eigenvectors as rows, on the problem's device.
        products: Hessian products it spent.
        stopped: Whether the time bound ended it before it was done.
    """

    values_K: NDArray[np.float64]
    vectors_KP: Tensor
    products: int
    stopped: bool = False


@dataclass(frozen=True)
class Contender:
    """A way of doing the work.

    Attributes:
        name: In the results file and for `--contenders`.
        title: In the tables.
        operator: Sets up for a problem and returns its product.
        leading: `(problem, k, rtol)`: the leading eigenpairs, everything included.
        epoch: One epoch of training at batch 64 as seconds of its parts, `steps` and `epoch`
            (the steps and an evaluation of both sets); None for those that do not train.
        gauss_newton: Like `operator`, for the Gauss-Newton matrix; None for those without it.
        package: What must be importable for it to run.
        note: What a reader must know of how it ran.
        tune: Finds its best setting for a problem, outside all timings.
    """

    name: str
    title: str
    operator: Callable[[Problem], MatVec]
    leading: Callable[[Problem, int, float], Pairs] | None
    epoch: Callable[[Problem], Mapping[str, float]] | None = None
    gauss_newton: Callable[[Problem], MatVec] | None = None
    package: str | None = None
    note: Callable[[Problem], str] = lambda _: ""
    tune: Callable[[Problem], None] = lambda _: None

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None or find_spec(self.package) is not None:
            return None
        return f"{self.title}: the package '{self.package}' is not installed"


def by_eigsh(operator: Callable[[Problem], MatVec]) -> Callable[[Problem, int, float], Pairs]:
    """Leading pairs from a product, by `eigsh(k, which="LM", tol=rtol)`."""

    def leading(problem: Problem, k: int, rtol: float) -> Pairs:
        from scipy.sparse.linalg import LinearOperator, eigsh

        product, spent = operator(problem), 0

        def matvec(v_P: NDArray[np.float32]) -> NDArray[np.float32]:
            nonlocal spent
            spent += 1
            v = torch.as_tensor(v_P.reshape(-1).copy(), device=problem.device)
            return product(v).cpu().numpy()

        dim = problem.mlp.dim
        start_P = np.random.default_rng(0).standard_normal(dim).astype(np.float32)
        matrix = LinearOperator((dim, dim), matvec=matvec, dtype=np.float32)
        values_K, vectors_PK = eigsh(matrix, k=k, which="LM", tol=rtol, v0=start_P)
        vectors_KP = torch.from_numpy(np.ascontiguousarray(vectors_PK.T)).to(problem.device)
        return Pairs(values_K.astype(np.float64), vectors_KP, spent)

    return leading
