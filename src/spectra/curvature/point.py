"""A network at a point θ of its parameter space, as a pure function of its inputs.

θ_P is the trainable parameters, one after the other, in the order of `named_parameters()`, a
tied one once. Everything else that the network computes with (frozen parameters, buffers) is
copied with it, so that the point stays what it is when training goes on, and nothing that a
forward pass writes reaches the network itself.

Attention is computed without PyTorch's fused kernels, which can be differentiated only once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectra.curvature.batches import leaves
from spectra.errors import UsageError

_PRECISIONS = (torch.float32, torch.float64)


class Point:
    """A network at its present weights.

    Args:
        model: The network; it is left as it is.

    Attributes:
        theta_P: Its trainable parameters, a copy, for which results are differentiated.

    Raises:
        UsageError: The network has nothing to train, works in half precision, is on several
            devices, or would mix the examples of a batch or draw random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module = getattr(model, "_orig_mod", model)  # compiled: the original
        check_evaluating(self._model)
        trained = trainable(self._model)
        kinds = {(p.dtype, p.device) for p in trained.values()}
        if len(kinds) > 1 or next(iter(kinds))[0] not in _PRECISIONS:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise UsageError(
                f"the trainable parameters are {found}; they must all be float32 or all float64, "
                "on one device: model.float()"
            )
        self._shapes = {name: p.shape for name, p in trained.items()}
        flat = [p.detach().reshape(-1) for p in trained.values()]
        self.theta_P = torch.cat(flat).requires_grad_()
        names = {id(p): name for name, p in trained.items()}
        places = list(_places(self._model))
        self._places = {place: names[id(p)] for place, p in places if id(p) in names}
        self._constants = {
            place: tensor.detach().clone() for place, tensor in places if id(tensor) not in names
        }

    def __call__(self, inputs: Any, theta_P: Tensor | None = None) -> Any:  # noqa: ANN401
        """The output for a batch's inputs; tuples and mappings are unpacked into `forward`.

        Args:
            inputs: What `forward` takes.
            theta_P: Other parameters than the point's own.

        Raises:
            UsageError: The network cannot take inputs of this dtype.
        """
        check_evaluating(self._model)
        keywords = inputs if isinstance(inputs, Mapping) else {}
        positional = inputs if isinstance(inputs, tuple) else (inputs,)
        theta_P = self.theta_P if theta_P is None else theta_P
        parts = split(theta_P, self._shapes)
        tensors = {place: parts[name] for place, name in self._places.items()}
        tensors.update(self._constants)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(
                    self._model,
                    tensors,
                    () if keywords else positional,
                    dict(keywords),
                    tie_weights=False,
                )
        except RuntimeError as error:
            own = theta_P.dtype
            for leaf in leaves(inputs):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != own:
                    raise UsageError(
                        f"the network is {own} and its inputs are {leaf.dtype}; convert one of "
                        f"them, for example inputs.to({own})"
                    ) from error
            raise

    def tensors(self) -> list[Tensor]:
        """All that the network computes with, besides its inputs."""
        return [self.theta_P, *self._constants.values()]

    def reads_itself(self, value: Tensor) -> bool:
        """Whether a loss depends on the network's own weights, other than through this point."""
        own = list(trainable(self._model).values())
        gradients = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in gradients)


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every place where a module keeps a parameter or buffer, each module once.

    `functional_call` ties weights by itself, but leaves its own behind in a module that occurs
    twice: the second place is put back to what the first had been given.
    """
    for module_name, module in model.named_modules():
        own = {
            **dict(module.named_parameters(recurse=False, remove_duplicate=False)),
            **dict(module.named_buffers(recurse=False, remove_duplicate=False)),
        }
        for name, tensor in own.items():
            yield (f"{module_name}.{name}" if module_name else name), tensor


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, each once.

    Raises:
        UsageError: There are none, or a lazy one has no shape yet.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise UsageError("the network has no parameter with requires_grad=True")
    for name, p in found.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UsageError(f"'{name}' has no shape yet; run one batch through the network first")
    return found


def split(flat_P: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Views of a flat vector as named tensors."""
    parts = torch.split(flat_P, [math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def check_evaluating(model: nn.Module) -> None:
    """Refuse what makes a mean loss depend on chance or on how the data are cut into batches.

    Raises:
        UsageError: Dropout is active, or a batch normalisation uses the batch.
    """
    for name, module in model.named_modules():
        where = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            remedy = (
                "call model.eval() first"
                if module.track_running_stats
                else "build it with track_running_stats=True"
            )
            raise UsageError(f"{where} normalises by the batch, not the data; {remedy}")
        dropping = (
            (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
            or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
            or (isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1)
            or isinstance(module, nn.RReLU)
        )
        if module.training and dropping:
            raise UsageError(f"{where} draws random numbers; call model.eval() first")
