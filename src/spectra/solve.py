"""One strength from start to files: the task that a sweep is made of.

Plain functions from parameters and weights to files and a small record; where and in what order
they run is not their business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra import artifacts, runtime
from spectra.artifacts import Record, Store
from spectra.curvature.equal_units import quotient
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.operator import AutodiffHessian, Hessian
from spectra.curvature.spectrum import Merged, Spectrum, merged, spectrum
from spectra.errors import DivergedError, NotConvergedError, ParameterError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum
from spectra.plan import Task
from spectra.train import Epoch, Trained, train_stack
from spectra.workbench import Workbench

AUTODIFF_CHUNK = 4000
"""Examples differentiated together: large enough for the matrix products to run at full speed,
small enough that their activations stay near the cache (measured best of 1,000 to 60,000)."""


def optimise(
    bench: Workbench,
    starts: Sequence[tuple[int, float, Tensor]],
    *,
    on_epoch: Callable[[int, Epoch], None],
) -> list[Trained | DivergedError]:
    """Train networks of the parameters together.

    Args:
        bench: Data and parameters.
        starts: Replicate, strength and starting weights θ_P of each.
        on_epoch: Told of every epoch, with the place of its network in `starts`.

    Returns:
        The weights of each, or why it has none.
    """
    return train_stack(
        bench.network,
        torch.stack([start_P for _, _, start_P in starts]),
        data=bench.train_set,
        test=bench.test_set,
        penalties=[bench.penalty(l2) for _, l2, _ in starts],
        how=bench.optimisation,
        generators=[bench.generator(i, "batches", l2) for i, l2, _ in starts],
        on_epoch=on_epoch,
    )


def check_pairs(bench: Workbench, network: Mlp) -> None:
    """Refuse a number of pairs that a network does not have.

    Raises:
        ParameterError: `spectrum.k` is not below the number of parameters.
    """
    k = bench.params.spectrum.k
    if k >= network.dim:
        raise ParameterError(
            f"spectrum.k: must be below the number of parameters, {network.dim}, got {k}"
        )


def hessian(bench: Workbench, network: Mlp, theta_P: Tensor) -> Hessian:
    """The Hessian of the mean cross-entropy over the training set, by the product asked for."""
    data = bench.train_set
    if bench.params.spectrum.product == "fused":
        return _fused(bench, network, theta_P)
    return AutodiffHessian(
        lambda theta, x, y: cross_entropy_sum(network.logits(theta, x), y),
        theta_P,
        zip(data.inputs_ND.split(AUTODIFF_CHUNK), data.labels_N.split(AUTODIFF_CHUNK), strict=True),
    )


def analyse(
    bench: Workbench,
    network: Mlp,
    theta_P: Tensor,
    *,
    penalty: L2Penalty,
    generator: torch.Generator,
    on_product: Callable[[int], None],
) -> Spectrum:
    """The spectrum of a network over the full training set.

    Raises:
        ParameterError: `spectrum.k` does not fit the network.
    """
    check_pairs(bench, network)
    wanted = bench.params.spectrum
    with runtime.threads(1) if bench.alone else nullcontext():
        return spectrum(
            hessian(bench, network, theta_P),
            theta_P,
            penalty=penalty,
            k=wanted.k,
            rtol=wanted.rtol,
            max_products=wanted.max_products,
            solver=wanted.solver,
            generator=generator,
            merged=_merged(bench, network, theta_P),
            on_product=on_product,
        )


def _merged(bench: Workbench, network: Mlp, theta_P: Tensor) -> Merged:
    """The network's equal units, and the network with them merged if that is wanted and pays.

    Units count as equal within a hundredth of the tolerance of the eigenpairs.
    """
    wanted = bench.params.spectrum
    within = wanted.rtol / 100
    if not (wanted.merge_units and bench.alone):
        return Merged(quotient(network, theta_P, within), None)
    return merged(network, theta_P, partial(_fused, bench), within=within)


def _fused(bench: Workbench, network: Mlp, theta_P: Tensor) -> MlpHessian:
    data = bench.train_set
    return MlpHessian(
        network, theta_P, data.inputs_ND, data.labels_N,
        threads=bench.params.runtime.threads, inputs=data.inputs,
    )  # fmt: skip


def finish(
    bench: Workbench,
    store: Store,
    task: Task,
    trained: Trained,
    *,
    parameters: dict[str, Any],
    on_product: Callable[[int], None],
) -> Record:
    """Analyse and write a trained strength; the record is on the disk when this returns.

    Args:
        bench: Data and parameters.
        store: Where the files go.
        task: The strength and replicate.
        trained: Its network.
        parameters: Those that decide the numbers, for the record.
        on_product: Told the running number of Hessian products.

    Raises:
        NotConvergedError: Pairs are missing within the budget; those found are written.
        StorageError: The files cannot be written.
    """
    found = analyse(
        bench,
        bench.network,
        trained.theta_P,
        penalty=bench.penalty(task.l2),
        generator=bench.generator(task.replicate, "lanczos", task.l2),
        on_product=on_product,
    )
    form = bench.params.artifacts.eigenvectors
    files = write_spectrum(store, task.key, bench.network, found, form)
    weights = bench.network.state_dict(trained.theta_P)
    history = [asdict(epoch) for epoch in trained.history]
    for name, chunks in (
        (artifacts.weights_name(task.key), [artifacts.state_dict_bytes(weights)]),
        (artifacts.history_name(task.key), artifacts.table_lines(history, list(history[0]))),
    ):
        files[name] = store.write(name, chunks)
    complain_if_unconverged(bench, found, task.key, store)
    record = Record(
        digest=task.digest,
        replicate=task.replicate,
        l2=task.l2,
        label=task.label,
        row=row(task.l2, trained, found),
        eigenvalues=tuple(found.pairs.values_K.tolist()),
        residuals=tuple(found.pairs.residuals_K.tolist()),
        parameters=parameters,
        files=files,
    )
    store.commit(record)
    return record


def write_spectrum(
    store: Store, key: str, network: Mlp, found: Spectrum, form: str
) -> dict[str, dict[str, str | int]]:
    """Write eigenvalues, eigenvectors ("csv", "npy" or "none") and ∇L_CE; returns their facts."""
    chunks = {
        artifacts.eigenvalues_name(key): artifacts.lines_of_numbers(found.pairs.values_K[:, None]),
        artifacts.gradients_name(key): artifacts.gradient_lines(
            {n: t.cpu().numpy() for n, t in network.split(found.gradient_ce_P).items()}
        ),
    }
    if form == "csv":
        chunks[artifacts.eigenvectors_name(key, form)] = artifacts.lines_of_numbers(
            found.pairs.vectors_KP
        )
    elif form == "npy":
        chunks[artifacts.eigenvectors_name(key, form)] = iter(
            [artifacts.array_bytes(found.pairs.vectors_KP)]
        )
    return {name: store.write(name, content) for name, content in chunks.items()}


def row(l2: float, trained: Trained, found: Spectrum) -> dict[str, float | int]:
    """The line of Model-{ID}.csv."""
    pairs = found.pairs
    return {
        "L2_strength": l2,
        "Train_Loss": found.loss,
        "Train_Reg_Loss": found.objective,
        "Test_Loss": trained.best.test_cross_entropy,
        "Test_Accuracy": trained.best.test_accuracy,
        "Train_Accuracy": trained.best.accuracy,
        "theta_norm": trained.best.theta_norm,
        "gradient_norm": float(found.gradient_P.double().norm()),
        "gradient_norm_ce": float(found.gradient_ce_P.double().norm()),
        "lambda_max": float(pairs.values_K.max()),
        "lambda_min": found.pairs.smallest.value,
        "worst_residual": worst_residual(found),
        "converged": int(pairs.converged_K.sum()),
        "products": found.pairs.products,
        "epochs": len(trained.history),
        "best_epoch": trained.best.epoch,
        "distinct_units": sum(found.units),
    }


def worst_residual(found: Spectrum) -> float:
    """The largest |Hv − λv| / |λ| of the leading pairs."""
    values = np.abs(found.pairs.values_K)
    return float((found.pairs.residuals_K / np.maximum(values, np.finfo(float).tiny)).max())


def complain_if_unconverged(bench: Workbench, found: Spectrum, key: str, store: Store) -> None:
    """Turn slow convergence, a value until here, into an error.

    Raises:
        NotConvergedError: Fewer than `spectrum.k` pairs met `spectrum.rtol`.
    """
    wanted, pairs = bench.params.spectrum, found.pairs
    missing = wanted.k - int(pairs.converged_K.sum())
    if missing > 0 or not pairs.smallest.converged:
        what = f"{missing} of {wanted.k} eigenpairs" if missing else "the smallest eigenvalue"
        raise NotConvergedError(
            f"{what} of {key} missed rtol={wanted.rtol:g} after {pairs.products} products; "
            f"raise spectrum.max_products (now {wanted.max_products}) or spectrum.rtol; the pairs "
            f"found so far are in {store.root}"
        )
