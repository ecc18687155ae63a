"""The round-off of a product, measured: the tolerance that it can bear.

A residual cannot be told from zero below what two ways of computing Hv differ by. That is largest
along the leading eigenvector, which a few steps of the power method come near enough, and is
measured there and at a random vector against float64 products of other code.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms (SIAM, 2002), ch. 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from spectra.curvature.eigen import ROUND_OFF
from spectra.curvature.operator import MatVec
from spectra.curvature.recomputation import Recomputed

SUSPICIOUS = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Relative tolerances below which the floor is measured before anything is solved."""
_STEPS = 8


def noise_floor(
    solved: MatVec,
    reference: Callable[[torch.Tensor], Recomputed],
    *,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> float:
    """The relative tolerance that products can bear: their noise over |λ_1|.

    Never below `ROUND_OFF` · eps, at which residuals count as converged whatever the tolerance.

    Args:
        solved: The product to be solved with.
        reference: Products of float64 vectors (B, P), computed otherwise.
        dim: P.
        dtype: Of the vectors that `solved` takes.
        device: Of both products.
        generator: Gives the vectors; on the CPU.
    """
    start_P = torch.randn(dim, generator=generator, dtype=dtype).to(device)
    start_P /= start_P.norm()
    vector_P, image_P = start_P, solved(start_P)
    pairs = [(vector_P, image_P)]
    for _ in range(_STEPS):
        norm = image_P.norm()
        if not float(norm) > 0:
            break
        vector_P = image_P / norm
        image_P = solved(vector_P)
    pairs.append((vector_P, image_P))
    exact_BP = reference(torch.stack([vector_P.double() for vector_P, _ in pairs])).images_BP
    least = ROUND_OFF * torch.finfo(dtype).eps
    scale = float(exact_BP.norm(dim=1).max())
    if scale == 0:
        return least
    off = max(
        float((image_P.double() - exact_P).norm())
        for (_, image_P), exact_P in zip(pairs, exact_BP, strict=True)
    )
    return max(least, off / scale)
