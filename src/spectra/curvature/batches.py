"""The data of a mean loss in batches, the same ones on every pass.

A solver passes over the data some hundred times and takes every product for one with the same
matrix. A loader that shuffles, draws augmentations or drops another ragged end each time breaks
that silently, so what streams in is held against the first pass, batch by batch: shapes, dtypes
and a checksum of the bytes, which costs less than reading them. Data in memory need no such
check.

A batch is a pair (inputs, targets). Inputs are a tensor, or a tuple or mapping of what the
network's `forward` takes; targets are whatever the loss takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from spectra.errors import UsageError

Batch: TypeAlias = tuple[Any, Any]
"""(inputs, targets)."""

BATCH = 512
"""Examples that data in memory are cut into: large enough for the arithmetic to dominate."""

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batches:
    """Data that can be passed over again and again.

    Args:
        data: A pair of tensors (inputs, targets) with a line an example; a list or tuple of
            batches; or anything else that gives the same batches whenever it is iterated over,
            such as a DataLoader that does not shuffle.
        batch_size: Examples a batch of a pair of tensors, the last one smaller; 512 unless
            given. Batches that come as such are taken as they are.
        device: Where the network is; batches are moved there.

    Attributes:
        pair: The data as tensors on the device, where they came as such.
        streamed: Whether the batches are made anew on every pass, and so checked.

    Raises:
        UsageError: The data are of no such kind, or can be seen to differ from pass to pass.
        ValueError: `batch_size` is below 1, or given for data that are in batches already.
    """

    def __init__(
        self, data: object, *, batch_size: int | None = None, device: torch.device | None = None
    ) -> None:
        self._device = device or torch.device("cpu")
        self._source: Iterable[Any]
        self._marks: list[tuple[object, ...]] | None = None
        pair = _tensor_pair(data)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size is not None and pair is None:
            raise ValueError("batch_size is for a pair of tensors; these data are in batches")
        self.streamed = pair is None and not isinstance(data, list | tuple)
        self.pair = pair and (pair[0].to(self._device), pair[1].to(self._device))
        if self.pair is not None:
            parts = (part.split(batch_size or BATCH) for part in self.pair)
            self._source = list(zip(*parts, strict=True))
        elif isinstance(data, list | tuple):
            self._source = [self._checked(batch, i) for i, batch in enumerate(data, start=1)]
        else:
            self._source = _repeatable(data)

    def __iter__(self) -> Iterator[Batch]:
        """One pass.

        Raises:
            UsageError: A batch is no pair of inputs and targets, or not that of the first pass.
        """
        if not self.streamed:
            yield from self._source
            return
        marks: list[tuple[object, ...]] = []
        for i, item in enumerate(self._source):
            batch = self._checked(item, i + 1)
            marks.append(_mark(batch))
            if self._marks is not None and self._marks[i : i + 1] != marks[i:]:
                raise UsageError(
                    f"batch {i + 1} is not what it was in the first pass over the data; every "
                    "pass must give the same batches: shuffle=False, no random augmentation"
                )
            yield batch
        if self._marks is not None and len(marks) != len(self._marks):
            raise UsageError(
                f"the data gave {len(self._marks)} batches at first and {len(marks)} now; pass "
                "what can be iterated over again, such as a list or a DataLoader"
            )
        self._marks = marks

    def together(self, memory: int) -> tuple[Tensor, Tensor] | None:
        """All data as one pair of tensors, or None where they are no such.

        Args:
            memory: Bytes that data which stream in may take; more are not held. Those that fit
                are passed over twice, so that the second pass is held against the first.

        Raises:
            UsageError: See `__iter__`.
        """
        if self.pair is not None:
            return self.pair
        parts: list[tuple[Tensor, Tensor]] = []
        held = 0
        for inputs, targets in self:
            if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
                return None
            held += inputs.nbytes + targets.nbytes
            parts.append((inputs, targets))
            first = parts[0]
            alike = all(
                part.ndim and part.shape[1:] == one.shape[1:] and part.dtype == one.dtype
                for part, one in zip(parts[-1], first, strict=True)
            )
            if not alike or len(inputs) != len(targets) or (self.streamed and held > memory):
                return None
        if self.streamed:
            for _ in self:
                pass
        return (
            (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) if parts else None
        )

    def _checked(self, item: object, number: int) -> Batch:
        if not isinstance(item, list | tuple) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, list | tuple) else ""
            raise UsageError(
                f"batch {number} is a {type(item).__name__}{size}, not a pair (inputs, targets)"
            )
        inputs, targets = (_moved(part, self._device) for part in item)
        if not any(isinstance(leaf, Tensor) for leaf in leaves(inputs)):
            raise UsageError(
                f"the inputs of batch {number} are a {type(inputs).__name__} without tensors; "
                "convert arrays with torch.as_tensor"
            )
        return inputs, targets


def _tensor_pair(data: object) -> tuple[Tensor, Tensor] | None:
    """The data as a pair of tensors of equal length, or nothing where they are batches.

    Raises:
        UsageError: A pair of tensors has unequal lengths.
    """
    if not isinstance(data, list | tuple) or len(data) != 2:
        return None
    inputs, targets = data
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if not inputs.ndim or not targets.ndim or len(inputs) != len(targets):
        raise UsageError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ in their "
            "first dimension, which counts the examples"
        )
    return inputs, targets


def examples_of(batch: Batch) -> int:
    """How many examples a batch holds: the first dimension of the targets, else of the inputs."""
    for part in reversed(batch):
        for leaf in leaves(part):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return len(leaf)
    return 1


def leaves(tree: object) -> Iterator[object]:
    """What a nest of lists, tuples and mappings holds, in order."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves(part)
    else:
        yield tree


def _moved(tree: Any, device: torch.device) -> Any:  # noqa: ANN401 - a nest of anything
    """The same nest with its tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: _moved(part, device) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return tuple(_moved(part, device) for part in tree)
    return tree


def _repeatable(data: object) -> Iterable[Any]:
    """What can be passed over again, as far as can be seen without trying."""
    if isinstance(data, Dataset):
        raise UsageError("data are a Dataset; pass DataLoader(dataset, batch_size=...)")
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise UsageError(
            f"data are a {type(data).__name__}; pass tensors (inputs, targets), a list of batches "
            "or a DataLoader"
        )
    if isinstance(data, Iterator):
        raise UsageError(
            f"data are a {type(data).__name__}, which can be passed over only once; pass a list "
            "of its batches or a DataLoader"
        )
    if isinstance(data, DataLoader) and isinstance(data.sampler, _SHUFFLING):
        raise UsageError(
            f"the DataLoader draws its batches anew on every pass ({type(data.sampler).__name__});"
            " make one with shuffle=False"
        )
    return data


def _mark(batch: Batch) -> tuple[object, ...]:
    """What tells a batch from another: shapes, dtypes and CRC-32 of its tensors."""
    marks: list[object] = []
    for part in leaves(batch):
        if isinstance(part, Tensor):
            flat = part.detach().cpu().reshape(-1).contiguous()
            marks.append((part.shape, part.dtype, zlib.crc32(flat.view(torch.uint8).numpy().data)))
        elif isinstance(part, int | float | str | None):
            marks.append(part)
    return tuple(marks)
