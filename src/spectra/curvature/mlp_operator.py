"""The exact Hessian of the mean cross-entropy of an MLP, with nothing computed twice.

Pearlmutter's R-operator, written out: with R{·} the derivative in direction v = (V_i, u_i),

    R a_i = (R h_{i−1}) W_iᵀ + h_{i−1} V_iᵀ + u_i,     R h_i = φ'(a_i) ∘ R a_i,   R h_0 = 0
    R δ_L = (diag p − p pᵀ) R a_L / N
    R e_i = (R δ_{i+1}) W_{i+1} + δ_{i+1} V_{i+1}
    R δ_i = φ'(a_i) ∘ R e_i + [φ''(a_i) ∘ e_i] ∘ R a_i
    (Hv)_{W_i} = (R δ_i)ᵀ h_{i−1} + δ_iᵀ R h_{i−1},    (Hv)_{b_i} = Σ_n R δ_i

Everything that does not depend on v (h, φ', φ''∘e, δ, p) is computed once per network; a
product costs two products with the data matrix and six with each hidden matrix, over chunks of
examples that stay in cache. Each thread takes its own share of the chunks from end to end and
the shares are added in their order: threads that met at the end of every small operation would
stand still whenever another program took one core for a moment.

Leaving out the terms with δ (the curvature of the network, not of the loss) gives the
Gauss-Newton matrix, which is positive semi-definite and here equal to the Fisher matrix.

Tests hold it against dense Hessians and against double automatic differentiation.

Letters: N examples, D inputs, P parameters, n examples of a chunk, B vectors of a block.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
(1994) 147-160; N. N. Schraudolph, Fast curvature matrix-vector products for second-order
gradient descent, Neural Computation 14 (2002) 1723-1738.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from spectra.activations import ACTIVATIONS
from spectra.curvature.inputs import Inputs, inputs_of
from spectra.curvature.operator import check_finite
from spectra.mlp import Mlp

CHUNK = 1500
"""Examples a chunk: some 0.8 MB for each 128-wide activation in float32."""


@dataclass(frozen=True)
class _Chunk:
    """What a product needs of a chunk and of the network, none of it depending on v.

    Lists are by layer: `hidden[i]` is h_{i+1}, `slopes[i]` φ'(a_{i+1}), `bends[i]` φ'' ∘ e, and
    `deltas[i]` δ_{i+1}, already divided by N.
    """

    inputs: Inputs
    hidden: Sequence[Tensor]
    slopes: Sequence[Tensor]
    bends: Sequence[Tensor]
    deltas: Sequence[Tensor]
    probabilities: Tensor


class MlpHessian:
    """The Hessian (or Gauss-Newton matrix) of the mean cross-entropy at θ_P, as products.

    Args:
        mlp: The network.
        theta_P: Its parameters.
        inputs_ND: All inputs.
        labels_N: All labels.
        chunk: Examples taken together; the last chunk may be smaller.
        gauss_newton: Leave out the curvature of the network itself.
        threads: Shares that the chunks are divided into, each computed by a thread of its own
            on a CPU; the division decides the order of summation.
        listed: The chunks of the inputs as `inputs_of(inputs_ND, chunk)` makes them, where the
            data have been listed before.

    Attributes:
        dim: P.
        examples: N.
        products: How many products have been computed.
        loss: The mean cross-entropy at θ.
        gradient_P: Its gradient.

    Raises:
        ValueError: There are no examples.
        NonFiniteError: The loss or its gradient is NaN or infinite at θ.
    """

    def __init__(
        self,
        mlp: Mlp,
        theta_P: Tensor,
        inputs_ND: Tensor,
        labels_N: Tensor,
        *,
        chunk: int = CHUNK,
        gauss_newton: bool = False,
        threads: int = 1,
        listed: Sequence[Inputs] | None = None,
    ) -> None:
        if not len(labels_N):
            raise ValueError("a Hessian of a mean loss needs at least one example, got none")
        self._mlp = mlp
        self._full = not gauss_newton
        tensors = list(mlp.split(theta_P.detach().clone()).values())
        self._weights, self._biases = tensors[0::2], tensors[1::2]
        self.dim, self.examples, self.products = mlp.dim, len(labels_N), 0
        self.loss = 0.0
        self.gradient_P = torch.zeros_like(theta_P)
        gradient = list(mlp.split(self.gradient_P).values())
        listed = inputs_of(inputs_ND, chunk) if listed is None else listed
        self._chunks = [
            self._prepare(inputs, x, y, gradient)
            for inputs, x, y in zip(
                listed, inputs_ND.split(chunk), labels_N.split(chunk), strict=True
            )
        ]
        size = -(-len(self._chunks) // threads)
        self._shares = [self._chunks[i : i + size] for i in range(0, len(self._chunks), size)]
        self._pool = _pool(len(self._shares)) if theta_P.device.type == "cpu" else None
        check_finite(self)

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv, of v's shape (P,)."""
        return self.block(v_P[None])[0]

    def block(self, v_BP: Tensor) -> Tensor:
        """The products of B vectors (B, P), chunk by chunk: what is cached is read once."""
        self.products += len(v_BP)
        share = partial(self._share, v_BP)
        parts = self._pool.map(share, self._shares) if self._pool else map(share, self._shares)
        first_BP, *others = parts
        for part_BP in others:
            first_BP += part_BP
        return first_BP

    @torch.no_grad()
    def _share(self, v_BP: Tensor, chunks: Sequence[_Chunk]) -> Tensor:
        """The part of B products that some chunks contribute."""
        result_BP = torch.zeros_like(v_BP)
        directions = [list(self._mlp.split(v_P).values()) for v_P in v_BP]
        results = [list(self._mlp.split(r_P).values()) for r_P in result_BP]
        for chunk in chunks:
            for direction, result in zip(directions, results, strict=True):
                self._add_product(chunk, direction, result)
        return result_BP

    @torch.no_grad()
    def _prepare(
        self, inputs: Inputs, x_nD: Tensor, labels_n: Tensor, gradient: Sequence[Tensor]
    ) -> _Chunk:
        """Run one chunk forward and backward, keep what products need, add its gradient."""
        act = ACTIVATIONS[self._mlp.activation]
        last = self._mlp.layers - 1
        hidden: list[Tensor] = []
        slopes: list[Tensor] = []
        curvatures: list[Tensor] = []
        a = inputs.times(self._weights[0]).add_(self._biases[0])
        for i in range(last):
            h = act.value(a)
            hidden.append(h)
            slopes.append(act.slope(a, h))
            curvatures.append(act.bend(a, h))
            a = torch.addmm(self._biases[i + 1], h, self._weights[i + 1].t())
        self.loss += float(functional.cross_entropy(a, labels_n, reduction="sum")) / self.examples
        p = torch.softmax(a, dim=1)
        delta = p - functional.one_hot(labels_n, p.shape[1])
        delta = delta.div_(self.examples)
        deltas: list[Tensor] = [delta] * (last + 1)
        bends: list[Tensor] = [delta] * last
        for i in range(last, -1, -1):
            deltas[i] = delta
            under = delta.t() @ hidden[i - 1] if i else inputs.under(delta)
            gradient[2 * i] += under
            gradient[2 * i + 1] += delta.sum(0)
            if i:
                e = delta @ self._weights[i]
                bends[i - 1] = curvatures[i - 1].mul_(e)
                delta = e.mul_(slopes[i - 1])
        return _Chunk(inputs, hidden, slopes, bends, deltas, p)

    def _add_product(
        self, chunk: _Chunk, direction: Sequence[Tensor], result: Sequence[Tensor]
    ) -> None:
        """Add one chunk's part of Hv, by the formulas at the top of this file."""
        last = self._mlp.layers - 1
        ra: list[Tensor] = [chunk.inputs.times(direction[0]).add_(direction[1])]
        rh: list[Tensor] = []
        for i in range(last):
            rh.append(chunk.slopes[i] * ra[i])
            moved = torch.addmm(direction[2 * i + 3], chunk.hidden[i], direction[2 * i + 2].t())
            ra.append(moved.addmm_(rh[i], self._weights[i + 1].t()))
        p = chunk.probabilities
        weighted = p * ra[last]
        rdelta = torch.addcmul(weighted, p, weighted.sum(1, keepdim=True), value=-1)
        rdelta.div_(self.examples)
        for i in range(last, -1, -1):
            result[2 * i + 1].add_(rdelta.sum(0))
            if not i:
                result[0].add_(chunk.inputs.under(rdelta))
                return
            result[2 * i].addmm_(rdelta.t(), chunk.hidden[i - 1])
            re = rdelta @ self._weights[i]
            if self._full:
                result[2 * i].addmm_(chunk.deltas[i].t(), rh[i - 1])
                re.addmm_(chunk.deltas[i], direction[2 * i])
            rdelta = re.mul_(chunk.slopes[i - 1])
            if self._full:
                rdelta.addcmul_(chunk.bends[i - 1], ra[i - 1])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads each of which does its linear algebra alone."""

    def alone() -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)

    return ThreadPoolExecutor(threads, thread_name_prefix="product", initializer=alone)
