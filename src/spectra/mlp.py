"""The multilayer perceptron as a pure function of its parameters.

A network is its widths and its activation; its parameters are one flat vector θ_P in
`state_dict` order (fc1.weight, fc1.bias, fc2.weight, ...), because every curvature quantity
lives in that space. Weights have the layout of `torch.nn.Linear`, (outputs, inputs), so a
`state_dict` written elsewhere is used as it is.

Letters: P parameters, N examples, D inputs, C classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from spectra.activations import ACTIVATIONS
from spectra.errors import WeightsError

_KEY = re.compile(r"^(?P<layer>.+)\.(?P<kind>weight|bias)$")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Mlp:
    """A fully connected network with biases: `widths` (D, hidden..., C) and an activation."""

    widths: tuple[int, ...]
    activation: str = "sigmoid"

    @property
    def layers(self) -> int:
        """The number of affine maps."""
        return len(self.widths) - 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`state_dict` keys and shapes, in the order of the flat vector."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(self.widths), start=1):
            shapes[f"fc{i}.weight"] = (fan_out, fan_in)
            shapes[f"fc{i}.bias"] = (fan_out,)
        return shapes

    @property
    def dim(self) -> int:
        """P, the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, theta_P: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, or of a stack (M, P) of them, as the `state_dict`'s tensors."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.split(theta_P, sizes, dim=-1)
        return {
            name: part.view(*theta_P.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def logits(self, theta_P: Tensor, inputs_ND: Tensor) -> Tensor:
        """The class scores (N, C) before the softmax."""
        tensors = list(self.split(theta_P).values())
        act = ACTIVATIONS[self.activation].value
        h = inputs_ND
        for i in range(self.layers):
            h = functional.linear(h, tensors[2 * i], tensors[2 * i + 1])
            if i < self.layers - 1:
                h = act(h)
        return h

    def initial(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Fresh parameters θ_P: uniform in ±1/√fan_in, `torch.nn.Linear`'s own choice."""
        theta_P = torch.empty(self.dim, dtype=dtype)
        for name, tensor in self.split(theta_P).items():
            fan_in = self.widths[int(name[2:].split(".")[0]) - 1]
            bound = 1 / math.sqrt(fan_in)
            tensor.uniform_(-bound, bound, generator=generator)
        return theta_P

    def state_dict(self, theta_P: Tensor) -> dict[str, Tensor]:
        """A copy of the parameters as fc1.weight, fc1.bias, ..., on the CPU."""
        parts = self.split(theta_P.detach())
        return {name: part.to("cpu", copy=True).contiguous() for name, part in parts.items()}


def from_state_dict(state: Mapping[str, object], activation: str) -> tuple[Mlp, Tensor]:
    """The network that a `state_dict` of this family describes, whatever its layers are called.

    Args:
        state: `name.weight` (outputs, inputs) and `name.bias` (outputs,) alternating from the
            input to the output, floating point, finite.
        activation: A key of `ACTIVATIONS`; a `state_dict` does not say.

    Returns:
        The network and its parameters θ_P in the dtype of the first tensor (half
        precisions become float32), on the CPU.

    Raises:
        WeightsError: The tensors do not form a chain of affine maps.
    """
    if not state:
        raise WeightsError("the state_dict is empty; expected fc1.weight, fc1.bias, ...")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise WeightsError(
                f"'{name}' is a {type(tensor).__name__}, not a tensor; save model.state_dict()"
            )
        _check(name, tensor)
    widths: list[int] = []
    names = list(state)
    for position in range(0, len(names), 2):
        weight_name, bias_name = names[position], (names[position + 1 : position + 2] or ["?"])[0]
        weight_key, bias_key = _KEY.match(str(weight_name)), _KEY.match(str(bias_name))
        if (
            not weight_key
            or not bias_key
            or weight_key["layer"] != bias_key["layer"]
            or (weight_key["kind"], bias_key["kind"]) != ("weight", "bias")
        ):
            raise WeightsError(
                f"keys '{weight_name}' and '{bias_name}' are not the weight and bias of one "
                "layer; a fully connected network has NAME.weight, NAME.bias for every layer"
            )
        weight, bias = state[weight_name], state[bias_name]
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or not weight.numel():
            raise WeightsError(
                f"'{weight_name}' {tuple(weight.shape)} and '{bias_name}' {tuple(bias.shape)} "
                "are not an affine map; expected (outputs, inputs) and (outputs,)"
            )
        if widths and weight.shape[1] != widths[-1]:
            raise WeightsError(
                f"'{weight_name}' takes {weight.shape[1]} inputs but the layer before gives "
                f"{widths[-1]}"
            )
        widths = widths or [weight.shape[1]]
        widths.append(weight.shape[0])
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    dtype = tensors[0].dtype if tensors[0].dtype in (torch.float32, torch.float64) else None
    flat = [tensor.detach().to("cpu", dtype or torch.float32).reshape(-1) for tensor in tensors]
    return Mlp(tuple(widths), activation), torch.cat(flat)


def _check(name: object, tensor: Tensor) -> None:
    """Refuse a tensor that does not hold finite numbers of a kind that is calculated with."""
    if tensor.dtype not in _DTYPES:
        raise WeightsError(
            f"'{name}' has dtype {tensor.dtype}; weights must be floating point: float16, "
            "bfloat16, float32 or float64"
        )
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        kind = "no values" if tensor.device.type == "meta" else f"the layout {tensor.layout}"
        raise WeightsError(f"'{name}' has {kind}; save a dense tensor")
    # A few bytes can claim any shape by strides of zero; to look at them all would take it.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise WeightsError(f"'{name}' holds fewer numbers than its shape; save a contiguous copy")
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"'{name}' contains NaN or infinity; the network is not usable")
