"""The Hessian or Gauss-Newton matrix of any network and loss, as products, by autodiff.

With S_b the sum of the losses of batch b, n_b what they are averaged over and n = Σ_b n_b,

    H v = (1/n) Σ_b ∇_θ ⟨∇_θ S_b(θ), v⟩,
    G v = (1/n) Σ_b Jᵀ (∇²_z S_b) J v,

with z the output of the network and J its Jacobian. What does not depend on v is one graph a
batch, see `batch_graph`. It is kept where the data are in memory, for as many batches as
`graph_bytes` allow, and made anew for every product otherwise: then one batch is held at a
time. B products at once go through a graph together.

Before the first product the first batch is gone through once more, to refuse what would give a
spectrum without a meaning: chance in the network, weights that the loss reads by itself, and
operations whose second derivative PyTorch leaves out without a word.

Letters: P parameters, B vectors of a block.

Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
(1994) 147-160; N. N. Schraudolph, Fast curvature matrix-vector products for second-order
gradient descent, Neural Computation 14 (2002) 1723-1738.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from spectra.curvature.batch_graph import GaussNewtonGraph, Graph, HessianGraph
from spectra.curvature.batch_loss import BatchLoss
from spectra.curvature.batches import Batch, Batches, examples_of, leaves
from spectra.curvature.point import Point
from spectra.errors import NonFiniteError, UsageError

GRAPH_BYTES = 2 << 30
"""Memory for the graphs kept between products; a number, not what is free: it must not vary."""


class ModuleHessian:
    """The Hessian (or Gauss-Newton matrix) of a mean loss at a network's weights, as products.

    Args:
        model: The network, which is left as it is; see `Point` for what makes θ.
        loss: What it is averaged over decides the mean, see `BatchLoss`.
        batches: The data.
        gauss_newton: Leave out the curvature of the network itself.
        graph_bytes: Memory for graphs that are kept; 0 makes each anew for every product.

    Attributes:
        dim: P.
        examples: N.
        products: How many products have been computed.
        kept: Of how many batches the graph is kept.
        loss: The mean loss at θ.
        gradient_P: Its gradient.

    Raises:
        UsageError: There are no examples, or network, loss and data do not make a loss that is
            a deterministic function of θ.
        NonFiniteError: The loss or its gradient is NaN or infinite at θ.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: BatchLoss,
        batches: Batches,
        *,
        gauss_newton: bool = False,
        graph_bytes: int = GRAPH_BYTES,
    ) -> None:
        self._point, self._loss, self._batches = Point(model), loss, batches
        self._build = GaussNewtonGraph if gauss_newton else HessianGraph
        self._graphs: list[Graph] = []
        self._batched = True
        self.dim = self._point.theta_P.numel()
        self.examples = self.products = 0
        self.gradient_P = torch.zeros_like(self._point.theta_P, requires_grad=False)
        room, bytes_each = 0.0 if batches.streamed else float(graph_bytes), 0.0
        total, self._divisor = 0.0, 0.0
        for batch in batches:
            count = examples_of(batch)
            if not self.examples:
                bytes_each = self._rehearse(batch) / max(count, 1)
            graph = self._graph(batch)
            room -= count * bytes_each
            if room > 0:
                self._graphs.append(graph)
            self.examples += count
            total += graph.total
            self._divisor += graph.divisor
            self.gradient_P += graph.gradient_P
        if not self._divisor:
            raise UsageError("a mean loss needs at least one example, the data hold none")
        self.loss = total / self._divisor
        self.gradient_P /= self._divisor
        if not (math.isfinite(self.loss) and bool(self.gradient_P.isfinite().all())):
            raise NonFiniteError(
                "the loss or its gradient is not finite at these weights; look for NaN in the "
                "data, or try model.double() on data in float64"
            )

    @property
    def kept(self) -> int:
        """Of how many batches, from the first on, the graph is kept."""
        return len(self._graphs)

    def __call__(self, v_P: Tensor) -> Tensor:
        """The product Hv, of v's shape (P,), dtype and device; or those of a block (B, P)."""
        return self.block(v_P) if v_P.ndim == 2 else self.block(v_P[None])[0]

    def block(self, v_BP: Tensor) -> Tensor:
        """The products of B vectors (B, P), the graph of each batch run through once.

        Raises:
            UsageError: An operation of the network has no second derivative, or the data are
                not those of the first pass.
        """
        self.products += len(v_BP)
        result_BP = torch.zeros_like(v_BP)
        for i, batch in enumerate(self._batches):
            graph = self._graphs[i] if i < self.kept else self._graph(batch)
            result_BP += self._products(graph, v_BP)
        return result_BP / self._divisor

    def _products(self, graph: Graph, v_BP: Tensor) -> Tensor:
        if self._batched and len(v_BP) > 1:
            try:
                with warnings.catch_warnings():
                    # What vmap has no rule for it takes one by one, which is right too.
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    return graph.products(v_BP, batched=True)
            except RuntimeError:  # an operation that vmap does not know, or no memory for B
                self._batched = False
        try:
            return graph.products(v_BP, batched=False)
        except RuntimeError as error:
            if "derivative for" in str(error) or "double backward" in str(error):
                raise UsageError(
                    "an operation of the network or the loss can be differentiated only once: "
                    f"{str(error).splitlines()[0]} Use one written in plain tensor operations; "
                    "for recurrent layers on a GPU, torch.backends.cudnn.enabled = False"
                ) from error
            raise

    @torch.enable_grad()
    def _graph(self, batch: Batch) -> Graph:
        return self._build(self._point, self._loss, batch)

    @torch.enable_grad()
    def _rehearse(self, batch: Batch) -> float:
        """Refuse what depends on more than θ and the data; return the bytes of a graph.

        Raises:
            UsageError: The loss of the batch is not the same twice, or depends on the network's
                own weights.
        """
        value, _ = self._loss(self._point(batch[0]), batch)
        if not value.requires_grad:
            raise UsageError("the loss does not depend on the trainable parameters")
        if self._point.reads_itself(value):
            raise UsageError(
                "the loss reads the network's weights other than through its output; leave a "
                "penalty c‖θ‖² out, it adds 2c to every eigenvalue"
            )
        again, size = self._measured(batch)
        if again.broken:
            raise UsageError(
                "an operation of the network or the loss can be differentiated only once, and "
                "PyTorch would leave its curvature out (once_differentiable); use one written in "
                "plain tensor operations"
            )
        first, eps = float(value.detach()), torch.finfo(value.dtype).eps
        if abs(again.total - first) > eps**0.5 * abs(first):
            raise UsageError(
                f"the loss of the same batch was {first:.6g} and then {again.total:.6g}; the "
                "network draws random numbers or remembers: call model.eval() first"
            )
        return size

    def _measured(self, batch: Batch) -> tuple[Graph, float]:
        """The graph of a batch and the bytes that it holds besides the data and the weights."""
        there = [*self._point.tensors(), *leaves(batch)]
        known = {t.untyped_storage().data_ptr() for t in there if isinstance(t, Tensor)}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return self._graph(batch), sum(sizes.values())
        except RuntimeError as error:  # a network that differentiates by torch.func itself
            if "saved tensor hooks" not in str(error):
                raise
            return self._graph(batch), math.inf
