"""The libraries that compute Hessian spectra, each as its documentation says to use it.

- curvlinops has the product and leaves the solver to `eigsh`.
- hessian-eigenthings has Lanczos. Its defaults at k = 30 take 60 steps and, above 50 steps,
  switch reorthogonalisation off without a word; the pairs then repeat. The contender asks for
  four steps a pair and reorthogonalisation; `EIGENTHINGS_DEFAULTS` is what a user gets who does
  not. It averages batches without weights, so only batches of equal size are right.
- PyHessian has power iteration with deflation, a pair at a time. It has no bound on time, so it
  is stopped from inside its own loop, and the pairs it had finished are what counts. Its product,
  which keeps the graph of the full batch's gradient, is also given to `eigsh`: that is no use of
  it that it documents, but the fastest of the peers' products in a solver that ends.

curvlinops and hessian-eigenthings may take the data in batches of several sizes; which is
fastest is tried once, outside all timings.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contender import Contender, MatVec, Pairs, StoppedError, by_eigsh
from benchmarks.timing import now
from benchmarks.workload import Problem

_BATCHES = (512, 2048, 8192, 20_000)
_STEPS_A_PAIR = 4
_best_batch: dict[tuple[str, int, str], int] = {}


def _batches(problem: Problem, size: int) -> list[tuple[Tensor, Tensor]]:
    train = problem.train
    return list(zip(train.inputs_ND.split(size), train.labels_N.split(size), strict=True))


def _tuned(name: str, build: Callable[[Problem, int], MatVec], *, equal: bool) -> Any:  # noqa: ANN401
    """`tune`, `operator` and `note` of a product that takes its data in batches."""

    def tune(problem: Problem) -> None:
        key = _key(name, problem)
        if key in _best_batch:
            return
        examples = len(problem.train.labels_N)
        sizes = [b for b in _BATCHES if b < examples]
        if equal:
            sizes = [examples // parts for parts in (3, 8, 30) if examples % parts == 0]
        v_P = torch.ones_like(problem.theta_P)
        times = {}
        for size in [*sizes, examples]:
            product = build(problem, size)
            product(v_P)
            start = now(problem.device)
            product(v_P)
            times[size] = now(problem.device) - start
        _best_batch[key] = min(times, key=lambda size: times[size])

    def operator(problem: Problem) -> MatVec:
        tune(problem)
        return build(problem, _best_batch[_key(name, problem)])

    def note(problem: Problem) -> str:
        return f"batches of {_best_batch.get(_key(name, problem), 0):,}, its best"

    return tune, operator, note


def _key(name: str, problem: Problem) -> tuple[str, int, str]:
    return name, len(problem.train.labels_N), problem.device.type


def _curvlinops(problem: Problem, size: int, kind: str = "HessianLinearOperator") -> MatVec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports call what PyTorch has deprecated
        import curvlinops
    model = problem.module()
    # Its check of the data costs products and is not part of one.
    matrix = getattr(curvlinops, kind)(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        _batches(problem, size),
        check_deterministic=False,
        num_data=len(problem.train.labels_N),
    )
    return lambda v_P: matrix @ v_P


def _eigenthings_operator(problem: Problem, size: int) -> Any:  # noqa: ANN401
    from hessian_eigenthings import HessianOperator, supervised_loss

    loss = supervised_loss(nn.CrossEntropyLoss())
    return HessianOperator(problem.module(), _batches(problem, size), loss)


_curvlinops_tune, _curvlinops_operator, _curvlinops_note = _tuned(
    "curvlinops", _curvlinops, equal=False
)
_, _curvlinops_gn, _ = _tuned(
    "curvlinops, Gauss-Newton", partial(_curvlinops, kind="GGNLinearOperator"), equal=False
)
_eigenthings_tune, _, _eigenthings_note = _tuned(
    "eigenthings", lambda p, size: _eigenthings_operator(p, size).matvec, equal=True
)


def _eigenthings_at_best(problem: Problem) -> Any:  # noqa: ANN401
    _eigenthings_tune(problem)
    return _eigenthings_operator(problem, _best_batch[_key("eigenthings", problem)])


def _eigenthings_leading(problem: Problem, k: int, rtol: float) -> Pairs:
    steps = min(_STEPS_A_PAIR * k, problem.mlp.dim)
    return _lanczos(problem, k, tol=rtol, max_iter=steps, reorthogonalize=True)


def _eigenthings_defaults(problem: Problem, k: int, _: float) -> Pairs:
    return _lanczos(problem, k)


def _lanczos(problem: Problem, k: int, **settings: Any) -> Pairs:  # noqa: ANN401
    from hessian_eigenthings import lanczos

    found = lanczos(_eigenthings_at_best(problem), k=k, seed=0, **settings)
    values_K = found.eigenvalues.cpu().double().numpy()
    return Pairs(values_K, found.eigenvectors, found.iterations)


def _pyhessian(problem: Problem) -> Any:  # noqa: ANN401
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that create_graph=True makes a reference cycle
        return hessian(
            problem.module(),
            nn.CrossEntropyLoss(),
            data=(problem.train.inputs_ND, problem.train.labels_N),
            cuda=problem.device.type == "cuda",
        )


def _pyhessian_operator(problem: Problem) -> MatVec:
    from pyhessian import hessian_vector_product

    held = _pyhessian(problem)
    sizes = [p.numel() for p in held.params]

    def product(v_P: Tensor) -> Tensor:
        parts = zip(v_P.split(sizes), held.params, strict=True)
        images = hessian_vector_product(held.gradsH, held.params, [v.view_as(p) for v, p in parts])
        return torch.cat([image.reshape(-1) for image in images])

    return product


def _pyhessian_leading(problem: Problem, k: int, rtol: float) -> Pairs:
    held = _pyhessian(problem)
    module = sys.modules["pyhessian.hessian"]  # its package has a class of the same name
    until = time.perf_counter() + problem.size.stop_s
    finished: list[list[Tensor]] = []
    spent = 0
    orthonormalise, multiply = module.orthnormal, module.hessian_vector_product

    def watched(v: list[Tensor], vectors: list[list[Tensor]]) -> list[Tensor]:
        nonlocal finished
        finished = vectors
        if time.perf_counter() > until:
            raise StoppedError
        return orthonormalise(v, vectors)

    def counted(*arguments: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        nonlocal spent
        spent += 1
        return multiply(*arguments)

    stopped = False
    with (
        mock.patch.object(module, "orthnormal", watched),
        mock.patch.object(module, "hessian_vector_product", counted),
    ):
        try:
            values, finished = held.eigenvalues(maxIter=100, tol=rtol, top_n=k)
        except StoppedError:
            values, stopped = [], True
    if not finished:
        return Pairs(
            np.empty(0), torch.empty(0, problem.mlp.dim, device=problem.device), spent, stopped
        )
    vectors_KP = torch.stack([torch.cat([part.reshape(-1) for part in v]) for v in finished])
    if stopped:  # the values died with its loop, the vectors did not: take their quotients
        images = [multiply(held.gradsH, held.params, v) for v in finished]
        pairs = zip(finished, images, strict=True)
        values = [sum(float((a * b).sum()) for a, b in zip(*p, strict=True)) for p in pairs]
    return Pairs(np.array(values, dtype=np.float64), vectors_KP, spent, stopped)


CURVLINOPS = Contender(
    name="curvlinops",
    title="curvlinops",
    operator=_curvlinops_operator,
    leading=by_eigsh(_curvlinops_operator),
    gauss_newton=_curvlinops_gn,
    package="curvlinops",
    note=_curvlinops_note,
    tune=_curvlinops_tune,
)
EIGENTHINGS = Contender(
    name="eigenthings",
    title="hessian-eigenthings",
    operator=lambda problem: _eigenthings_at_best(problem).matvec,
    leading=_eigenthings_leading,
    package="hessian_eigenthings",
    note=_eigenthings_note,
    tune=_eigenthings_tune,
)
EIGENTHINGS_DEFAULTS = replace(
    EIGENTHINGS,
    name="eigenthings-defaults",
    title="hessian-eigenthings, its defaults",
    leading=_eigenthings_defaults,
)
PYHESSIAN = Contender(
    name="pyhessian",
    title="PyHessian",
    operator=_pyhessian_operator,
    leading=_pyhessian_leading,
    package="pyhessian",
    note=lambda _: "full batch, its gradient's graph kept",
)
PYHESSIAN_EIGSH = replace(
    PYHESSIAN,
    name="pyhessian-eigsh",
    title="PyHessian's product in eigsh",
    leading=by_eigsh(_pyhessian_operator),
)
