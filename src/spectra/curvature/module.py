"""The Hessian and its leading eigenpairs for any `nn.Module`, loss and data.

    hessian = hessian_of(model, nn.CrossEntropyLoss(), (inputs, labels))
    pairs = eigenpairs_of(model, nn.CrossEntropyLoss(), loader, k=10)

Two operators stand behind it: the one that differentiates any network automatically, and the
fused one for fully connected networks under the cross-entropy, which is faster.

Letters: P parameters, K pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from spectra.curvature.batch_loss import BatchLoss, Loss, Reduction
from spectra.curvature.batches import Batches
from spectra.curvature.eigen import EigenPairs, check_count, leading_eigenpairs
from spectra.curvature.fully_connected import FullyConnected, fully_connected
from spectra.curvature.mlp_operator import MlpHessian
from spectra.curvature.module_operator import GRAPH_BYTES, ModuleHessian
from spectra.curvature.point import split, trainable
from spectra.curvature.spectrum import leading, merged
from spectra.errors import UsageError
from spectra.inputs import inputs_of
from spectra.mlp import Mlp

Product = Literal["auto", "autodiff", "fused"]


def hessian_of(
    model: nn.Module,
    loss: Loss,
    data: object,
    *,
    reduction: Reduction | None = None,
    gauss_newton: bool = False,
    product: Product = "auto",
    batch_size: int | None = None,
    graph_bytes: int = GRAPH_BYTES,
) -> ModuleHessian | MlpHessian:
    """The Hessian of the mean loss over all data at a network's present weights, as products.

    Args:
        model: Any network, which is left as it is. θ_P is its parameters with `requires_grad`,
            in the order of `named_parameters()`; see `named`.
        loss: `(output, targets) -> scalar`, a loss of PyTorch's or any function. Whatever the
            batches, the loss differentiated is that of all data as one batch (class weights and
            ignored labels included), or its sum divided by N where the loss sums.
        data: Tensors (inputs, targets); a list of such batches; a DataLoader or anything else
            that gives the same batches whenever it is iterated over, which is checked. Batches
            are moved to the network's device.
        reduction: What a function that says nothing itself returns: "mean" (the default) or
            "sum" over the examples of a batch.
        gauss_newton: The Gauss-Newton matrix Jᵀ (∇²_z L) J in place of the Hessian.
        product: "autodiff" for any network, "fused" for fully connected ones, "auto" for the
            fused one wherever it applies.
        batch_size: Examples taken together where the data are tensors.
        graph_bytes: Memory for what may be kept between products: the graphs of autodiff, or
            data that stream in where the fused product applies. 0 keeps neither: graphs are made
            anew, and of data that stream in one batch is held at a time.

    Returns:
        The operator; its type says which product was chosen.

    Raises:
        UsageError: Network, loss and data do not make a deterministic function of θ, or the
            fused product was asked for and does not apply.
        NonFiniteError: The loss or its gradient is NaN or infinite.
        ValueError: An argument is not one of those above.
    """
    return _curvature(
        model, loss, data, reduction=reduction, gauss_newton=gauss_newton, product=product,
        batch_size=batch_size, graph_bytes=graph_bytes,
    ).hessian  # fmt: skip


def eigenpairs_of(
    model: nn.Module,
    loss: Loss,
    data: object,
    *,
    k: int,
    rtol: float = 1e-3,
    max_products: int = 5000,
    generator: torch.Generator | None = None,
    reduction: Reduction | None = None,
    gauss_newton: bool = False,
    product: Product = "auto",
    batch_size: int | None = None,
    graph_bytes: int = GRAPH_BYTES,
    ends: bool = True,
    merge_units: bool = True,
    on_product: Callable[[int], None] = lambda _: None,
) -> EigenPairs:
    """The `k` eigenpairs of largest magnitude of `hessian_of(...)`, each with its residual.

    Args:
        model: See `hessian_of`, as for the arguments not named here.
        loss: See there.
        data: See there.
        k: Pairs wanted, `1 <= k < P`.
        rtol: A pair has converged when `|Hv − λv| <= rtol * |λ|`.
        max_products: Bound on the products of the search; reaching it is reported in
            `converged_K`, not raised.
        generator: Gives the start vector; on the CPU, and seeded with 0 unless given.
        reduction: See `hessian_of`.
        gauss_newton: See there.
        product: See there.
        batch_size: See there.
        graph_bytes: See there.
        ends: Whether the search goes on until the smallest and the largest algebraic eigenvalue
            have converged too. For a few pairs that can take most of the products; without,
            `smallest.converged` and `largest.converged` tell whether they have by chance.
        merge_units: Where the fused product applies and many hidden units are equal, solve the
            smaller network that remains, and put the result to the whole Hessian.
        on_product: Told the running number of products, of whatever size.

    Raises:
        UsageError: See `hessian_of`.
        NonFiniteError: The loss, its gradient or a product is NaN or infinite.
        ValueError: `k` is not in 1..P−1, or see `hessian_of`.
    """
    check_count(k, sum(p.numel() for p in trainable(model).values()))
    found = _curvature(
        model, loss, data, reduction=reduction, gauss_newton=gauss_newton, product=product,
        batch_size=batch_size, graph_bytes=graph_bytes,
    )  # fmt: skip
    network, smaller = found.network, None
    if network is not None and merge_units and not gauss_newton:
        smaller = merged(network.mlp, network.theta_P, found.fused, rtol=rtol)
    return leading(
        found.hessian,
        partial(leading_eigenpairs, ends=1.0 if ends else None),
        merged=smaller,
        on_product=on_product,
        k=k,
        rtol=rtol,
        max_products=max_products,
        generator=generator or torch.Generator().manual_seed(0),
    )


def named(model: nn.Module, v_P: Tensor) -> dict[str, Tensor]:
    """Views of a vector (P,), such as an eigenvector, as tensors named as the parameters."""
    return split(v_P, {name: p.shape for name, p in trainable(model).items()})


@dataclass(frozen=True)
class _Curvature:
    """An operator, and where it is the fused one the network and how to make others on the data."""

    hessian: ModuleHessian | MlpHessian
    network: FullyConnected | None = None
    fused: Callable[[Mlp, Tensor], MlpHessian] | None = None


def _curvature(
    model: nn.Module,
    loss: Loss,
    data: object,
    *,
    reduction: Reduction | None,
    gauss_newton: bool,
    product: Product,
    batch_size: int | None,
    graph_bytes: int,
) -> _Curvature:
    """See `hessian_of`."""
    if product not in ("auto", "autodiff", "fused"):
        raise ValueError(f"product must be 'auto', 'autodiff' or 'fused', got {product!r}")
    device = next(iter(trainable(model).values())).device
    batches = Batches(data, batch_size=batch_size, device=device)
    batch_loss = BatchLoss(loss, reduction)
    network = None
    if product != "autodiff":
        try:
            network = fully_connected(model, batch_loss, batches, memory=graph_bytes)
        except UsageError as error:
            if product == "fused":
                raise UsageError(
                    f"the fused product does not apply: {error}; use product='auto'"
                ) from error
    if network is None:
        return _Curvature(
            ModuleHessian(
                model, batch_loss, batches, gauss_newton=gauss_newton, graph_bytes=graph_bytes
            )
        )
    inputs_ND, labels_N, threads = network.inputs_ND, network.labels_N, torch.get_num_threads()
    fused = partial(
        MlpHessian, inputs_ND=inputs_ND, labels_N=labels_N, threads=threads,
        inputs=inputs_of(inputs_ND, labels_N, chunk=batch_size, threads=threads),
    )  # fmt: skip
    hessian = fused(network.mlp, network.theta_P, gauss_newton=gauss_newton)
    return _Curvature(hessian, network, fused)
