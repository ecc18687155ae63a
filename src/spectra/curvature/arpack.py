"""Leading eigenpairs by ARPACK's implicitly restarted Lanczos, through `scipy`'s `eigsh`.

The field's usual solver, kept as the independent one that `eigen.leading_eigenpairs` is tested
against. An end of the spectrum that is not among the pairs found takes a second search, on their
complement, which lies in [−|λ_K|, |λ_K|]: moved down by |λ_K|, its smallest eigenvalue is the
largest in magnitude, and moved up its largest.

Where the Krylov space is exhausted, ARPACK goes on from random vectors. Newer SciPy takes those
from a generator of the caller's; before 1.17 they are the next ones of a state that lasts as long
as the process, so a search gives the same bytes in a new process only.

Source: R. B. Lehoucq, D. C. Sorensen, C. Yang, ARPACK Users' Guide (SIAM, 1998).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

from spectra.curvature.eigen import EigenPairs, Floats, certified, check_count
from spectra.curvature.operator import MatVec
from spectra.errors import NonFiniteError

_TAKES_RNG = "rng" in inspect.signature(eigsh).parameters


def leading_eigenpairs_arpack(
    matvec: MatVec,
    *,
    dim: int,
    k: int,
    rtol: float,
    max_products: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> EigenPairs:
    """The `k` eigenpairs of largest magnitude by `eigsh`; see `eigen.leading_eigenpairs`.

    Where the budget ends the search there are only the pairs that had converged.

    Raises:
        ValueError: `k` is not in 1..dim−1.
        NonFiniteError: The operator returned NaN or infinity.
    """
    check_count(k, dim)
    spent = 0

    def product(v_P: Floats) -> Floats:
        nonlocal spent
        spent += 1
        v = torch.tensor(v_P.reshape(-1), dtype=dtype, device=device)
        image_P = matvec(v).cpu().numpy()
        if not np.isfinite(image_P).all():
            raise NonFiniteError(
                f"product {spent} of the operator is NaN or infinite; check the weights' scale "
                "or use runtime.dtype: float64"
            )
        return image_P

    start_P = torch.randn(dim, generator=generator, dtype=dtype).numpy()
    # A wide basis needs no restart for a few outliers over a bulk; ARPACK tests convergence
    # only when the basis is full.
    values, vectors_KP = _search(
        product, start_P, k=k, basis=min(dim, 2 * k + 20), tol=rtol, budget=max_products
    )
    order = np.argsort(-np.abs(values), kind="stable")
    values, vectors_KP = values[order], vectors_KP[order]
    found = len(values)

    def outside(sign: float) -> Floats:
        """The vector of the smallest (1) or largest (−1) eigenvalue off the pairs found."""
        ceiling = sign * float(np.abs(values).min())

        def off(v_P: Floats) -> Floats:
            inside_P: Floats = vectors_KP.T @ (vectors_KP @ v_P)
            return v_P - inside_P

        def shifted(v_P: Floats) -> Floats:
            v_P = off(v_P.reshape(-1))
            return off(product(v_P)) - ceiling * v_P

        start_P = off(torch.randn(dim, generator=generator, dtype=dtype).numpy())
        return _search(
            shifted, start_P, k=1, basis=min(dim, 20), tol=rtol / 2, budget=max_products
        )[1]

    parts, unsure = [vectors_KP], []
    for end, sign in (("smallest", 1.0), ("largest", -1.0)):
        beyond = found > 0 and (sign * values).min() >= 0
        if beyond:
            parts.append(outside(sign))
        if found < k or (beyond and not len(parts[-1])):  # what is missing may lie further out
            unsure.append(end)
    rows = torch.from_numpy(np.concatenate(parts)).to(device or "cpu")
    images_KP = torch.stack([matvec(row_P) for row_P in rows]) if len(rows) else rows
    pairs = certified(rows, images_KP, k=found, rtol=rtol, products=spent + len(rows))
    doubts = {end: replace(getattr(pairs, end), converged=False) for end in unsure}
    return replace(pairs, **doubts)


def _search(
    product: Callable[[Floats], Floats],
    start_P: Floats,
    *,
    k: int,
    basis: int,
    tol: float,
    budget: int,
) -> tuple[Floats, Floats]:
    """`eigsh` within a budget of products: the pairs that converged, vectors as rows."""
    operator = LinearOperator((len(start_P), len(start_P)), matvec=product, dtype=start_P.dtype)
    restarts = max(1, (budget - basis) // max(1, basis - k) + 1)
    seeded = {"rng": np.random.default_rng(0)} if _TAKES_RNG else {}
    try:
        values, vectors = eigsh(
            operator, k=k, which="LM", v0=start_P, ncv=basis, tol=tol, maxiter=restarts, **seeded
        )
    except ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
    except ArpackError as refused:
        if "error -9" not in str(refused):
            raise
        # The operator maps the random start to zero, so it is zero where it is searched.
        block = np.random.default_rng(0).standard_normal((len(start_P), k)).astype(start_P.dtype)
        block[:, 0] = start_P
        values, vectors = np.zeros(k), np.linalg.qr(block)[0]
    return np.asarray(values), np.ascontiguousarray(np.asarray(vectors).T)
