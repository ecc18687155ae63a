"""One strength from start to files: the task that a sweep is made of.

Plain functions from parameters and weights to files and a small record; where and in what order
they run is not their business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectra import analysis, artifacts
from spectra.artifacts import Record, Store
from spectra.curvature.certificate import Certificate
from spectra.curvature.claim import Claim
from spectra.curvature.spectrum import Spectrum
from spectra.errors import DivergedError, NotConvergedError
from spectra.mlp import Mlp
from spectra.plan import Task
from spectra.train import Epoch, Trained, train_stack
from spectra.workbench import Workbench


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


def finish(
    bench: Workbench,
    store: Store,
    task: Task,
    trained: Trained,
    *,
    parameters: dict[str, Any],
    on_product: Callable[[int], None],
    say: Callable[[str], None] = lambda _: None,
    besides: Callable[[Spectrum], dict[str, bytes]] = lambda _: {},
) -> Record:
    """Analyse and write a trained strength; the record is on the disk when this returns.

    Args:
        bench: Data and parameters.
        store: Where the files go.
        task: The strength and replicate.
        trained: Its network.
        parameters: Those that decide the numbers, for the record.
        on_product: Told the running number of Hessian products.
        say: Told what the certificate complains of.
        besides: Makes further files from the spectrum, or others in place of those written here.

    Raises:
        NotConvergedError: Pairs are missing within the budget; those found are written.
        StorageError: The files cannot be written.
    """
    penalty = bench.penalty(task.l2)
    product = analysis.hessian(bench, bench.network, trained.theta_P)
    found = analysis.analyse(
        bench, bench.network, trained.theta_P, penalty=penalty, product=product,
        generator=bench.generator(task.replicate, "lanczos", task.l2), on_product=on_product,
    )  # fmt: skip
    form = bench.params.artifacts.eigenvectors
    files = write_spectrum(store, task.key, bench.network, found, form)
    files |= write_weights(bench, store, task, trained)
    history = [asdict(epoch) for epoch in trained.history]
    name = artifacts.history_name(task.key)
    files[name] = store.write(name, artifacts.table_lines(history, list(history[0])))
    for name, content in besides(found).items():
        files[name] = store.write(name, [content])
    complain_if_unconverged(bench, found, task.key, store)
    vouched = None
    if bench.params.certificate.pairs is not None:
        vouched = analysis.certify(
            bench, bench.network, trained.theta_P, Claim.of(found, trained.theta_P),
            penalty=penalty, generator=bench.generator(task.replicate, "certificate", task.l2),
            on_product=lambda number: on_product(found.pairs.products + number), product=product,
        )  # fmt: skip
        name = artifacts.certificate_name(task.key)
        files[name] = store.write(name, [artifacts.json_bytes(vouched.content)])
        for complaint in vouched.complaints:
            say(f"{task.key}: {complaint}")
    record = Record(
        digest=task.digest,
        replicate=task.replicate,
        l2=task.l2,
        label=task.label,
        row=row(task.l2, trained, found, vouched),
        eigenvalues=tuple(found.pairs.values_K.tolist()),
        residuals=tuple(found.pairs.residuals_K.tolist()),
        parameters=parameters,
        files=files,
    )
    store.commit(record)
    return record


def write_weights(
    bench: Workbench, store: Store, task: Task, trained: Trained
) -> dict[str, dict[str, str | int]]:
    """Write the weights of a strength, which a chain goes on from; returns their facts."""
    name = artifacts.weights_name(task.key)
    state = bench.network.state_dict(trained.theta_P)
    return {name: store.write(name, [artifacts.state_dict_bytes(state)])}


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


def row(
    l2: float, trained: Trained, found: Spectrum, vouched: Certificate | None = None
) -> dict[str, float | int]:
    """The line of Model-{ID}.csv."""
    pairs = found.pairs
    negative = int((pairs.values_K + pairs.residuals_K + found.shift < 0).sum())
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
        "lambda_max": pairs.lambda_max,
        "lambda_min": found.pairs.smallest.value,
        "worst_residual": worst_residual(found),
        "converged": int(pairs.converged_K.sum()),
        "products": found.pairs.products,
        "epochs": len(trained.history),
        "best_epoch": trained.best.epoch,
        "distinct_units": sum(found.units),
        "certified": int(vouched is not None and vouched.sound),
        "negative_directions": negative if vouched is None else vouched.negative_directions,
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
