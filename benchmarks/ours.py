"""`spectra` itself, by its public entry points, each called in one place.

The steps of an epoch are not an entry point of their own: `train` evaluates both sets after
every epoch. An epoch is therefore what lies between two of its reports, and its steps are the
rest when an evaluation, timed beside it, is taken off. What `train` does before the first epoch
is left out here and counted in the whole strength.

A sweep divides the inputs once for all its networks; here every operator divides them anew, so
that the set-up and the pairs contain everything, as they do for the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contender import Contender, MatVec, MissingError, Pairs
from benchmarks.threads import StepThreads
from benchmarks.timing import now
from benchmarks.workload import BATCH, HIDDEN, LR, MEAN, STD, Problem
from spectra.curvature.eigen import leading_eigenpairs
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import AutodiffHessian
from spectra.curvature.spectrum import leading as leading_of
from spectra.curvature.spectrum import merged
from spectra.descent import Optimisation
from spectra.errors import DivergedError
from spectra.inputs import inputs_of
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum
from spectra.train import Examples, evaluate, train, train_stack

_MAX_PRODUCTS = 5000
_CHUNK = 4000
_RECIPE = Optimisation(lr=LR, batch_size=BATCH)


def operator(problem: Problem, *, gauss_newton: bool = False) -> MatVec:
    """The fused product."""
    return MlpHessian(
        problem.mlp,
        problem.theta_P,
        problem.train.inputs_ND,
        problem.train.labels_N,
        threads=problem.threads,
        gauss_newton=gauss_newton,
    )


def judge(problem: Problem, *, dtype: torch.dtype = torch.float32) -> MatVec:
    """The product that results are judged by: double automatic differentiation."""
    chunks: Iterable[tuple[Tensor, Tensor]] = (
        (x.to(dtype), y)
        for x, y in zip(
            problem.train.inputs_ND.split(_CHUNK),
            problem.train.labels_N.split(_CHUNK),
            strict=True,
        )
    )
    return AutodiffHessian(
        lambda theta, x, y: cross_entropy_sum(problem.mlp.logits(theta, x), y),
        problem.theta_P.to(dtype),
        chunks,
    )


def leading(problem: Problem, k: int, rtol: float) -> Pairs:
    """The leading eigenpairs alone, as the others give them, everything set up included."""
    data = problem.train
    inputs = inputs_of(data.inputs_ND, data.labels_N, threads=problem.threads)

    def fused(mlp: Mlp, theta_P: Tensor) -> MlpHessian:
        return MlpHessian(
            mlp, theta_P, data.inputs_ND, data.labels_N, threads=problem.threads, inputs=inputs,
        )  # fmt: skip

    found = leading_of(
        fused(problem.mlp, problem.theta_P),
        partial(leading_eigenpairs, ends=None),
        merged=merged(problem.mlp, problem.theta_P, fused, rtol=rtol),
        k=k,
        rtol=rtol,
        max_products=_MAX_PRODUCTS,
        generator=torch.Generator().manual_seed(0),
    )
    vectors_KP = torch.as_tensor(found.vectors_KP).to(problem.device)
    return Pairs(found.values_K.astype("float64"), vectors_KP, found.products)


def trained(problem: Problem) -> Tensor:
    """The weights after some epochs of training from the problem's."""
    epochs = problem.size.epochs
    return _train(problem, replace(_RECIPE, max_epochs=epochs, patience=epochs))


def led(problem: Problem, strengths: Sequence[float]) -> Tensor:
    """The weights at the last of some strengths, each trained from the one before to its stop."""
    for l2 in strengths:
        problem = replace(problem, l2=l2, theta_P=_train(problem, _RECIPE))
    return problem.theta_P


def _train(
    problem: Problem, how: Optimisation, on_epoch: Callable[[object], None] = lambda _: None
) -> Tensor:
    data, test = _examples(problem)
    return train(
        problem.mlp,
        problem.theta_P,
        data=data,
        test=test,
        penalty=L2Penalty(problem.l2),
        how=how,
        generator=torch.Generator().manual_seed(0),
        on_epoch=on_epoch,
    ).theta_P


def epoch(problem: Problem) -> dict[str, float]:
    """One epoch and, with an evaluation of both sets taken off, its steps."""
    return _timed_epoch(problem, _threads.of(problem))


def _timed_epoch(problem: Problem, threads_of_a_step: int) -> dict[str, float]:
    reports: list[float] = []
    how = replace(_RECIPE, max_epochs=2, patience=2, threads=threads_of_a_step)
    _train(problem, how, on_epoch=lambda _: reports.append(now(problem.device)))
    whole = reports[1] - reports[0]
    sets = _examples(problem)
    for examples in sets:  # the first call divides the inputs, which no epoch does
        evaluate(problem.mlp, problem.theta_P, examples)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_of_a_step)
    start = now(problem.device)
    for examples in sets:
        evaluate(problem.mlp, problem.theta_P, examples)
    evaluation = now(problem.device) - start
    torch.set_num_threads(threads)
    return {"steps": whole - evaluation, "epoch": whole}


_threads = StepThreads(lambda problem, threads: _timed_epoch(problem, threads)["steps"])


def stack_epoch(problem: Problem, models: int) -> float:
    """Seconds of one epoch, evaluation included, of a stack of networks trained together."""
    reports: list[float] = []
    data, test = _examples(problem)
    train_stack(
        problem.mlp,
        problem.theta_P.expand(models, -1),
        data=data,
        test=test,
        penalties=[L2Penalty(problem.l2)] * models,
        how=replace(_RECIPE, max_epochs=2, patience=2),
        generators=[torch.Generator().manual_seed(i) for i in range(models)],
        on_epoch=lambda _, __: reports.append(now(problem.device)),
    )
    return reports[-1] - reports[models - 1]  # each member reports, the last one last


def strength(problem: Problem, folder: Path, *, certified: bool) -> tuple[float, str]:
    """Seconds of one whole strength, as a sweep does it: training, spectrum, files.

    Args:
        problem: Its strength, device, threads and size.
        folder: The IDX files.
        certified: Whether the certificate, which nobody else has, is made too.

    Returns:
        The seconds and what they were spent on.

    Raises:
        MissingError: A package that a sweep needs is not installed.
    """
    try:
        from spectra.artifacts import Store
        from spectra.params import Params
        from spectra.plan import plan
        from spectra.solve import finish, optimise
        from spectra.workbench import open_bench
    except ModuleNotFoundError as error:
        raise MissingError(f"whole strength: '{error.name}' is not installed") from None
    size = problem.size
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        params = Params.model_validate(
            {
                "data": {
                    "name": "bench", "root": scratch, "source": "folder",
                    "folder": str(folder.resolve()), "mean": MEAN, "std": STD,
                },
                "model": {"hidden": HIDDEN},
                "train": {
                    "lr": LR, "batch_size": BATCH, "max_epochs": size.epochs,
                    "patience": size.epochs,
                },
                "sweep": {"strengths": [problem.l2]},
                "spectrum": {"k": size.k, "rtol": size.rtol},
                "certificate": {} if certified else {"pairs": None},
                "runtime": {"device": problem.device.type, "threads": problem.threads},
            }
        )  # fmt: skip
        bench = open_bench(params, say=lambda _: None)
        try:
            laid = plan(params, data_digest=bench.data_digest, reference_digest=None)
            start = now(problem.device)
            task = laid.tasks[0]
            (outcome,) = optimise(
                bench, [(task.replicate, task.l2, bench.initial(task.replicate))],
                on_epoch=lambda _, __: None,
            )  # fmt: skip
            if isinstance(outcome, DivergedError):
                raise outcome
            record = finish(
                bench, Store(Path(scratch) / "out"), task, outcome,
                parameters=dict(laid.parameters), on_product=lambda _: None,
            )  # fmt: skip
            seconds = now(problem.device) - start
        finally:
            torch.use_deterministic_algorithms(False)  # a sweep wants them, the others need not
            torch.set_num_threads(problem.threads)
    spent = f"{record.row['epochs']} epochs, {record.row['products']} products, files"
    return seconds, spent


def _examples(problem: Problem) -> tuple[Examples, Examples]:
    data = Examples(problem.train.inputs_ND, problem.train.labels_N)
    return data, Examples(problem.test.inputs_ND, problem.test.labels_N)


CONTENDER = Contender(
    name="ours",
    title="spectra",
    operator=operator,
    leading=leading,
    epoch=epoch,
    gauss_newton=partial(operator, gauss_newton=True),
    note=_threads.note,
    tune=_threads.tune,
)
