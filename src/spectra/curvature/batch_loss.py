"""What the loss of a batch is a mean of, so that batches of any size add up.

The mean loss over all data is Σ_b S_b / Σ_b n_b, with S_b the sum of the terms of batch b and
n_b what they are divided by. A loss that returns a mean hides both. For PyTorch's own losses
they are known: the terms are those of `reduction="none"`, and n_b is their number, except for
class weights and ignored labels, where it is the weight of the labels. Of any other function it
is only known what the caller says; it is held against its own value on two parts of each batch.

What results is the loss of all data taken as one batch; of a loss that sums, that divided by
the number of examples.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.curvature.batches import Batch, examples_of
from spectra.errors import UsageError

Loss = Callable[[Any, Any], Tensor]
"""`(output, targets) -> scalar`: an `nn.Module` or a function."""
Reduction = Literal["mean", "sum"]

_BY_LABEL = (functional.cross_entropy, functional.nll_loss)


class BatchLoss:
    """A loss as sums over batches with what they are divided by.

    Args:
        loss: `(output, targets) -> scalar`, the mean or the sum over the examples of a batch.
        reduction: Which of the two; by default what the loss itself says, else the mean.

    Attributes:
        plain_cross_entropy: Whether this is the cross-entropy without weights, smoothing or a class
            that is ignored.

    Raises:
        UsageError: The loss returns one value an example.
        ValueError: `reduction` is neither, or not what the loss says of itself.
    """

    def __init__(self, loss: Loss, reduction: Reduction | None = None) -> None:
        if reduction not in ("mean", "sum", None):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self._loss = loss
        self._terms, self._settings = _terms(loss)
        said = self._settings.get("reduction", getattr(loss, "reduction", None))
        if said == "none":
            raise UsageError("the loss has reduction='none'; it must return a scalar: use 'mean'")
        if self._terms is not None and reduction not in (said, None):
            raise ValueError(f"reduction={reduction!r}, but the loss itself says {said!r}")
        self.reduction = reduction or said or "mean"
        self._by_label = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or (
            getattr(loss, "func", loss) in _BY_LABEL
        )
        self.plain_cross_entropy = (
            self._terms is not None
            and self._settings.get("weight") is None
            and self._settings.get("ignore_index", -1) < 0  # no label of a class
            and not self._settings.get("label_smoothing")
            and (
                isinstance(loss, nn.CrossEntropyLoss)
                or getattr(loss, "func", loss) is functional.cross_entropy
            )
        )

    def __call__(self, output: Any, batch: Batch) -> tuple[Tensor, float]:  # noqa: ANN401
        """The sum S of the terms of a batch, a scalar, and what it is divided by, n.

        Raises:
            UsageError: The loss is no scalar, or not the mean (or sum) over examples.
        """
        targets, examples = batch[1], examples_of(batch)
        if self._terms is None:
            value = self._loss(output, targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"the loss must return a scalar tensor, got {shape}")
            value = value.reshape(())
            self._check_parts(value.detach(), output, targets)
            return (value * examples if self.reduction == "mean" else value), examples
        terms = self._terms(output, targets)
        divisor = float(examples)
        if self.reduction == "mean":
            divisor = float(terms.numel())
            if self._by_label and not targets.is_floating_point():
                divisor = self._weight(targets)
        elif self.reduction == "batchmean":
            divisor = float(len(output))
        return terms.sum(), divisor

    def _weight(self, labels: Tensor) -> float:
        """The weight of the labels that count: their number, where classes have no weights."""
        kept = labels[labels != self._settings.get("ignore_index", -100)]
        weight_C = self._settings.get("weight")
        if weight_C is None:
            return float(kept.numel())
        return float(weight_C.to(kept.device)[kept].double().sum())

    @torch.no_grad()
    def _check_parts(self, value: Tensor, output: object, targets: object) -> None:
        """Hold the loss of a batch against that of two parts of it."""
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return
        if not output.ndim or not targets.ndim or not 2 <= len(output) == len(targets):
            return
        n, cut = len(output), len(output) // 2
        first = float(self._loss(output[:cut], targets[:cut]))
        second = float(self._loss(output[cut:], targets[cut:]))
        if self.reduction == "mean":
            first, second = first * cut / n, second * (n - cut) / n
        scale = max(abs(first), abs(second), abs(float(value)))
        error = abs(first + second - float(value))
        if bool(value.isfinite()) and not error <= scale * torch.finfo(value.dtype).eps ** 0.5:
            raise UsageError(
                f"the loss of a batch, {float(value):.6g}, is not the {self.reduction} over its "
                f"examples: two parts of it make {first + second:.6g}; return a plain "
                "mean or sum and name it by reduction="
            )


def _terms(loss: Loss) -> tuple[Loss | None, dict[str, Any]]:
    """One of PyTorch's own losses unreduced, and its settings; nothing for any other."""
    if isinstance(loss, nn.Module) and type(loss).__module__ == nn.MSELoss.__module__:
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"  # type: ignore[assignment]
        return unreduced, {"reduction": "mean", **vars(loss), **dict(loss.named_buffers())}
    function = loss.func if isinstance(loss, partial) else loss
    name = getattr(function, "__name__", "")
    if getattr(functional, name, None) is not function or (isinstance(loss, partial) and loss.args):
        return None, {}
    parameters = inspect.signature(function).parameters
    if "reduction" not in parameters:
        return None, {}
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    keywords = loss.keywords if isinstance(loss, partial) else {}
    return partial(function, **{**keywords, "reduction": "none"}), {**defaults, **keywords}
