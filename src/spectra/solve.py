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

from spectra import artifacts, provenance, runtime
from spectra.artifacts import Record, Store
from spectra.curvature.certificate import Certificate, certificate
from spectra.curvature.claim import Claim
from spectra.curvature.equal_units import quotient
from spectra.curvature.examination import Subset, examine
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.noise import SUSPICIOUS, noise_floor
from spectra.curvature.operator import AutodiffHessian, Hessian
from spectra.curvature.recomputation import Recomputed, other_way, recomputed
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
        ParameterError: `spectrum.k` does not fit the network, or `spectrum.rtol` is below the
            round-off of the product.
    """
    check_pairs(bench, network)
    wanted = bench.params.spectrum
    with runtime.threads(1) if bench.alone else nullcontext():
        product = hessian(bench, network, theta_P)
        if wanted.rtol < SUSPICIOUS[bench.machine.dtype]:
            check_tolerance(bench, network, theta_P, product)
        return spectrum(
            product,
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


def check_tolerance(bench: Workbench, network: Mlp, theta_P: Tensor, product: Hessian) -> None:
    """Refuse a tolerance below what the product's round-off, measured, lets residuals reach.

    Raises:
        ParameterError: `spectrum.rtol` is below it.
    """
    rtol = bench.params.spectrum.rtol
    floor = noise_floor(
        product, partial(_again, bench, network, theta_P, lambda: None),
        dim=network.dim, dtype=theta_P.dtype, device=theta_P.device,
        generator=bench.generator(0, "certificate", 0.0),
    )  # fmt: skip
    if rtol < floor:
        single = bench.machine.dtype == torch.float32
        raise ParameterError(
            f"spectrum.rtol: {rtol:g} is below {floor:.1e}, the round-off of the products measured "
            f"at these weights; use spectrum.rtol={2 * floor:.1g} or more"
            + (", or runtime.dtype=float64" if single else "")
        )


def certify(
    bench: Workbench,
    network: Mlp,
    theta_P: Tensor,
    claim: Claim,
    *,
    penalty: L2Penalty,
    generator: torch.Generator,
    on_product: Callable[[int], None] = lambda _: None,
    subset: Subset | None = None,
) -> Certificate:
    """Check what is said of a point over the full training set, and say what follows.

    Args:
        bench: Data and parameters: product, precision, threads, tolerance, `certificate`.
        network: The network.
        theta_P: Its parameters.
        claim: What was found at them, in this process or in files.
        penalty: The L2 term of the objective.
        generator: Gives random signs and directions, see `Workbench.generator`.
        on_product: Told the running number of products, and again while the data go through in
            float64.
        subset: Pairs recomputed one by one, in place of `certificate.pairs`.

    Raises:
        NonFiniteError: A product is NaN or infinite at these weights.
    """
    wanted, asked = bench.params.certificate, bench.params.spectrum
    if subset is None:
        subset = 2 if wanted.pairs is None else wanted.pairs
    spent = 0
    with runtime.threads(1) if bench.alone else nullcontext():
        product = hessian(bench, network, theta_P)

        def counted(v_P: Tensor) -> Tensor:
            nonlocal spent
            spent += 1
            on_product(spent)
            return product(v_P)

        found = examine(
            claim, theta_P, solved=counted,
            reference=partial(_again, bench, network, theta_P, lambda: on_product(spent)),
            rtol=asked.rtol, subset=subset, products=wanted.probe, generator=generator,
        )  # fmt: skip
        return certificate(
            claim, found, theta_P, penalty=penalty, rtol=asked.rtol, stationary=wanted.stationary,
            environment={
                **provenance.environment(
                    device=bench.machine.device.type, dtype=bench.params.runtime.dtype,
                    threads=bench.params.runtime.threads,
                ),
                "data": bench.data_digest,
                "network": list(network.widths),
                "activation": network.activation,
                "product": asked.product,
                "solver": asked.solver,
                "recomputed_with": "autodiff" if asked.product == "fused" else "fused",
                "recomputed_in": "float64",
            },
        )  # fmt: skip


def _again(
    bench: Workbench,
    network: Mlp,
    theta_P: Tensor,
    on_chunk: Callable[[], None],
    v_BP: Tensor,
) -> Recomputed:
    """Loss, gradient and products in float64, by the way that spectra are not solved with."""
    data = bench.train_set
    return recomputed(
        other_way(network, theta_P, bench.params.spectrum.product), data.inputs_ND,
        data.labels_N, v_BP, threads=bench.params.runtime.threads, on_chunk=on_chunk,
    )  # fmt: skip


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
    found = analyse(
        bench, bench.network, trained.theta_P, penalty=penalty,
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
        vouched = certify(
            bench, bench.network, trained.theta_P, Claim.of(found, trained.theta_P),
            penalty=penalty, generator=bench.generator(task.replicate, "certificate", task.l2),
            on_product=lambda number: on_product(found.pairs.products + number),
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
        "lambda_max": float(pairs.values_K.max()),
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
