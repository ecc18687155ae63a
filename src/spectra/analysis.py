"""The Hessian of a network over the training set as the parameters want it, and what it yields.

Solvers and certificates know functions and tensors; here they are given the product, the precision,
the threads and the tolerances that the parameters name. A certificate is taken by the product
that the spectrum was not solved with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from spectra import provenance, runtime
from spectra.curvature.certificate import Certificate, certificate
from spectra.curvature.claim import Claim
from spectra.curvature.examination import Subset, examine
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.noise import SUSPICIOUS, noise_floor
from spectra.curvature.operator import AutodiffHessian, Hessian
from spectra.curvature.recomputation import Recomputed, other_way, recomputed
from spectra.curvature.spectrum import Merged, Spectrum, merged, spectrum
from spectra.errors import ParameterError
from spectra.mlp import Mlp
from spectra.objective import L2Penalty, cross_entropy_sum
from spectra.workbench import Workbench

AUTODIFF_CHUNK = 4000
"""Examples differentiated together: large enough for the matrix products to run at full speed,
small enough that their activations stay near the cache (measured best of 1,000 to 60,000)."""


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
    inputs_ND, labels_N = bench.train_set.inputs_ND, bench.train_set.labels_N
    with _lone_threads(bench):
        if bench.params.spectrum.product == "fused":
            return _fused(bench, network, theta_P)
        return AutodiffHessian(
            lambda theta, x, y: cross_entropy_sum(network.logits(theta, x), y),
            theta_P,
            zip(inputs_ND.split(AUTODIFF_CHUNK), labels_N.split(AUTODIFF_CHUNK), strict=True),
        )


def analyse(
    bench: Workbench,
    network: Mlp,
    theta_P: Tensor,
    *,
    penalty: L2Penalty,
    product: Hessian,
    generator: torch.Generator,
    on_product: Callable[[int], None],
) -> Spectrum:
    """The spectrum of a network over the full training set, by its `hessian`.

    Raises:
        ParameterError: `spectrum.k` does not fit the network, or `spectrum.rtol` is below the
            round-off of the product.
    """
    check_pairs(bench, network)
    wanted = bench.params.spectrum
    with _lone_threads(bench):
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
    product: Hessian,
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
        product: The `hessian` that is solved with.
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

    def counted(v_P: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        on_product(spent)
        return product(v_P)

    with _lone_threads(bench):
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
    """The network's equal units, and the network with them merged if that is wanted and pays."""
    wanted = bench.params.spectrum
    fused = partial(_fused, bench) if wanted.merge_units and bench.alone else None
    return merged(network, theta_P, fused, rtol=wanted.rtol)


def _fused(bench: Workbench, network: Mlp, theta_P: Tensor) -> MlpHessian:
    data = bench.train_set
    return MlpHessian(
        network, theta_P, data.inputs_ND, data.labels_N,
        threads=bench.params.runtime.threads, inputs=data.inputs,
    )  # fmt: skip


def _lone_threads(bench: Workbench) -> AbstractContextManager[None]:
    """One thread an operation, where products share the cores out themselves."""
    return runtime.threads(1) if bench.alone else nullcontext()
