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
the shares are added in their order. On a GPU all chunks are captured as one graph where that holds
nobody up: the host takes longer to launch the operations of a product one by one than the GPU to do
them.

Leaving out the terms with δ (the curvature of the network, not of the loss) gives the
Gauss-Newton matrix, which is positive semi-definite and here equal to the Fisher matrix.

Tests hold it against dense Hessians and against double automatic differentiation.

Letters: N examples, D inputs, P parameters, n examples of a chunk, B vectors of a block.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
(1994) 147-160; N. N. Schraudolph, Fast curvature matrix-vector products for second-order
gradient descent, Neural Computation 14 (2002) 1723-1738.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from spectra import narrow, runtime
from spectra.backprop import Layers
from spectra.chunks import Rows, Table
from spectra.curvature.operator import check_finite
from spectra.inputs import Inputs, inputs_of
from spectra.mlp import Mlp
from spectra.objective import cross_entropy_sum
from spectra.streams import Graph, may_capture

_TOGETHER = 8
"""Vectors of a block at most whose first layers are taken together, so that memory is bounded."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class CachedChunk:
    """What a product needs of a chunk and of the network, none of it depending on v.

    Lists are by hidden layer: `hidden[i]` is h_{i+1}, `slopes[i]` φ'(a_{i+1}), `bends[i]` φ'' ∘ e,
    and `deltas[i]` the δ_{i+2} above it, already divided by N. Scores and their signals lie
    transposed, (C, n): with a few classes, that is the fast way round for matrix products.
    """

    inputs: Rows
    hidden: Sequence[Tensor]
    slopes: Sequence[Tensor]
    bends: Sequence[Tensor]
    deltas: Sequence[Tensor]
    probabilities_Cn: Tensor


class MlpHessian:
    """The Hessian (or Gauss-Newton matrix) of the mean cross-entropy at θ_P, as products.

    Args:
        mlp: The network.
        theta_P: Its parameters.
        inputs_ND: All inputs.
        labels_N: All labels.
        chunk: Examples taken together, the last chunk may be smaller; see `inputs_of`.
        gauss_newton: Leave out the curvature of the network itself.
        threads: Shares that the chunks are divided into, each computed by a thread of its own
            on a CPU; the division decides the order of summation.
        inputs: The inputs as `inputs_of` divides them, where that has been done before.
        here: Compute in the calling thread, which is one of several already.

    Attributes:
        dim: P.
        examples: N.
        products: How many products have been computed.
        loss: The mean cross-entropy at θ.
        gradient_P: Its gradient.
        columns: How the columns of the inputs are taken.
        shares: What is cached of each chunk, by the threads that take them.

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
        chunk: int | None = None,
        gauss_newton: bool = False,
        threads: int = 1,
        inputs: Inputs | None = None,
        here: bool = False,
    ) -> None:
        if not len(labels_N):
            raise ValueError("a Hessian of a mean loss needs at least one example, got none")
        self._mlp = mlp
        self._full = not gauss_newton
        self._layers = Layers(mlp, theta_P.detach().clone())
        self.dim, self.examples, self.products = mlp.dim, len(labels_N), 0
        if inputs is None:
            inputs = inputs_of(inputs_ND, labels_N, chunk=chunk, threads=1 if here else threads)
        self.columns = inputs.columns
        parts = inputs.together(max(mlp.widths[1:]), threads)
        labels = torch.cat(inputs.split(labels_N)).split([part.count for part in parts])
        labelled = list(zip(parts, labels, strict=True))
        self._graph: Graph[Tensor] | None = None
        self._alone = theta_P.device.type == "cpu" and not here
        prepared = self.of_each(
            partial(self._prepared, theta_P.detach()), runtime.shares(labelled, threads)
        )
        self.shares = [share.chunks for share in prepared]
        self.loss = sum(share.loss for share in prepared)
        self.gradient_P = summed([share.gradient_P for share in prepared])
        check_finite(self)

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv, of v's shape (P,); or those of a block of vectors (B, P)."""
        if v_P.ndim == 2:
            return self.block(v_P)
        if not (v_P.is_cuda and may_capture()):
            return self.block(v_P[None])[0]
        self.products += 1
        if self._graph is None:
            every = [chunk for chunks in self.shares for chunk in chunks]
            self._graph = Graph(partial(self._share, chunks=every), v_P[None])
        return self._graph.replay(v_P[None])[0].clone()

    def block(self, v_BP: Tensor) -> Tensor:
        """The products of B vectors (B, P), chunk by chunk: what is cached is read once."""
        self.products += len(v_BP)
        parts = v_BP.split(_TOGETHER)
        return torch.cat([self._products(part_BP) for part_BP in parts])

    def _products(self, v_BP: Tensor) -> Tensor:
        return summed(self.of_each(partial(self._share, v_BP), self.shares))

    def of_each(self, work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
        """Some work on every share, each in a thread of its own where products are."""
        return runtime.of_each(work, shares, alone=self._alone)

    @torch.no_grad()
    def _share(self, v_BP: Tensor, chunks: Sequence[CachedChunk]) -> Tensor:
        """The part of B products that some chunks contribute; of their first layers as one."""
        result_BP = torch.zeros_like(v_BP)
        directions = [list(self._mlp.split(v_P).values()) for v_P in v_BP]
        results = [list(self._mlp.split(result_P).values()) for result_P in result_BP]
        table = self._laid_out(directions)
        sums = self.columns.empty(table.bias)
        for chunk in chunks:
            ra = chunk.inputs.times(table).chunk(len(v_BP), dim=1)
            rdelta = [
                self._add_product(chunk, ra_nH, direction, result)
                for ra_nH, direction, result in zip(ra, directions, results, strict=True)
            ]
            chunk.inputs.add_under(torch.cat(rdelta, dim=1) if rdelta[1:] else rdelta[0], sums)
        firsts = sums.rows_EH.chunk(len(v_BP), dim=1)
        for first_EH, result in zip(firsts, results, strict=True):
            self.columns.add_to(Table(first_EH), result[0], result[1])
        return result_BP

    def _laid_out(self, directions: Sequence[Sequence[Tensor]]) -> Table:
        """The first layers of some directions, side by side."""
        weights, biases = zip(*((tensors[0], tensors[1]) for tensors in directions), strict=True)
        return self.columns.table(torch.cat(weights), torch.cat(biases))

    @torch.no_grad()
    def _prepared(self, theta_P: Tensor, labelled: Sequence[tuple[Rows, Tensor]]) -> _Prepared:
        """Run chunks forward and backward, keep what products need, add up the gradient."""
        layers, act = self._layers, self._layers.activation
        loss, gradient_P = 0.0, torch.zeros_like(theta_P)
        gradient = list(self._mlp.split(gradient_P).values())
        first = self._laid_out([list(self._mlp.split(theta_P).values())])
        sums = self.columns.empty(gradient[1])
        chunks: list[CachedChunk] = []
        for part, labels_n in labelled:
            forward = layers.forward(part.times(first))
            scores_Cn = forward.scores_CN
            loss += float(cross_entropy_sum(scores_Cn.t(), labels_n)) / self.examples
            delta = layers.loss_signal(scores_Cn, layers.onehot(labels_n), self.examples)
            hidden = forward.hidden
            slopes: list[Tensor] = []
            bends: list[Tensor] = []
            deltas: list[Tensor] = []
            for signal in layers.signals(forward, delta):
                i, delta_nH = signal.layer, signal.delta_NH
                if i:
                    deltas.insert(0, delta_nH)
                    narrow.add_outer(gradient[2 * i], delta_nH, hidden[i - 1])
                    gradient[2 * i + 1].add_(delta_nH.sum(0))
                else:
                    part.add_under(delta_nH, sums)
                if signal.error_NH is not None:
                    bend = act.bend(forward.pre[i], hidden[i])
                    bends.insert(0, bend.mul_(signal.error_NH))
                    slopes.insert(0, act.slope(forward.pre[i], hidden[i]))
            p_Cn = torch.softmax(scores_Cn, dim=0)
            chunks.append(CachedChunk(part, hidden, slopes, bends, deltas, p_Cn))
        self.columns.add_to(sums, gradient[0], gradient[1])
        return _Prepared(chunks, loss, gradient_P)

    def _add_product(
        self, chunk: CachedChunk, ra_nH: Tensor, v: Sequence[Tensor], result: Sequence[Tensor]
    ) -> Tensor:
        """Add one chunk's part of Hv above the first layer, by the formulas at the top.

        Args:
            chunk: The chunk.
            ra_nH: R a_1.
            v: The direction's weights and biases by turns.
            result: Those of the product, which what is above the first layer is added to.

        Returns:
            R δ_1.
        """
        weights = self._layers.weights
        last = len(weights) - 1
        ra: list[Tensor] = [ra_nH]
        rh: list[Tensor] = []
        moved = ra_nH.t()
        for i in range(last):
            above, bias = v[2 * i + 2 : 2 * i + 4]
            rh.append(chunk.slopes[i] * ra[i])
            if i + 1 < last:
                ra.append(narrow.product(chunk.hidden[i], above.t(), bias))
                ra[i + 1].addmm_(rh[i], weights[i + 1].t())
            else:
                moved = torch.addmm(bias[:, None], above, chunk.hidden[i].t())
                moved.addmm_(weights[last], rh[i].t())
        p_Cn = chunk.probabilities_Cn
        weighted_Cn = p_Cn * moved
        rdelta = torch.addcmul(weighted_Cn, p_Cn, weighted_Cn.sum(0), value=-1)
        rdelta = rdelta.div_(self.examples).t()
        for i in range(last, 0, -1):
            result[2 * i + 1].add_(rdelta.sum(0))
            narrow.add_outer(result[2 * i], rdelta, chunk.hidden[i - 1])
            re = narrow.product(rdelta, weights[i])
            if self._full:
                narrow.add_outer(result[2 * i], chunk.deltas[i - 1], rh[i - 1])
                re.addmm_(chunk.deltas[i - 1], v[2 * i])
            rdelta = re.mul_(chunk.slopes[i - 1])
            if self._full:
                rdelta.addcmul_(chunk.bends[i - 1], ra[i - 1])
        return rdelta


@dataclass(frozen=True)
class _Prepared:
    """Some chunks, and their parts of the mean loss and of its gradient."""

    chunks: Sequence[CachedChunk]
    loss: float
    gradient_P: Tensor


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the shares' parts, in their order and in the first of them."""
    first, *others = parts
    for part in others:
        first += part
    return first
